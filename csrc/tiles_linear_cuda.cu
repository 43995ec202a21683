// A sparse weight times few rows of x, see cuda_linear.h and tile_fragments.h.
#include "cuda_finish.h"
#include "cuda_linear.h"
#include "cuda_x.h"
#include "tile_fragments.h"

namespace lottery_sparse {
namespace {

constexpr int kHeld = 14;  // groups that a warp reads ahead: 896 of the 4096 weights of a tile
constexpr int kHeldHigh = (kHeld + kHighGroups - 1) / kHighGroups;
constexpr int kOperands = 4;                 // of 16 rows in a tile
constexpr int kWordsOfTile = kTileSide / 16;  // of x
constexpr int kManyWarps = 16, kFewWarps = 8;

// Where a tile's groups are.
struct Groups {
    const uint8_t* data;
    uint32_t count;
};

// T: the numbers of x and of the weight. kSides: operands of 8 rows of x. kWarps: of a block.
template <class T, int kSides, int kWarps>
LS_GLOBAL(kWarps* kLanes, 1) tiles_kernel(CudaTiles p) {
    const CudaLinear& linear = p.linear;
    const int lane = thread_index() % kLanes, warp = thread_index() / kLanes;
    const int64_t row_tiles = (linear.out_features + kTileSide - 1) / kTileSide;
    const int64_t column_tiles = (linear.in_features + kTileSide - 1) / kTileSide;
    const int64_t first_tile = block_y() * p.split_tiles;
    const int tiles = static_cast<int>(least(p.split_tiles, column_tiles - first_tile));
    const int steps = tiles > 0 ? (tiles + kWarps - 1) / kWarps : 1;
    const int words = tiles * kWordsOfTile;
    unsigned char* const mine = shared_memory() + warp * kTileBytes;
    unsigned char* const x = shared_memory() + kWarps * kTileBytes;
    const uint64_t policy = evict_first();

    const auto groups_of = [&](int64_t row_tile, int step) -> Groups {
        const int tile = step * kWarps + warp;
        if (row_tile >= row_tiles || tile >= tiles) return {p.data, 0};
        const uint32_t* start = p.starts + row_tile * column_tiles + first_tile + tile;
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

    int64_t row_tile = block_x();
    int step = 0;
    Groups groups = groups_of(row_tile, step);
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
    if (words > 0)
        load_x<false>(linear, first_tile * kWordsOfTile, words, x, kWarps * kLanes);
    sync_block();

    float c[kOperands][kSides][4] = {};
    while (row_tile < row_tiles) {
        const bool last = step + 1 == steps;
        const int64_t next_row = last ? row_tile + grid_x() : row_tile;
        const int next_step = last ? 0 : step + 1;
        const Groups next = groups_of(next_row, next_step);

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
            Words4 b[kSides][2];
            read_x<kSides>(x, words, (step * kWarps + warp) * kWordsOfTile, linear.batch, lane, b);
            LS_UNROLL
            for (int k = 0; k < 4; ++k)
                LS_UNROLL
                for (int s = 0; s < kOperands; ++s) {
                    const Words4 a = words_at(mine + (4 * s + k) * kFragmentBytes + lane * 16);
                    LS_UNROLL
                    for (int side = 0; side < kSides; ++side)
                        mma<T>(c[s][side], a.word, &b[side][k / 2].word[k % 2 * 2]);
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
        if (last) {
            constexpr int kSlots = kOperands * kSides * 4;
            float* sums = reinterpret_cast<float*>(mine);
            LS_UNROLL
            for (int i = 0; i < kSlots; ++i) {
                float& from = c[i / 4 / kSides][i / 4 % kSides][i % 4];
                sums[i * kLanes + lane] = from;
                from = 0.0f;
            }
            sync_block();
            for (int i = thread_index(); i < kSlots * kLanes; i += kWarps * kLanes) {
                const float* all = reinterpret_cast<const float*>(shared_memory());
                float sum = 0.0f;
                LS_UNROLL
                for (int w = 0; w < kWarps; ++w) sum += all[w * (kTileBytes / 4) + i];
                const int slot = i / kLanes, from = i % kLanes, j = slot % 4;
                const int64_t n =
                    row_tile * kTileSide + slot / 4 / kSides * 16 + from / 4 + 8 * (j / 2);
                const int64_t m = slot / 4 % kSides * kSide + from % 4 * 2 + j % 2;
                finish<T>(linear, {nullptr, Number::kFloat, false, 1.0f}, m, n, sum);
            }
            sync_block();
            clear(kSlots * kLanes * 4);
            sync_warp();
        }
        row_tile = next_row;
        step = next_step;
        groups = next;
    }
}

int warps_of(const Device& device) {
    return device.shared >= (200 << 10) ? kManyWarps : kFewWarps;
}

int64_t most_tiles(int64_t batch, const Device& device) {
    const int64_t bytes = device.shared - warps_of(device) * kTileBytes;
    return (bytes / batch - 16) / kWordBytes / kWordsOfTile;
}

template <class T, int kSides>
auto chosen(int warps) {
    return warps == kManyWarps ? tiles_kernel<T, kSides, kManyWarps>
                               : tiles_kernel<T, kSides, kFewWarps>;
}

}  // namespace

int64_t cuda_tiles_splits(int64_t batch, int64_t in_features, const Device& device) {
    const int64_t tiles = (in_features + kTileSide - 1) / kTileSide;
    const int64_t most = most_tiles(batch, device);
    return tiles ? (tiles + most - 1) / most : 1;
}

const char* cuda_tiles_linear(CudaTiles p, const Device& device) {
    const CudaLinear& linear = p.linear;
    const int64_t tiles = (linear.in_features + kTileSide - 1) / kTileSide;
    p.split_tiles = (tiles + linear.splits - 1) / linear.splits;
    const int64_t row_tiles = (linear.out_features + kTileSide - 1) / kTileSide;
    const int64_t room = device.processors / linear.splits;
    const int64_t grid = least(row_tiles, room < 1 ? 1 : room);
    const int warps = warps_of(device), words = static_cast<int>(p.split_tiles) * kWordsOfTile;
    const int shared = static_cast<int>(warps * kTileBytes + linear.batch * row_bytes(words));
    const bool two = linear.batch > kSide, half = linear.type == Number::kFloat16;
    const auto kernel = half ? (two ? chosen<Float16, 2>(warps) : chosen<Float16, 1>(warps))
                             : (two ? chosen<BFloat16, 2>(warps) : chosen<BFloat16, 1>(warps));
    const char* error =
        launch(kernel, grid, linear.splits, warps * kLanes, shared, device, p);
    return error ? error : add_splits(linear, {nullptr, Number::kFloat, false, 1.0f}, device);
}

}  // namespace lottery_sparse
