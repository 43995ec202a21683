// ternary_linear for few rows of x, see cuda_linear.h and ternary_fragments.h.
#include "packed/cuda_finish.h"
#include "packed/cuda_linear.h"
#include "packed/cuda_splits.h"
#include "packed/ternary_fragments.h"

namespace lottery_sparse {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlocks = 2;  // of a multiprocessor
constexpr int kLoads = 4;   // of 16 bytes that a lane has in flight, and as many in use
constexpr int kBlockRows = 16;
constexpr int kReserved = 1 << 10;  // bytes of shared memory that a block takes besides
constexpr int kSumBytes = 2 * 512;  // of a warp's sums for 8 rows of x

// Where a warp is in the row tiles of its block.
struct Cursor {
    int64_t tile;
    int batch;  // of kLoads steps
};

// T: the numbers of x. kSides: operands of 8 rows of x.
template <class T, int kSides>
LS_GLOBAL(kThreads, kBlocks)
ternary_kernel(CudaTernary p) {
    const CudaLinear& linear = p.linear;
    const int lane = thread_index() % kLanes, warp = thread_index() / kLanes;
    const int64_t all_words = (linear.in_features + 15) / 16;
    const int64_t blocks = (linear.out_features + kBlockRows - 1) / kBlockRows;
    const int64_t tiles = (linear.out_features + kTileRows - 1) / kTileRows;
    const int64_t first_word = block_y() * p.split_words;
    // what a block has fits in shared memory, and so in 32 bits
    const int words = static_cast<int>(least(p.split_words, all_words - first_word));
    const int padded = (words + kTileWords - 1) / kTileWords * kTileWords;
    const int steps = (padded / kTileWords + kWarps - 1) / kWarps;  // of this warp in a tile
    const int batches = steps ? (steps + kLoads - 1) / kLoads : 1;
    unsigned char* shared = shared_memory();
    unsigned char* x = shared + kWarps * kSides * kSumBytes;
    const uint64_t policy = evict_first();

    // This lane's 16 bytes of step s: rows ternary_row(lane, 0) to + 3, word ternary_word(lane).
    const auto read = [&](const Cursor& at, Words4 to[kLoads]) {
        const int64_t block = at.tile * (kTileRows / kBlockRows) + lane / 16;
        const uint32_t* row =
            p.codes + (block * all_words + first_word) * kBlockRows + ternary_row(lane, 0) % 16;
        LS_UNROLL
        for (int i = 0; i < kLoads; ++i) {
            const int word =
                ((at.batch * kLoads + i) * kWarps + warp) * kTileWords + ternary_word(lane);
            if (word < words && block < blocks)
                to[i] = stream(reinterpret_cast<const Words4*>(row + int64_t{word} * kBlockRows),
                               policy);
            else
                to[i] = {{kZeroCodes, kZeroCodes, kZeroCodes, kZeroCodes}};
        }
    };

    Cursor at = {block_x(), 0};
    Words4 codes[kLoads], ahead[kLoads];
    if (at.tile < tiles) read(at, codes);
    load_x<Columns::kPairs>(linear, first_word, padded, x, kThreads);
    sync_block();

    float c[2][kSides][4] = {};
    while (at.tile < tiles) {
        const bool last = at.batch + 1 == batches;
        const Cursor next = {last ? at.tile + grid_x() : at.tile, last ? 0 : at.batch + 1};
        if (next.tile < tiles) read(next, ahead);
        LS_UNROLL
        for (int i = 0; i < kLoads; ++i) {
            const int word = ((at.batch * kLoads + i) * kWarps + warp) * kTileWords;
            if (word >= padded) continue;
            Words4 b[kSides];
            LS_UNROLL
            for (int k = 0; k < 4; ++k) {  // a quarter of the 64 columns
                if (k % 2 == 0) read_pairs<kSides>(x, padded, word, k / 2, x_rows(linear), lane, b);
                LS_UNROLL
                for (int t = 0; t < 2; ++t) {
                    const uint32_t upper = codes[i].word[2 * t], lower = codes[i].word[2 * t + 1];
                    const uint32_t a[4] = {ternary_pair(upper, 2 * k), ternary_pair(lower, 2 * k),
                                           ternary_pair(upper, 2 * k + 1),
                                           ternary_pair(lower, 2 * k + 1)};
                    LS_UNROLL
                    for (int side = 0; side < kSides; ++side)
                        mma<T>(c[t][side], a, &b[side].word[k % 2 * 2]);
                }
            }
        }
        if (last) {
            finish_operands<2, kSides, kWarps>(
                linear, p.scale, kSides * kSumBytes, c, [&](int operand, int row) {
                    return at.tile * kTileRows + ternary_operand_row(operand, row);
                });
        }
        at = next;
        LS_UNROLL
        for (int i = 0; i < kLoads; ++i) codes[i] = ahead[i];
    }
}

// Bytes for the sums of the warps.
int64_t sum_bytes(int64_t batch) {
    return kWarps * (batch > kSide ? 2 : 1) * kSumBytes;
}

int64_t most_words(int64_t batch, const Device& device) {
    const int64_t bytes = device.shared / kBlocks - kReserved - sum_bytes(batch);
    return (bytes / batch - 16) / kWordBytes / kTileWords * kTileWords;
}

}  // namespace

int64_t cuda_ternary_splits(int64_t batch, int64_t in_features, const Device& device) {
    const int64_t words = (in_features + 15) / 16, most = most_words(batch, device);
    return words ? (words + most - 1) / most : 1;
}

const char* cuda_ternary_linear(CudaTernary p, const Device& device) {
    CudaLinear& linear = p.linear;
    const int64_t words = (linear.in_features + 15) / 16, rows = linear.out_features;
    const int64_t batch = x_rows(linear);
    // splits of equal size
    p.split_words = (words + linear.splits - 1) / linear.splits;
    p.split_words = (p.split_words + kTileWords - 1) / kTileWords * kTileWords;
    if (!p.split_words) p.split_words = kTileWords;
    p.scale.factor = kTernaryFactor;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const int64_t room = kBlocks * device.processors / linear.splits;
    const int64_t grid = least(tiles, room < 1 ? 1 : room);
    const int shared = static_cast<int>(
        sum_bytes(batch) + batch * row_bytes<Columns::kPairs>(static_cast<int>(p.split_words)));
    const bool two = batch > kSide, half = linear.type == Number::kFloat16;
    const auto kernel = half ? (two ? ternary_kernel<Float16, 2> : ternary_kernel<Float16, 1>)
                             : (two ? ternary_kernel<BFloat16, 2> : ternary_kernel<BFloat16, 1>);
    const char* error = launch(kernel, grid, linear.splits, kThreads, shared, device, p);
    return error ? error : add_splits(linear, p.scale, device);
}

}  // namespace lottery_sparse
