// dense_tiles: products of a dense matrix with packed tiles, sums in registers, and the way between
// dense rows and their kept entries. For layers that keep so many weights that skipping the others
// costs more than it saves.
//
// An element of the result is summed in order of the steps, whatever block it lies in: same bits
// for any way the rows are split.
#pragma once

#include <cstdint>

#include "common/variants.h"
#include "linear/sparse_linear.h"

namespace lottery_sparse {

// out[r][c] = bias[r] + sum over s of a[r * a_row + s * a_step] * b[s][c], c < kTileBatch.
struct DenseProduct {
    const float* a;
    int64_t a_row;
    int64_t a_step;
    const float* b;  // [steps][kTileBatch]
    int64_t steps;
    const float* bias;  // by row, or nullptr
    const float* gate;  // [rows][kTileBatch]: results are 0 where it is 0 or less; or nullptr
    float* out;         // [rows][out_stride]
    int64_t out_stride;
    bool relu;
};

constexpr int64_t kDenseRows = 12;  // rows of a block; of fewer a product is less quick

constexpr int64_t kPickSlack = 16;

struct DenseTilesKernels {
    void (*multiply)(const DenseProduct& p, int64_t begin, int64_t end);  // rows [begin, end)
    // tile [features][kTileBatch] -> out[b][f], b < batch, rows of out `stride` floats apart.
    void (*transpose)(const float* tile, int64_t features, int64_t batch, float* out,
                      int64_t stride);
    // The first `count` entries that a row's mask keeps, from and to the row's list. `pick` may
    // write kPickSlack floats beyond them.
    void (*pick)(const uint8_t* mask, const float* dense, int64_t columns, int64_t count,
                 float* kept);
    void (*place)(const uint8_t* mask, const float* kept, int64_t columns, int64_t count,
                  float* dense);
};

LS_DECLARE_KERNELS(DenseTilesKernels, dense_tiles);

}  // namespace lottery_sparse
