// A sparse weight times few rows of x: its mask says where the values of operands are, see
// bitmap_fragments.h.
#include "packed/bitmap_fragments.h"
#include "packed/cuda_tiles.h"

namespace lottery_sparse {
namespace {

constexpr int kHeld = 9;  // times 512 bytes of values that a warp reads ahead: 2304 weights
constexpr int kTableBytes = kBitmapWords * 8;
constexpr int kWarpBytes = kTileBytes + kTableBytes;

// A tile's bits, and its values in units of 16 bytes.
struct Tile {
    const uint8_t* data;
    uint32_t units;
    bool here;
};

// T: the numbers of x and of the weight. kSides: operands of 8 rows of x. kWarps: of a block.
template <class T, int kSides, int kWarps>
LS_GLOBAL(kWarps* kLanes, 1)
bitmap_kernel(CudaTiles p) {
    const CudaLinear& linear = p.linear;
    const int lane = thread_index() % kLanes;
    const int mine_at = thread_index() / kLanes * kWarpBytes;
    unsigned char* const mine = shared_memory() + mine_at;
    unsigned char* const x = shared_memory() + kWarps * kWarpBytes;
    uint32_t* const table = reinterpret_cast<uint32_t*>(mine + kTileBytes);
    const uint64_t policy = evict_first();

    const auto tile_of = [&](const TileWalk<kWarps>& at) -> Tile {
        const uint32_t* start = at.start(p);
        if (!start || start[0] == start[1]) return {p.data, 0, false};
        return {p.data + int64_t{start[0]} * kBitmapUnit,
                start[1] - start[0] - kBitmapBytes / kBitmapUnit, true};
    };
    const auto read_values = [&](const Tile& tile, uint32_t i) {
        return stream(reinterpret_cast<const Words4*>(tile.data + kBitmapBytes) + i, policy);
    };

    TileWalk<kWarps> at(p);
    const int words = at.tiles * kWordsOfTile;
    Tile tile = tile_of(at);
    Words4 bits = {}, values[kHeld];
    const auto read_ahead = [&](const Tile& t) {
        if (t.here) bits = stream(reinterpret_cast<const Words4*>(t.data) + lane, policy);
        LS_UNROLL
        for (int i = 0; i < kHeld; ++i) {
            const uint32_t unit = i * kLanes + lane;
            if (unit < t.units) values[i] = read_values(t, unit);
        }
    };
    read_ahead(tile);
    load_x<Columns::kQuarters>(linear, int64_t{at.first_tile} * kWordsOfTile, words, x,
                               kWarps * kLanes);
    sync_block();

    // this lane's two bits of a word, and those before
    const uint32_t first = 1u << (lane % 16 * 2), second = first << 1, before = first - 1;
    // This lane's two weights of a register: its word of bits, and where that word's values are.
    const auto operand = [&](uint32_t word, uint32_t values_at) -> uint32_t {
        const unsigned char* from = shared_memory() + values_at + count_ones(word & before) * 2;
        uint32_t low = 0, high = 0;
        if (word & first) {
            low = *reinterpret_cast<const uint16_t*>(from);
            from += 2;
        }
        if (word & second) high = *reinterpret_cast<const uint16_t*>(from);
        return high * 65536 + low;  // one instruction, of the multipliers
    };
    float c[kOperands][kSides][4] = {};
    while (!at.done()) {
        TileWalk<kWarps> next_at = at;
        next_at.advance();
        const Tile next = tile_of(next_at);
        // Values go by register and then by word, bits by word and then by register: lane l has
        // words 4 (l % 16) to + 3 of half l / 16. Ones of both halves, of this and earlier lanes:
        uint32_t ones[4], sum = 0;
        LS_UNROLL
        for (int i = 0; i < 4; ++i) {
            ones[i] = count_ones(bits.word[i]);
            sum += ones[i];
        }
        const uint32_t both = sum + from_lane(sum, lane ^ 16);
        uint32_t running = both;
        LS_UNROLL
        for (int step = 1; step < 16; step *= 2) {
            const uint32_t other = from_lane(running, lane % 16 >= step ? lane - step : lane);
            if (lane % 16 >= step) running += other;
        }
        running -= both;
        LS_UNROLL
        for (int i = 0; i < 4; ++i) {
            const uint32_t other = from_lane(ones[i], lane ^ 16);
            table[(4 * lane + i) * 2] = bits.word[i];
            table[(4 * lane + i) * 2 + 1] = mine_at + (running + (lane < 16 ? 0 : other)) * 2;
            running += ones[i] + other;
        }
        Words4* const stored = reinterpret_cast<Words4*>(mine);
        LS_UNROLL
        for (int i = 0; i < kHeld; ++i) {
            const uint32_t unit = i * kLanes + lane;
            if (unit < tile.units) stored[unit] = values[i];
        }
        LS_ROLLED
        for (uint32_t unit = kHeld * kLanes + lane; unit < tile.units; unit += kLanes)
            stored[unit] = read_values(tile, unit);  // a dense tile

        read_ahead(next);
        sync_warp();
        if (tile.here) {
            const Words4* const pairs =
                reinterpret_cast<const Words4*>(table + lane / 16 * kBitmapRegisters * 2);
            LS_ROLLED
            for (int k = 0; k < 4; ++k) {
                Words2 b[kSides];
                read_quarter<kSides>(x, words, at.tile() * kWordsOfTile, k, x_rows(linear), lane,
                                     b);
                LS_UNROLL
                for (int s = 0; s < kOperands; ++s) {
                    uint32_t a[4];
                    LS_UNROLL
                    for (int r = 0; r < 4; ++r) {
                        const Words4 pair = pairs[(4 * s + k) * 2 + r / 2];
                        a[r] = operand(pair.word[r % 2 * 2], pair.word[r % 2 * 2 + 1]);
                    }
                    LS_UNROLL
                    for (int side = 0; side < kSides; ++side) mma<T>(c[s][side], a, b[side].word);
                }
            }
        }
        sync_warp();
        if (at.last_of_row()) {
            finish_tiles<kSides, kWarps>(linear, at.row_tile, kWarpBytes, c);
            sync_warp();
        }
        at = next_at;
        tile = next;
    }
}

constexpr TilesKernels kKernels = LS_TILES_KERNELS(bitmap_kernel, kWarpBytes, 12);

}  // namespace

int64_t cuda_bitmap_splits(int64_t batch, int64_t in_features, const Device& device) {
    return tiles_splits(kKernels, batch, in_features, device);
}

const char* cuda_bitmap_linear(const CudaTiles& p, const Device& device) {
    return tiles_launch(kKernels, p, device);
}

}  // namespace lottery_sparse
