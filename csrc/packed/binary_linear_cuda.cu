// binary_linear and seeded_linear for few rows of x, see cuda_linear.h and binary_fragments.h.
#include "packed/binary_fragments.h"
#include "packed/cuda_finish.h"
#include "packed/cuda_linear.h"
#include "packed/cuda_splits.h"

namespace lottery_sparse {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlocks = 2;  // of a multiprocessor
constexpr int kLoads = 4;   // of 16 bytes, 8 rows apart, that a lane has in flight
constexpr int kOperands = kStepRows / 16;
constexpr int kReserved = 1 << 10;             // bytes of shared memory that a block takes besides
constexpr int kSumBytes = kOperands * 512;     // of a warp's sums for 8 rows of x
constexpr int kChunks = kPairs / 4;            // of 4 pairs of a word of 32 columns
constexpr int kChunkBytes = kStepPieces * 16;  // what 4 lanes read at once
constexpr int kStepBytes = kPieceWords * kChunks * kChunkBytes;

// What the bits are: signs, or the mask of signs that are drawn; whose rows are whole blocks.
enum class Bits { kSigns, kMask, kMaskOfBlocks };

// Of a row of x in shared memory: two rows at once are in all banks.
LS_HOST_DEVICE int x_row_bytes(int pieces) {
    return pieces / kStepPieces * kStepBytes + 64;
}

// This block's columns of x -> shared memory, zeros beyond K: [step][word][chunk][piece], 4 pairs.
LS_DEVICE void load_steps(const CudaLinear& p, int64_t first_piece, int pieces,
                          unsigned char* shared) {
    const bool aligned = x_aligned(p);
    const int words = pieces * kPieceWords;
    LS_ROLLED
    for (int i = thread_index(); i < words * static_cast<int>(x_rows(p)); i += kThreads) {
        const int row = i / words, word = i % words, piece = word / kPieceWords;
        const int64_t column = (first_piece * kPieceWords + word) * kWordBits;
        uint32_t low[8], high[8];
        read_columns(p, row, column, aligned, low);
        read_columns(p, row, column + 16, aligned, high);
        unsigned char* out = shared + row * x_row_bytes(pieces) + piece / kStepPieces * kStepBytes +
                             word % kPieceWords * kChunks * kChunkBytes + piece % kStepPieces * 16;
        LS_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            Words4 pairs;
            LS_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int at = binary_column(4 * chunk + i, 0);
                pairs.word[i] = permute_bytes(low[at / 2], high[at / 2], at % 2 ? 0x7632 : 0x5410);
            }
            *reinterpret_cast<Words4*>(out + chunk * kChunkBytes) = pairs;
        }
    }
}

// The signs of a lane's pieces: `piece` of row `row` and of every eighth row from there.
template <Bits kBits>
LS_DEVICE void draw(const PhiloxKey& key, int64_t row, int64_t piece, int64_t in_features,
                    uint32_t signs[kLoads][kPieceWords]) {
    uint64_t block[kLoads];
    PhiloxBlock drawn[kLoads];
    if (kBits == Bits::kMaskOfBlocks) {
        const int64_t pieces = in_features / kPieceColumns;
        LS_UNROLL
        for (int i = 0; i < kLoads; ++i)
            block[i] = static_cast<uint64_t>(row * pieces + piece + i * 8 * pieces);
        philox_blocks<kLoads>(key, block, drawn);
        LS_UNROLL
        for (int i = 0; i < kLoads; ++i) LS_UNROLL
        for (int j = 0; j < kPieceWords; ++j) signs[i][j] = drawn[i].word[j];
    } else {
        PhiloxBlock next[kLoads];
        const int64_t first = row * in_features + piece * kPieceColumns;
        LS_UNROLL
        for (int i = 0; i < kLoads; ++i)
            block[i] = static_cast<uint64_t>(first + i * 8 * in_features) / kPieceColumns;
        philox_blocks<kLoads>(key, block, drawn);
        LS_UNROLL
        for (int i = 0; i < kLoads; ++i) ++block[i];
        philox_blocks<kLoads>(key, block, next);
        LS_UNROLL
        for (int i = 0; i < kLoads; ++i)
            shifted_signs(drawn[i], next[i], first + i * 8 * in_features, signs[i]);
    }
}

// T: the numbers of x. kSides: operands of 8 rows of x.
template <class T, int kSides, Bits kBits>
LS_GLOBAL(kThreads, kBlocks)
binary_kernel(CudaBinary p) {
    const CudaLinear& linear = p.linear;
    const int lane = thread_index() % kLanes, warp = thread_index() / kLanes;
    const int64_t all_pieces = packed_words(linear.in_features) / kPieceWords;
    const int tiles = static_cast<int>((linear.out_features + kStepRows - 1) / kStepRows);
    const int64_t first_piece = block_y() * p.split_pieces;
    // what a block has fits in shared memory, and so in 32 bits
    const int pieces = static_cast<int>(least(p.split_pieces, all_pieces - first_piece));
    const int padded = (pieces + kStepPieces - 1) / kStepPieces * kStepPieces;
    const int all_steps = padded / kStepPieces;
    const int steps = all_steps ? (all_steps + kWarps - 1) / kWarps : 1;  // of a warp in a tile
    unsigned char* const x = shared_memory() + kWarps * kSides * kSumBytes;
    const uint64_t policy = evict_first();
    const Words4* const mine = reinterpret_cast<const Words4*>(p.bits) +
                               binary_row(lane, 0) * all_pieces + first_piece + lane % 4;
    PhiloxKey key = {};
    if (kBits != Bits::kSigns)
        key = {static_cast<uint64_t>(p.key[0]), static_cast<uint32_t>(p.key[1]),
               static_cast<uint32_t>(p.key[2])};

    // This lane's piece of step `step`, of kLoads rows. What is not there stays what it was: x is 0
    // beyond K, and sums for rows that are not there are not used.
    const auto read = [&](int tile, int step, Words4 to[kLoads]) {
        const int piece = (step * kWarps + warp) * kStepPieces;
        const int64_t first = int64_t{tile} * kStepRows;
        const int rows = static_cast<int>(least(linear.out_features - first, kStepRows));
        const Words4* from = mine + first * all_pieces + piece;
        LS_UNROLL
        for (int i = 0; i < kLoads; ++i)
            if (piece + lane % 4 < pieces && binary_row(lane, i) < rows)
                to[i] = stream(from + i * 8 * all_pieces, policy);
    };
    // 4 pairs of this lane's columns and, for each side, its row of x.
    const unsigned char* of_x[kSides];
    LS_UNROLL
    for (int side = 0; side < kSides; ++side) {
        const int row = side * kSide + lane / 4, rows = static_cast<int>(x_rows(linear));
        // sums for rows that are not there are not used
        of_x[side] = x + (row < rows ? row : rows - 1) * x_row_bytes(padded) + lane % 4 * 16;
    }
    const auto read_chunk = [&](int step, int word, int chunk, Words4 b[kSides]) {
        LS_UNROLL
        for (int side = 0; side < kSides; ++side)
            b[side] =
                words_at(of_x[side] + step * kStepBytes + (word * kChunks + chunk) * kChunkBytes);
    };

    int tile = block_x(), step = 0;
    Words4 bits[kLoads] = {}, ahead[kLoads] = {};
    if (tile < tiles) read(tile, step, bits);
    load_steps(linear, first_piece, padded, x);
    sync_block();

    float begin[1][kSides][4] = {};  // what a sum begins with
    if (kBits == Bits::kSigns) {
        const uint32_t excess = binary_excess(T::kOneTwice), a[4] = {0, 0, excess, excess};
        LS_ROLLED
        for (int at = warp; at < all_steps; at += kWarps) LS_ROLLED
        for (int i = 0; i < kPieceWords * kChunks; ++i) {
            Words4 b[kSides];
            read_chunk(at, i / kChunks, i % kChunks, b);
            LS_UNROLL
            for (int k = 0; k < 2; ++k) LS_UNROLL
            for (int side = 0; side < kSides; ++side)
                mma<T>(begin[0][side], a, &b[side].word[2 * k]);
        }
    }

    float c[kOperands][kSides][4];
    while (tile < tiles) {
        if (step == 0) {
            LS_UNROLL
            for (int i = 0; i < kOperands * kSides * 4; ++i)
                c[i / 4 / kSides][i / 4 % kSides][i % 4] = begin[0][i / 4 % kSides][i % 2];
        }
        const bool last = step + 1 == steps;
        const int next_tile = last ? tile + grid_x() : tile, next_step = last ? 0 : step + 1;
        if (next_tile < tiles) read(next_tile, next_step, ahead);
        const int at = step * kWarps + warp;
        if (at < all_steps) {
            uint32_t signs[kLoads][kPieceWords];
            if (kBits != Bits::kSigns) {
                const int64_t row = int64_t{tile} * kStepRows + binary_row(lane, 0);
                const int64_t piece = first_piece + at * kStepPieces + lane % 4;
                draw<kBits>(key, row, piece, linear.in_features, signs);
            }
            LS_UNROLL
            for (int j = 0; j < kPieceWords; ++j) {
                uint32_t pairs[kLoads][2];  // words of even and of odd pairs
                LS_UNROLL
                for (int i = 0; i < kLoads; ++i) {
                    if (kBits == Bits::kSigns)
                        pairs[i][0] = pairs[i][1] = bits[i].word[j];
                    else
                        join_signs(bits[i].word[j], signs[i][j], pairs[i]);
                }
                const auto pair = [&](int load, int i) {
                    return kBits == Bits::kSigns ? binary_pair(pairs[load][0], i, T::kOneTwice)
                                                 : joined_pair(pairs[load][i % 2], i);
                };
                LS_UNROLL
                for (int chunk = 0; chunk < kChunks; ++chunk) {
                    Words4 b[kSides];
                    read_chunk(at, j, chunk, b);
                    LS_UNROLL
                    for (int k = 0; k < 2; ++k) LS_UNROLL
                    for (int t = 0; t < kOperands; ++t) {
                        const int i = 4 * chunk + 2 * k;
                        const uint32_t a[4] = {pair(2 * t, i), pair(2 * t + 1, i),
                                               pair(2 * t, i + 1), pair(2 * t + 1, i + 1)};
                        LS_UNROLL
                        for (int side = 0; side < kSides; ++side)
                            mma<T>(c[t][side], a, &b[side].word[2 * k]);
                    }
                }
            }
        }
        if (last)
            finish_operands<kOperands, kSides, kWarps>(
                linear, p.scale, kSides * kSumBytes, c, [&](int operand, int row) {
                    return int64_t{tile} * kStepRows + operand * 16 + row;
                });
        tile = next_tile, step = next_step;
        LS_UNROLL
        for (int i = 0; i < kLoads; ++i) bits[i] = ahead[i];
    }
}

// Bytes for the sums of the warps.
int64_t sum_bytes(int64_t rows) {
    return kWarps * (rows > kSide ? 2 : 1) * kSumBytes;
}

using Kernel = void (*)(CudaBinary);

template <class T, int kSides>
Kernel chosen(const CudaBinary& p) {
    return !p.key                                 ? binary_kernel<T, kSides, Bits::kSigns>
           : p.linear.in_features % kPieceColumns ? binary_kernel<T, kSides, Bits::kMask>
                                                  : binary_kernel<T, kSides, Bits::kMaskOfBlocks>;
}

}  // namespace

int64_t cuda_binary_splits(int64_t rows, int64_t in_features, const Device& device) {
    const int64_t steps =
        (in_features + kStepPieces * kPieceColumns - 1) / (kStepPieces * kPieceColumns);
    const int64_t bytes = device.shared / kBlocks - kReserved - sum_bytes(rows);
    const int64_t most = (bytes / rows - 64) / kStepBytes;
    return steps ? (steps + most - 1) / most : 1;
}

const char* cuda_binary_linear(CudaBinary p, const Device& device) {
    CudaLinear& linear = p.linear;
    const int64_t rows = x_rows(linear);
    const int64_t steps =
        (linear.in_features + kStepPieces * kPieceColumns - 1) / (kStepPieces * kPieceColumns);
    p.split_pieces = (steps + linear.splits - 1) / linear.splits * kStepPieces;
    if (!p.split_pieces) p.split_pieces = kStepPieces;
    p.scale.factor = p.key ? kJoinedFactor : 1.0f;
    const int64_t tiles = (linear.out_features + kStepRows - 1) / kStepRows;
    const int64_t room = kBlocks * device.processors / linear.splits;
    const int shared =
        static_cast<int>(sum_bytes(rows) + rows * x_row_bytes(static_cast<int>(p.split_pieces)));
    const bool two = rows > kSide;
    const Kernel kernel = linear.type == Number::kFloat16
                              ? (two ? chosen<Float16, 2>(p) : chosen<Float16, 1>(p))
                              : (two ? chosen<BFloat16, 2>(p) : chosen<BFloat16, 1>(p));
    const char* error = launch(kernel, least(tiles, room < 1 ? 1 : room), linear.splits, kThreads,
                               shared, device, p);
    return error ? error : add_splits(linear, p.scale, device);
}

}  // namespace lottery_sparse
