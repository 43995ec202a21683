// Products y = x w^T + bias on a GPU for at most 16 rows of x and a weight packed for streaming.
//
// The bytes of the weight bound these products. So each byte is read once, 16 at a time, and
// becomes the first operand of the matrix unit in registers; the rows of x are the second. Few rows
// of x leave the unit idle, which costs nothing. The warps of a block share a row tile and divide
// its columns; if x does not fit in shared memory, so do blocks. Partial sums are added in a fixed
// order: the same bits in every run.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace lottery_sparse {

constexpr int64_t kCudaBatch = 16;  // most rows of x

// A row of x may come in parts that add up to it: rows m, B + m and 2 B + m, see rows_cuda.cu.
struct CudaLinear {
    int64_t batch;         // B
    int64_t in_features;   // K
    int64_t out_features;  // N
    const void* x;         // [parts * B, K], 16 bits
    const void* bias;      // [N], or nullptr
    void* y;               // [B, N], every element is written
    float* partial;        // [splits, B, N], or nullptr for one split
    Number type;           // of x
    Number bias_type;
    int64_t splits;        // blocks that divide the columns
    Number y_type;         // that of x, or kFloat
    int parts;             // of a row of x, 1 or 3
    const float* x_scale;  // [B]: what row m of x is multiplied by, or nullptr for 1
};

// Makes x of CudaLinear from other numbers, see rows_cuda.cu.
struct CudaRows {
    const void* x;  // [B, K]
    Number type;    // kFloat for parts
    int64_t batch;
    int64_t in_features;
    uint16_t* rows;  // bfloat16 [3 B, K], or [B, K]
    float* scale;    // [B], or nullptr for parts
};
const char* cuda_rows(const CudaRows& p, const Device& device);

// What the sums of a product become: y = scale * sum + bias.
struct CudaScale {
    const void* scale;  // [N], one number, or nullptr for 1
    Number type;
    bool by_row;
    float factor;  // of every scale
};

struct CudaTernary {
    CudaLinear linear;
    CudaScale scale;
    const uint32_t* codes;  // [ceil(N / 16), ceil(K / 16), 16], see ternary_linear.h
    int64_t split_words;    // columns / 16 of a split, a multiple of 4
};

// A sparse weight as tiles of 64 x 64, see tile_fragments.h and bitmap_fragments.h.
struct CudaTiles {
    CudaLinear linear;
    const uint32_t* starts;  // [row tiles, column tiles] and one more: unit where a tile begins
    const uint8_t* data;     // [units, bytes of a unit of the format]
    int64_t split_tiles;     // column tiles of a split
};

constexpr int64_t kCudaCsrBatch = 8;  // most rows of x

// A sparse weight by rows, see packed_linear.h.
struct CudaCsr {
    CudaLinear linear;        // splits: 1
    const int64_t* starts;    // [N + 1]: entries of row r are [starts[r], starts[r + 1])
    const uint16_t* columns;  // these two at a multiple of 16 bytes
    const uint16_t* values;   // of the type of x
};

// Whether x fits in shared memory.
bool cuda_csr_fits(int64_t batch, int64_t in_features, const Device& device);
const char* cuda_csr_linear(const CudaCsr& p, const Device& device);

// How many splits a product takes; `partial` above has room for them.
int64_t cuda_ternary_splits(int64_t batch, int64_t in_features, const Device& device);
// Each product returns nullptr, or the message of CUDA, and sets `split_words` or `split_tiles`
// itself.
const char* cuda_ternary_linear(CudaTernary p, const Device& device);

int64_t cuda_tiles_splits(int64_t batch, int64_t in_features, const Device& device);
const char* cuda_tiles_linear(const CudaTiles& p, const Device& device);
int64_t cuda_bitmap_splits(int64_t batch, int64_t in_features, const Device& device);
const char* cuda_bitmap_linear(const CudaTiles& p, const Device& device);

}  // namespace lottery_sparse
