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

// The upper and lower halves of a b, in place of a: products exist of every other lane only.
inline __m512i multiply_high_low(__m512i& a, __m512i b) {
    const __m512i even = _mm512_mul_epu32(a, b);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
    a = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
    return _mm512_mask_mov_epi32(odd, 0x5555, _mm512_srli_epi64(even, 32));
}

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
    const __m512i multiplier0 = _mm512_set1_epi32(static_cast<int>(kPhiloxMultiplier0));
    const __m512i multiplier1 = _mm512_set1_epi32(static_cast<int>(kPhiloxMultiplier1));
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const __m512i high0 = multiply_high_low(c0, multiplier0);
        const __m512i high1 = multiply_high_low(c2, multiplier1);
        const __m512i low0 = c0, low1 = c2;
        constexpr int kXor = 0x96;  // of three
        c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(static_cast<int>(k0)), kXor);
        c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(static_cast<int>(k1)), kXor);
        c1 = low1;
        c3 = low0;
        k0 += kPhiloxWeyl0;
        k1 += kPhiloxWeyl1;
    }
    const __m512i a = _mm512_unpacklo_epi32(c0, c1), b = _mm512_unpacklo_epi32(c2, c3);
    const __m512i c = _mm512_unpackhi_epi32(c0, c1), d = _mm512_unpackhi_epi32(c2, c3);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(a, b));
    _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(c, d));
    _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(c, d));
}

#elif defined(__AVX2__)

inline __m256i multiply_high_low(__m256i& a, __m256i b) {
    const __m256i even = _mm256_mul_epu32(a, b);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
    a = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    return _mm256_blend_epi32(odd, _mm256_srli_epi64(even, 32), 0x55);
}

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
    const __m256i multiplier0 = _mm256_set1_epi32(static_cast<int>(kPhiloxMultiplier0));
    const __m256i multiplier1 = _mm256_set1_epi32(static_cast<int>(kPhiloxMultiplier1));
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const __m256i high0 = multiply_high_low(c0, multiplier0);
        const __m256i high1 = multiply_high_low(c2, multiplier1);
        const __m256i low0 = c0, low1 = c2;
        const __m256i key0 = _mm256_set1_epi32(static_cast<int>(k0));
        const __m256i key1 = _mm256_set1_epi32(static_cast<int>(k1));
        c0 = _mm256_xor_si256(_mm256_xor_si256(high1, c1), key0);
        c2 = _mm256_xor_si256(_mm256_xor_si256(high0, c3), key1);
        c1 = low1;
        c3 = low0;
        k0 += kPhiloxWeyl0;
        k1 += kPhiloxWeyl1;
    }
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
