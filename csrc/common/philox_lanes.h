// Sixteen Philox blocks at a time. Internal linkage: see LS_HOST_DEVICE in bits.h.
#pragma once

#include <cstdint>

#include "common/philox.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lottery_sparse {
namespace {

constexpr int kLanes = 16;
constexpr int kLaneWords = 4 * kLanes;

#if defined(__AVX512F__)
using Words = __m512i;
inline Words every_lane(uint32_t word) {
    return _mm512_set1_epi32(static_cast<int>(word));
}
inline Words exclusive_or(Words a, Words b, Words c) {
    return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}
// The upper and lower halves of a b, in place of a: products exist of every other lane only.
inline Words multiply_high_low(Words& a, Words b) {
    const Words even = _mm512_mul_epu32(a, b);
    const Words odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
    a = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
    return _mm512_mask_mov_epi32(odd, 0x5555, _mm512_srli_epi64(even, 32));
}
#elif defined(__AVX2__)
using Words = __m256i;
inline Words every_lane(uint32_t word) {
    return _mm256_set1_epi32(static_cast<int>(word));
}
inline Words exclusive_or(Words a, Words b, Words c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
inline Words multiply_high_low(Words& a, Words b) {
    const Words even = _mm256_mul_epu32(a, b);
    const Words odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
    a = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    return _mm256_blend_epi32(odd, _mm256_srli_epi64(even, 32), 0x55);
}
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
inline void philox_rounds(const PhiloxKey& key, Words& c0, Words& c1, Words& c2, Words& c3) {
    const Words multiplier0 = every_lane(kPhiloxMultiplier0);
    const Words multiplier1 = every_lane(kPhiloxMultiplier1);
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const Words high0 = multiply_high_low(c0, multiplier0);
        const Words high1 = multiply_high_low(c2, multiplier1);
        const Words low0 = c0, low1 = c2;
        c0 = exclusive_or(high1, c1, every_lane(k0));
        c2 = exclusive_or(high0, c3, every_lane(k1));
        c1 = low1;
        c3 = low0;
        k0 += kPhiloxWeyl0;
        k1 += kPhiloxWeyl1;
    }
}
#endif

#if defined(__AVX512F__)

// out[0..kLaneWords): the words of blocks first_block ... first_block + kLanes - 1.
inline void philox_lanes(const PhiloxKey& key, uint64_t first_block, uint32_t* out) {
    // lane 4 i + j computes block 4 j + i, so that the unpacking below ends in order
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i low = _mm512_set1_epi32(static_cast<int>(first_block));
    __m512i c0 = _mm512_add_epi32(low, order);
    __m512i c1 = _mm512_set1_epi32(static_cast<int>(first_block >> 32));
    c1 = _mm512_mask_add_epi32(c1, _mm512_cmplt_epu32_mask(c0, low), c1, _mm512_set1_epi32(1));
    __m512i c2 = _mm512_set1_epi32(static_cast<int>(key.stream));
    __m512i c3 = _mm512_set1_epi32(static_cast<int>(key.step));
    philox_rounds(key, c0, c1, c2, c3);
    const __m512i a = _mm512_unpacklo_epi32(c0, c1), b = _mm512_unpacklo_epi32(c2, c3);
    const __m512i c = _mm512_unpackhi_epi32(c0, c1), d = _mm512_unpackhi_epi32(c2, c3);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(a, b));
    _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(c, d));
    _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(c, d));
}

#elif defined(__AVX2__)

// Eight blocks, as above.
inline void philox_eight(const PhiloxKey& key, uint64_t first_block, uint32_t* out) {
    uint32_t low[8], high[8];
    for (int i = 0; i < 8; ++i) {
        const uint64_t block = first_block + i;  // lane 4 l + j computes block 2 j + l
        low[i % 2 * 4 + i / 2] = static_cast<uint32_t>(block);
        high[i % 2 * 4 + i / 2] = static_cast<uint32_t>(block >> 32);
    }
    __m256i c0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
    __m256i c1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
    __m256i c2 = _mm256_set1_epi32(static_cast<int>(key.stream));
    __m256i c3 = _mm256_set1_epi32(static_cast<int>(key.step));
    philox_rounds(key, c0, c1, c2, c3);
    const __m256i a = _mm256_unpacklo_epi32(c0, c1), b = _mm256_unpacklo_epi32(c2, c3);
    const __m256i c = _mm256_unpackhi_epi32(c0, c1), d = _mm256_unpackhi_epi32(c2, c3);
    auto* words = reinterpret_cast<__m256i*>(out);
    _mm256_storeu_si256(words, _mm256_unpacklo_epi64(a, b));
    _mm256_storeu_si256(words + 1, _mm256_unpackhi_epi64(a, b));
    _mm256_storeu_si256(words + 2, _mm256_unpacklo_epi64(c, d));
    _mm256_storeu_si256(words + 3, _mm256_unpackhi_epi64(c, d));
}

inline void philox_lanes(const PhiloxKey& key, uint64_t first_block, uint32_t* out) {
    philox_eight(key, first_block, out);
    philox_eight(key, first_block + 8, out + 32);
}

#else

inline void philox_lanes(const PhiloxKey& key, uint64_t first_block, uint32_t* out) {
    for (int i = 0; i < kLanes; ++i) {
        const PhiloxBlock block = philox(key, first_block + i);
        for (int j = 0; j < 4; ++j) out[4 * i + j] = block.word[j];
    }
}

#endif

}  // namespace
}  // namespace lottery_sparse
