// The passes over chunks. Each works in blocks of 64 entries: straight loops that the compiler
// vectorises, then a loop over the few candidate bits.
#include "common/philox_lanes.h"
#include "common/simd.h"
#include "masks/keep_top.h"

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
    while (candidates && stored < capacity) {
        const int i = __builtin_ctzll(candidates);
        out[stored++] = {values[i], static_cast<uint32_t>(first + i)};
        candidates &= candidates - 1;
    }
    stored += count_bits(candidates);  // those that found no room
}

// Bit i says something about entry i of a block.
struct Split {
    uint64_t above;
    uint64_t inside;
    uint64_t nan;
};

// Splits entries [first, first + kBlock) of a chunk by low and high; writes their keys and out.
inline Split split_block(const KeepTopChunk& chunk, int64_t first, uint32_t low, uint32_t high,
                         uint32_t key[kBlock]) {
    Split split = {0, 0, 0};
#if defined(__AVX512BW__)
    if (chunk.size - first >= kBlock) {  // the same as below in a quarter of the time
        const __m512i sign = _mm512_set1_epi32(static_cast<int>(kSignBit));
        const __m512i infinity = _mm512_set1_epi32(kInfinity);
        const __m512i lows = _mm512_set1_epi32(static_cast<int>(low));
        const __m512i highs = _mm512_set1_epi32(static_cast<int>(high));
        const uint64_t kept = kept_bits_64(chunk.mask + first);
        for (int i = 0; i < kBlock; i += 16) {
            const __mmask16 k = static_cast<__mmask16>(kept >> i);
            __m512i bits = _mm512_loadu_si512(chunk.scores + first + i);
            bits = _mm512_maskz_mov_epi32(_mm512_cmpneq_epi32_mask(bits, sign), bits);
            const __m512i magnitude = _mm512_andnot_si512(sign, bits);
            const __m512i keys =
                _mm512_xor_si512(bits, _mm512_or_si512(_mm512_srai_epi32(bits, 31), sign));
            _mm512_storeu_si512(key + i, keys);
            const uint64_t nan = _mm512_mask_cmpgt_epu32_mask(k, magnitude, infinity);
            const uint64_t above = _mm512_mask_cmpgt_epu32_mask(k, keys, highs);
            const uint64_t inside = _mm512_mask_cmpge_epu32_mask(k, keys, lows) & ~above;
            split.nan |= nan << i;
            split.above |= above << i;
            split.inside |= inside << i;
        }
        _mm512_storeu_si512(chunk.out + first, _mm512_maskz_set1_epi8(split.above, 1));
        return split;
    }
#endif
    Block block;
    load_block(chunk, first, block);
    alignas(64) uint8_t above[kBlock], inside[kBlock];
    for (int i = 0; i < kBlock; ++i) {
        key[i] = block.key[i];
        above[i] = block.kept[i] & (key[i] > high);
        inside[i] = block.kept[i] & (key[i] >= low) & (key[i] <= high);
    }
    const int64_t n = chunk.size - first < kBlock ? chunk.size - first : kBlock;
    std::memcpy(chunk.out + first, above, n);
    split = {kept_bits_64(above), kept_bits_64(inside), block.nan};
    return split;
}

KeepTopFound split_scores(const KeepTopChunk& chunk, uint32_t low, uint32_t high,
                          KeepTopCandidate* candidates, int64_t capacity) {
    KeepTopFound found = {0, 0, false};
    alignas(64) uint32_t key[kBlock];
    for (int64_t first = 0; first < chunk.size; first += kBlock) {
        const Split split = split_block(chunk, first, low, high, key);
        found.nan |= split.nan != 0;
        found.above += count_bits(split.above);
        append(split.inside, key, first, candidates, capacity, found.inside);
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
