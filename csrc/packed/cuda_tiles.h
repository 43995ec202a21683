// What the kernels share that take a weight in tiles of 64 x 64: how blocks and warps walk over the
// tiles, the product of a tile, and the launch. See cuda_linear.h, tile_fragments.h.
#pragma once

#include "packed/cuda_finish.h"
#include "packed/cuda_linear.h"
#include "packed/cuda_splits.h"
#include "packed/cuda_x.h"
#include "packed/tile_fragments.h"

namespace lottery_sparse {
namespace {

constexpr int kOperands = 4;                  // of 16 rows in a tile
constexpr int kWordsOfTile = kTileSide / 16;  // of x
constexpr int kFewWarps = 8;

// The tiles of a warp: those of a row of tiles that are its own, then those of the block's next.
template <int kWarps>
struct TileWalk {
    int row_tiles, column_tiles, first_tile;
    int tiles, steps;  // of a row and split; of a warp in them
    int row_tile, step;

    LS_MEMBER explicit TileWalk(const CudaTiles& p) {
        row_tiles = static_cast<int>((p.linear.out_features + kTileSide - 1) / kTileSide);
        column_tiles = static_cast<int>((p.linear.in_features + kTileSide - 1) / kTileSide);
        first_tile = block_y() * static_cast<int>(p.split_tiles);
        const int left = column_tiles - first_tile;
        tiles = left > 0 ? static_cast<int>(least(p.split_tiles, left)) : 0;
        steps = tiles ? (tiles + kWarps - 1) / kWarps : 1;
        row_tile = block_x();
        step = 0;
    }
    LS_MEMBER bool done() const { return row_tile >= row_tiles; }
    LS_MEMBER bool last_of_row() const { return step + 1 == steps; }
    LS_MEMBER void advance() {
        if (last_of_row()) row_tile += grid_x();
        step = last_of_row() ? 0 : step + 1;
    }
    LS_MEMBER int tile() const { return step * kWarps + thread_index() / kLanes; }
    // The entries of `starts` that say where the tile begins and ends, or nullptr for no tile.
    LS_MEMBER const uint32_t* start(const CudaTiles& p) const {
        if (done() || tile() >= tiles) return nullptr;
        return p.starts + int64_t{row_tile} * column_tiles + first_tile + tile();
    }
};

// The sums of all warps for a row of tiles -> y, see finish_operands.
template <int kSides, int kWarps>
LS_DEVICE void finish_tiles(const CudaLinear& p, int row_tile, int stride,
                            float c[kOperands][kSides][4]) {
    finish_operands<kOperands, kSides, kWarps>(
        p, {nullptr, Number::kFloat, false, 1.0f}, stride, c,
        [&](int operand, int row) { return int64_t{row_tile} * kTileSide + operand * 16 + row; });
}

using TilesKernel = void (*)(CudaTiles);

// The kernels of a format: by dtype, operands of x, warps.
struct TilesKernels {
    TilesKernel kernel[2][2][2];
    int warp_bytes;  // of shared memory
    int many_warps;  // of a block, where it can have 200 KiB; elsewhere kFewWarps
    int warps(const Device& device) const {
        return device.shared >= (200 << 10) ? many_warps : kFewWarps;
    }
};

int64_t tiles_splits(const TilesKernels& kernels, int64_t batch, int64_t in_features,
                     const Device& device) {
    const int64_t tiles = (in_features + kTileSide - 1) / kTileSide;
    const int64_t bytes = device.shared - kernels.warps(device) * kernels.warp_bytes;
    const int64_t most = (bytes / batch - 32) / kWordBytes / kWordsOfTile;
    return tiles ? (tiles + most - 1) / most : 1;
}

const char* tiles_launch(const TilesKernels& kernels, CudaTiles p, const Device& device) {
    const CudaLinear& linear = p.linear;
    const int64_t tiles = (linear.in_features + kTileSide - 1) / kTileSide;
    p.split_tiles = (tiles + linear.splits - 1) / linear.splits;
    const int64_t row_tiles = (linear.out_features + kTileSide - 1) / kTileSide;
    const int64_t room = device.processors / linear.splits;
    const int warps = kernels.warps(device), words = static_cast<int>(p.split_tiles) * kWordsOfTile;
    const int shared = static_cast<int>(warps * kernels.warp_bytes +
                                        x_rows(linear) * row_bytes<Columns::kQuarters>(words));
    const auto kernel =
        kernels.kernel[linear.type == Number::kFloat16][x_rows(linear) > kSide][warps != kFewWarps];
    const char* error = launch(kernel, least(row_tiles, room < 1 ? 1 : room), linear.splits,
                               warps * kLanes, shared, device, p);
    return error ? error : add_splits(linear, {nullptr, Number::kFloat, false, 1.0f}, device);
}

}  // namespace
}  // namespace lottery_sparse

// name<T, kSides, kWarps> for all of them.
#define LS_TILES_KERNELS(name, bytes, many)                      \
    {{{{name<BFloat16, 1, kFewWarps>, name<BFloat16, 1, many>},  \
       {name<BFloat16, 2, kFewWarps>, name<BFloat16, 2, many>}}, \
      {{name<Float16, 1, kFewWarps>, name<Float16, 1, many>},    \
       {name<Float16, 2, kFewWarps>, name<Float16, 2, many>}}},  \
     bytes,                                                      \
     many}
