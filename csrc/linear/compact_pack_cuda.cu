// x -> panels, values in the order of the lists by column, values -> a dense weight; see
// cuda_compact.h.
#include "common/cuda_kernel.h"
#include "linear/cuda_compact.h"

namespace lottery_sparse {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kTile = 32;                     // columns of x
constexpr int kStride = kPanelBytes / 4 + 1;  // words: a column of the tile in as many banks
constexpr int kTileBytes = kTile * kStride * 4;

template <class Bits>
LS_GLOBAL(kThreads, 4)
pack_kernel(CudaPack p) {
    constexpr int kRows = kPanelBytes / sizeof(Bits);
    const int lane = thread_index() % kLanes, warp = thread_index() / kLanes;
    const int64_t panels = (p.batch + kRows - 1) / kRows;
    const int64_t across = (p.in_features + kTile - 1) / kTile, tiles = panels * across;
    const int64_t network = block_y();
    if (block_x() < tiles) {
        if (network >= p.networks) return;
        const int64_t panel = block_x() / across, first = block_x() % across * kTile;
        const Bits* x = static_cast<const Bits*>(p.x) + network * p.batch * p.in_features;
        uint32_t* out = static_cast<uint32_t*>(p.panels) +
                        (network * panels + panel) * p.in_features * (kPanelBytes / 4);
        const int64_t column = first + lane;
        Bits held[kRows / kWarps];
        LS_UNROLL
        for (int i = 0; i < kRows / kWarps; ++i) {
            const int64_t row = panel * kRows + i * kWarps + warp;
            held[i] = row < p.batch && column < p.in_features ? x[row * p.in_features + column] : 0;
        }
        LS_UNROLL
        for (int i = 0; i < kRows / kWarps; ++i)
            reinterpret_cast<Bits*>(shared_memory() + lane * kStride * 4)[i * kWarps + warp] =
                held[i];
        sync_block();
        for (int at = warp; at < kTile && first + at < p.in_features; at += kWarps)
            out[(first + at) * (kPanelBytes / 4) + lane] =
                reinterpret_cast<const uint32_t*>(shared_memory())[at * kStride + lane];
        return;
    }
    if (network >= p.lists) return;
    const int64_t i = (block_x() - tiles) * kThreads + thread_index();
    if (i >= p.starts[network * p.ends + p.ends - 1]) return;
    const Bits* values = static_cast<const Bits*>(p.values) + network * p.slots;
    static_cast<Bits*>(p.ordered)[network * p.slots + i] =
        values[p.positions[network * p.slots + i]];
}

// A warp for each row.
LS_GLOBAL(kThreads, 4)
scatter_kernel(CudaScatter p) {
    const int64_t network = block_y(), row = int64_t{block_x()} * kWarps + thread_index() / kLanes;
    if (row >= p.rows) return;
    const int64_t* starts = p.kept.starts + network * (p.rows + 1) + row;
    const int64_t dense = (network * p.rows + row) * p.row_length, first = network * p.kept.slots;
    for (int64_t i = starts[0] + thread_index() % kLanes; i < starts[1]; i += kLanes) {
        const int64_t slot = first + i;
        const int64_t column = p.kept.wide ? static_cast<const int32_t*>(p.kept.columns)[slot]
                                           : static_cast<const uint16_t*>(p.kept.columns)[slot];
        store_number(p.dense, p.dense_type, dense + column,
                     number_at(p.values, p.values_type, slot));
    }
}

}  // namespace

const char* cuda_compact_pack(const CudaPack& p, const Device& device) {
    const int64_t rows = panel_rows(p.type), panels = (p.batch + rows - 1) / rows;
    const int64_t tiles = panels * ((p.in_features + kTile - 1) / kTile);
    const int64_t ordering = p.lists ? (p.slots + kThreads - 1) / kThreads : 0;
    const int64_t networks = p.lists > p.networks ? p.lists : p.networks;
    if (tiles + ordering == 0 || networks == 0) return nullptr;
    const auto kernel = p.type == Number::kFloat ? pack_kernel<uint32_t> : pack_kernel<uint16_t>;
    return launch(kernel, tiles + ordering, networks, kThreads, kTileBytes, device, p);
}

const char* cuda_scatter_kept(const CudaScatter& p, const Device& device) {
    if (p.rows == 0 || p.networks == 0) return nullptr;
    return launch(scatter_kernel, (p.rows + kWarps - 1) / kWarps, p.networks, kThreads, 0, device,
                  p);
}

}  // namespace lottery_sparse
