// ternary_linear: y = scale * (x t^T) + bias for weights t of -1, 0 and +1, two bits each.
//
// A code is t + 1. Codes of 16 rows and 16 columns are a block of 16 words, one per row: column
// 16 w + 4 j + b of a row is at bits 8 b + 2 j of its word. So a vector of words has a row per
// lane, no sum runs across lanes, and both products below read the same bytes:
//
//   exact  a shift brings a few codes of each row down, and they choose a sum of x from a table
//   int8   a shift and an AND leave four codes as bytes, which meet four bytes of x
//
// Rows and columns are padded with code 1 (a weight of 0). What is computed for an output element
// never depends on how the work is split: same bits for any thread count and batch.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/variants.h"

namespace lottery_sparse {

constexpr int64_t kTernaryRows = 16;     // rows of a block
constexpr int64_t kTernaryColumns = 16;  // columns of a word
constexpr int64_t kTernaryBatch = 16;    // most rows of x in a tile of the int8 product
// Sums of int8 products must fit 32 bits, also in the slots that a kernel scales by up to 64.
constexpr int64_t kTernaryMostColumns = 1 << 18;

struct TernaryLinear {
    int64_t batch;          // B
    int64_t in_features;    // K
    int64_t out_features;   // N
    const float* x;         // [B, K]
    const uint32_t* codes;  // [ceil(N / 16), ceil(K / 16), 16]
    const float* scale;     // [N], or one number
    bool scale_by_row;
    const float* bias;  // [N], or nullptr
    float* y;           // [B, N], every element is written
};

// Exact activations: sums of float32 x.
void ternary_linear(const TernaryLinear& p, const Parallel& parallel);
// Each row of x is rounded to 8 bits, x ~ q * max|x| / 127; products and sums of q are exact.
void ternary_linear_int8(const TernaryLinear& p, const Parallel& parallel);
// Exact activations that are bfloat16 (`x` above is unused): products of pairs, where the processor
// has them; see ternary_half_runs.
void ternary_linear_half(const TernaryLinear& p, const uint16_t* x, const Parallel& parallel);
bool ternary_half_runs();

// Blocks of codes with one, or a few, rows of x. Tables are as the variant's `tables` made them.
struct TernaryTile {
    const uint32_t* codes;
    int64_t words;  // of a row: ceil(K / 16)
    const float* tables;
    const float* scale;
    bool scale_by_row;
    const float* bias;
    float* y;  // [batch][out_features]
    int64_t out_features;
    int64_t batch;  // 1 or 2
};

// x by word, [words][parts][width], rows beyond batch are zeros. As bytes there are 4 parts: part j
// has columns 4 j to 4 j + 3. As bfloat16 there are 8: part 2 b + h has columns 8 h + b and
// 8 h + b + 4, a pair like that of two neighbouring codes.
struct TernaryTileX {
    const uint32_t* codes;
    int64_t words;
    const uint32_t* x;
    const float* x_scale;  // [width]; bfloat16: unused, like x_sum
    const int32_t* x_sum;  // [width]: the sum of a row's bytes
    const float* scale;
    bool scale_by_row;
    const float* bias;
    float* y;
    int64_t out_features;
    int64_t batch;
    int64_t width;  // 1, 2, 4, 8 or 16, at least batch
};

struct TernaryKernels {
    int64_t table_floats;  // per word and row of x
    // Tables of words [begin, end) of x [batch <= 2, K].
    void (*tables)(const float* x, int64_t batch, int64_t in_features, int64_t begin, int64_t end,
                   float* tables);
    // Row blocks [begin, end) of kTernaryRows rows.
    void (*multiply)(const TernaryTile& p, int64_t begin, int64_t end);
};

struct TernaryTileKernels {
    // One row of x, or zeros for nullptr -> column m of a tile.
    void (*quantise)(const float* x, int64_t in_features, int64_t words, int64_t width,
                     uint32_t* column, float* scale, int32_t* sum);
    void (*multiply_int8)(const TernaryTileX& p, int64_t begin, int64_t end);
    // The same for bfloat16, or nullptr.
    void (*pack_half)(const uint16_t* x, int64_t in_features, int64_t words, int64_t width,
                      uint32_t* column);
    void (*multiply_half)(const TernaryTileX& p, int64_t begin, int64_t end);
};

LS_DECLARE_KERNELS(TernaryKernels, ternary_linear);
LS_DECLARE_KERNELS(TernaryTileKernels, ternary_tiles);

}  // namespace lottery_sparse
