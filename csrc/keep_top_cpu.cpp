// The passes over chunks. Each works in blocks of 64 entries: straight loops that the compiler
// vectorises, then a loop over the few candidate bits.
#include "keep_top.h"
#include "philox_lanes.h"
#include "simd.h"

namespace lottery_sparse {
namespace {

constexpr int kBlock = 64;
constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kInfinity = 0x7F800000u;

inline uint32_t float_bits(float score) {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    return bits;
}

// Grows with the score; -0.0 and 0.0 give the same key.
inline uint32_t ordered_bits(uint32_t bits) {
    bits = bits == kSignBit ? 0 : bits;
    return bits & kSignBit ? ~bits : bits | kSignBit;
}

uint32_t ordered_key(float score) {
    return ordered_bits(float_bits(score));
}

struct Block {
    alignas(64) uint32_t key[kBlock];
    alignas(64) uint8_t kept[kBlock];
    uint64_t nan;
};

// Loads entries [first, first + kBlock) of a chunk; entries beyond its end are not kept.
inline void load_block(const KeepTopChunk& chunk, int64_t first, Block& block) {
    const int64_t n = chunk.size - first < kBlock ? chunk.size - first : kBlock;
    alignas(64) uint32_t bits[kBlock];
    if (n == kBlock) {
        std::memcpy(bits, chunk.scores + first, sizeof bits);
        std::memcpy(block.kept, chunk.mask + first, kBlock);
    } else {
        std::memset(bits, 0, sizeof bits);
        std::memset(block.kept, 0, kBlock);
        std::memcpy(bits, chunk.scores + first, n * sizeof(uint32_t));
        std::memcpy(block.kept, chunk.mask + first, n);
    }
    alignas(64) uint8_t nan[kBlock];
    for (int i = 0; i < kBlock; ++i) {
        block.kept[i] = block.kept[i] != 0;
        nan[i] = block.kept[i] & ((bits[i] & ~kSignBit) > kInfinity);
        block.key[i] = ordered_bits(bits[i]);
    }
    block.nan = kept_bits_64(nan);
}

inline void append(uint64_t candidates, const uint32_t* values, int64_t first,
                   KeepTopCandidate* out, int64_t capacity, int64_t& stored) {
    while (candidates) {
        const int i = __builtin_ctzll(candidates);
        if (stored < capacity) out[stored] = {values[i], static_cast<uint32_t>(first + i)};
        ++stored;
        candidates &= candidates - 1;
    }
}

KeepTopFound split_scores(const KeepTopChunk& chunk, uint32_t low, uint32_t high,
                          KeepTopCandidate* candidates, int64_t capacity) {
    KeepTopFound found = {0, 0, false};
    Block block;
    alignas(64) uint8_t above[kBlock], inside[kBlock];
    for (int64_t first = 0; first < chunk.size; first += kBlock) {
        load_block(chunk, first, block);
        for (int i = 0; i < kBlock; ++i) {
            above[i] = block.kept[i] & (block.key[i] > high);
            inside[i] = block.kept[i] & (block.key[i] >= low) & (block.key[i] <= high);
        }
        const int64_t n = chunk.size - first < kBlock ? chunk.size - first : kBlock;
        std::memcpy(chunk.out + first, above, n);
        found.nan |= block.nan != 0;
        found.above += count_bits(kept_bits_64(above));
        append(kept_bits_64(inside), block.key, first, candidates, capacity, found.inside);
    }
    return found;
}

KeepTopFound split_ties(const KeepTopChunk& chunk, uint32_t tie, uint32_t low, uint32_t high,
                        KeepTopCandidate* candidates, int64_t capacity) {
    KeepTopFound found = {0, 0, false};
    Block block;
    alignas(64) uint8_t tied[kBlock], above[kBlock], inside[kBlock];
    alignas(64) uint32_t words[kLaneWords];
    static_assert(kLaneWords == kBlock, "one draw gives the words of one block");
    for (int64_t first = 0; first < chunk.size; first += kBlock) {
        load_block(chunk, first, block);
        for (int i = 0; i < kBlock; ++i) tied[i] = block.kept[i] & (block.key[i] == tie);
        if (kept_bits_64(tied) == 0) continue;
        philox_lanes(chunk.ties, static_cast<uint64_t>(chunk.begin + first) / 4, words);
        for (int i = 0; i < kBlock; ++i) {
            above[i] = tied[i] & (words[i] > high);
            inside[i] = tied[i] & (words[i] >= low) & (words[i] <= high);
        }
        const int64_t n = chunk.size - first < kBlock ? chunk.size - first : kBlock;
        for (int64_t i = 0; i < n; ++i)
            if (tied[i]) chunk.out[first + i] = above[i];
        found.above += count_bits(kept_bits_64(above));
        append(kept_bits_64(inside), words, first, candidates, capacity, found.inside);
    }
    return found;
}

void histogram(const KeepTopChunk& chunk, int shift, uint32_t prefix,
               uint32_t counts[kRadixBuckets]) {
    // Four tables in turn: runs of equal scores would otherwise wait for their own last increment.
    constexpr int kTables = 4;
    static_assert(kBlock % kTables == 0, "tables take turns within a block");
    uint32_t tables[kTables][kRadixBuckets] = {};
    Block block;
    for (int64_t first = 0; first < chunk.size; first += kBlock) {
        load_block(chunk, first, block);
        for (int i = 0; i < kBlock; ++i) {
            const uint64_t key = block.key[i];
            const uint32_t counted = block.kept[i] & (key >> (shift + kRadixBits) == prefix);
            tables[i % kTables][(key >> shift) & (kRadixBuckets - 1)] += counted;
        }
    }
    for (const auto& table : tables)
        for (int64_t b = 0; b < kRadixBuckets; ++b) counts[b] += table[b];
}

}  // namespace

const KeepTopKernels LS_KERNELS(keep_top_kernels) = {split_scores, split_ties, histogram,
                                                     ordered_key};

}  // namespace lottery_sparse
