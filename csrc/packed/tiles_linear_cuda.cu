// A sparse weight times few rows of x: its kept values are written to their places, see
// tile_fragments.h.
#include "packed/cuda_tiles.h"

namespace lottery_sparse {
namespace {

constexpr int kHeld = 14;  // groups that a warp reads ahead: 896 of the 4096 weights of a tile
constexpr int kHeldHigh = (kHeld + kHighGroups - 1) / kHighGroups;

// Where a tile's groups are.
struct Groups {
    const uint8_t* data;
    uint32_t count;
};

// T: the numbers of x and of the weight. kSides: operands of 8 rows of x. kWarps: of a block.
template <class T, int kSides, int kWarps>
LS_GLOBAL(kWarps* kLanes, 1)
tiles_kernel(CudaTiles p) {
    const CudaLinear& linear = p.linear;
    const int lane = thread_index() % kLanes;
    unsigned char* const mine = shared_memory() + thread_index() / kLanes * kTileBytes;
    unsigned char* const x = shared_memory() + kWarps * kTileBytes;
    const uint64_t policy = evict_first();

    const auto groups_of = [&](const TileWalk<kWarps>& at) -> Groups {
        const uint32_t* start = at.start(p);
        if (!start) return {p.data, 0};
        return {p.data + int64_t{start[0]} * kUnit, groups_of_units(start[1] - start[0])};
    };
    const auto read_values = [&](const Groups& g, uint32_t i) {
        return stream(reinterpret_cast<const uint32_t*>(g.data + i * kValueBytes) + lane, policy);
    };
    const auto read_low = [&](const Groups& g, uint32_t i) {
        const uint8_t* low = g.data + g.count * kValueBytes + i * kLowBytes;
        return stream(reinterpret_cast<const uint16_t*>(low) + lane, policy);
    };
    const auto read_high = [&](const Groups& g, uint32_t i) {  // of kHighGroups groups
        const uint8_t* high = g.data + g.count * (kValueBytes + kLowBytes) + i * kHighBytes;
        return stream(reinterpret_cast<const uint32_t*>(high) + lane, policy);
    };
    const auto write = [&](uint32_t places, uint32_t values) {
        *reinterpret_cast<uint16_t*>(mine + (places & 0xFFFF)) = static_cast<uint16_t>(values);
        *reinterpret_cast<uint16_t*>(mine + (places >> 16)) = static_cast<uint16_t>(values >> 16);
    };
    const auto clear = [&](int bytes) {
        for (int i = lane * 16; i < bytes; i += kLanes * 16)
            *reinterpret_cast<Words4*>(mine + i) = Words4{};
    };

    TileWalk<kWarps> at(p);
    const int words = at.tiles * kWordsOfTile;
    Groups groups = groups_of(at);
    uint32_t values[kHeld], low[kHeld], high[kHeldHigh];
    const auto read_ahead = [&](const Groups& g) {
        LS_UNROLL
        for (uint32_t i = 0; i < kHeldHigh; ++i)
            if (i * kHighGroups < g.count) high[i] = read_high(g, i);
        LS_UNROLL
        for (uint32_t i = 0; i < kHeld; ++i)
            if (i < g.count) values[i] = read_values(g, i), low[i] = read_low(g, i);
    };
    read_ahead(groups);
    clear(kTileBytes);
    load_x<Columns::kQuarters>(linear, int64_t{at.first_tile} * kWordsOfTile, words, x,
                               kWarps * kLanes);
    sync_block();

    float c[kOperands][kSides][4] = {};
    while (!at.done()) {
        TileWalk<kWarps> next_at = at;
        next_at.advance();
        const Groups next = groups_of(next_at);
        uint32_t places[kHeld];
        LS_UNROLL
        for (uint32_t i = 0; i < kHeld; ++i)
            if (i < groups.count) {
                places[i] = entry_places(low[i], high[i / kHighGroups], i);
                write(places[i], values[i]);
            }
        for (uint32_t i = kHeld; i < groups.count; ++i)  // a dense tile
            write(entry_places(read_low(groups, i), read_high(groups, i / kHighGroups), i),
                  read_values(groups, i));
        read_ahead(next);
        sync_warp();
        if (groups.count) {
            LS_UNROLL
            for (int k = 0; k < 4; ++k) {
                Words2 b[kSides];
                read_quarter<kSides>(x, words, at.tile() * kWordsOfTile, k, x_rows(linear), lane,
                                     b);
                LS_UNROLL
                for (int s = 0; s < kOperands; ++s) {
                    const Words4 a = words_at(mine + (4 * s + k) * kFragmentBytes + lane * 16);
                    LS_UNROLL
                    for (int side = 0; side < kSides; ++side)
                        mma<T>(c[s][side], a.word, b[side].word);
                }
            }
        }
        sync_warp();
        if (groups.count <= kHeld) {
            LS_UNROLL
            for (uint32_t i = 0; i < kHeld; ++i)
                if (i < groups.count) write(places[i], 0);
        } else {
            clear(kTileBytes);
        }
        sync_warp();
        if (at.last_of_row()) {
            finish_tiles<kSides, kWarps>(linear, at.row_tile, kTileBytes, c);
            clear(kOperands * kSides * 4 * kLanes * 4);
            sync_warp();
        }
        at = next_at;
        groups = next;
    }
}

constexpr TilesKernels kKernels = LS_TILES_KERNELS(tiles_kernel, kTileBytes, 16);

}  // namespace

int64_t cuda_tiles_splits(int64_t batch, int64_t in_features, const Device& device) {
    return tiles_splits(kKernels, batch, in_features, device);
}

const char* cuda_tiles_linear(const CudaTiles& p, const Device& device) {
    return tiles_launch(kKernels, p, device);
}

}  // namespace lottery_sparse
