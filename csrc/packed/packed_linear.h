// packed_linear: y = x w^T + bias for a pruned weight that is stored as its kept entries by row.
//
// An entry is a value, float or bfloat16, and a column, 16 bits where they hold it. One row of x is
// gathered; more rows make tiles [K][width] in which an entry meets a whole line. Each output is
// summed in the same order for any thread count.
//
// bitmap_linear is the same product where many entries are kept: the mask takes their columns'
// place, and 16 columns at a time are expanded from it in a register and meet a few rows of x.
#pragma once

#include <cstdint>

#include "common/bfloat16.h"
#include "common/parallel.h"
#include "common/variants.h"
#include "linear/list_below.h"

namespace lottery_sparse {

struct PackedLinear {
    int64_t batch;          // B
    int64_t in_features;    // K
    int64_t out_features;   // N
    const float* x;         // [B, K]
    const int64_t* starts;  // [N + 1]: entries of row r are [starts[r], starts[r + 1])
    const void* columns;    // uint16_t or, if wide, uint32_t; all below K
    const void* values;     // float or, if half, bfloat16
    int64_t entries;        // how many values there are
    bool wide;
    bool half;
    const float* bias;  // [N], or nullptr
    float* y;           // [B, N], every element is written
};

// Throws where starts do not ascend to at most `entries`, or a column is not below K.
void packed_linear(const PackedLinear& p, const Parallel& parallel);

struct BitmapLinear {
    int64_t batch;
    int64_t in_features;
    int64_t out_features;
    const float* x;         // [B, K]
    const int64_t* starts;  // [N + 1], as above
    const uint32_t* bits;   // [N, packed_words(K)]: the mask, see bits.h
    const void* values;     // float or, if half, bfloat16
    int64_t entries;        // how many values there are
    bool half;
    const float* bias;  // [N], or nullptr
    float* y;           // [B, N], every element is written
};

// Throws where starts do not ascend to at most `entries`, or a row of bits has more ones than
// values are left.
void bitmap_linear(const BitmapLinear& p, const Parallel& parallel);

constexpr int64_t kNarrowTile = 16;  // rows of x in a tile, if there are no more than these
constexpr int64_t kWideTile = 32;

// A row of x, or a tile of up to `width` rows.
template <class Index, class Value>
struct PackedTile {
    const int64_t* starts;
    const Index* columns;
    const Value* values;
    const float* x;  // [K], or [K][width]
    const float* bias;
    float* y;  // [batch][out_features]
    int64_t out_features;
    int64_t batch;
    int64_t width;             // 1, kNarrowTile or kWideTile
    const ListBounds* bounds;  // to be checked, or nullptr: the lists are known to fit
};

template <class Index, class Value>
struct PackedLinearKernels {
    // x [batch][K] -> tile [K][width], zeros beyond batch; columns [begin, end).
    void (*pack)(const float* x, int64_t batch, int64_t in_features, int64_t width, int64_t begin,
                 int64_t end, float* tile);
    // Rows [begin, end). False: a row's list does not fit.
    bool (*multiply)(const PackedTile<Index, Value>& p, int64_t begin, int64_t end);
};

using PackedKernels16 = PackedLinearKernels<uint16_t, float>;
using PackedKernels32 = PackedLinearKernels<uint32_t, float>;
using PackedKernels16Half = PackedLinearKernels<uint16_t, Bfloat16>;
using PackedKernels32Half = PackedLinearKernels<uint32_t, Bfloat16>;
LS_DECLARE_KERNELS(PackedKernels16, packed_linear_16);
LS_DECLARE_KERNELS(PackedKernels32, packed_linear_32);
LS_DECLARE_KERNELS(PackedKernels16Half, packed_linear_16_half);
LS_DECLARE_KERNELS(PackedKernels32Half, packed_linear_32_half);

constexpr int64_t kBitmapBatch = 32;  // most rows of x in a tile
constexpr int64_t kBitmapSide = 4;    // rows of x are padded to a multiple of these
constexpr int64_t kBitmapGroup = 16;  // columns

// Rows of x have a stride of whole groups, with zeros beyond K. Rows up to a multiple of
// kBitmapSide can be read.
template <class Value>
struct BitmapTile {
    const int64_t* starts;
    const uint16_t* bits;
    const Value* values;
    const float* x;  // [batch][stride]
    const float* bias;
    float* y;  // [batch][out_features]
    int64_t in_features;
    int64_t out_features;
    int64_t stride;
    int64_t batch;  // 1 to kBitmapBatch
};

template <class Value>
struct BitmapLinearKernels {
    void (*multiply)(const BitmapTile<Value>& p, int64_t begin, int64_t end);
};

using BitmapKernels = BitmapLinearKernels<float>;
using BitmapKernelsHalf = BitmapLinearKernels<Bfloat16>;
LS_DECLARE_KERNELS(BitmapKernels, bitmap_linear_float);
LS_DECLARE_KERNELS(BitmapKernelsHalf, bitmap_linear_half);

}  // namespace lottery_sparse
