// The vector operations that kernel files share, for the instruction set a file is compiled for.
// Everything has internal linkage: see LS_HOST_DEVICE in bits.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lottery_sparse {
namespace {

// 64 mask bytes -> 64 bits, bit i = byte i is not zero (torch promises 0 or 1; views may not).
inline uint64_t kept_bits_64(const uint8_t* mask) {
#if defined(__AVX512BW__)
    const __m512i bytes = _mm512_loadu_si512(mask);
    return _mm512_test_epi8_mask(bytes, bytes);
#elif defined(__AVX2__)
    const __m256i zero = _mm256_setzero_si256();
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + 32));
    const uint32_t low_zero = _mm256_movemask_epi8(_mm256_cmpeq_epi8(low, zero));
    const uint32_t high_zero = _mm256_movemask_epi8(_mm256_cmpeq_epi8(high, zero));
    return ~(static_cast<uint64_t>(high_zero) << 32 | low_zero);
#else
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) {
        uint64_t v;
        std::memcpy(&v, mask + 8 * i, 8);
        v |= v >> 4;
        v |= v >> 2;
        v = (v | v >> 1) & 0x0101010101010101u;
        // gathers bit 8j of v into bit j of the top byte
        bits |= (v * 0x0102040810204080u >> 56) << (8 * i);
    }
    return bits;
#endif
}

// The same for the first `count` (1 to 64) bytes; the other bits are zero.
inline uint64_t kept_bits(const uint8_t* mask, int64_t count) {
    if (count >= 64) return kept_bits_64(mask);
    uint8_t padded[64] = {};
    std::memcpy(padded, mask, count);
    return kept_bits_64(padded);
}

inline int64_t count_bits(uint64_t bits) {
    return __builtin_popcountll(bits);
}

// Vec holds kWidth floats. fma(a, b, c) = a b + c, rounded once where the instruction set has it.
//
// Sums have the same order in every variant (variant_numerics). Where a sum runs in lanes, it has
// kSumLanes of them, in kSumVecs vectors.
#if defined(__AVX512F__)
using Vec = __m512;
inline Vec load(const float* p) {
    return _mm512_loadu_ps(p);
}
inline void store(float* p, Vec v) {
    _mm512_storeu_ps(p, v);
}
inline Vec broadcast(float v) {
    return _mm512_set1_ps(v);
}
inline Vec sqrt(Vec a) {
    return _mm512_sqrt_ps(a);
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
#elif defined(__AVX2__)
using Vec = __m256;
inline Vec load(const float* p) {
    return _mm256_loadu_ps(p);
}
inline void store(float* p, Vec v) {
    _mm256_storeu_ps(p, v);
}
inline Vec broadcast(float v) {
    return _mm256_set1_ps(v);
}
inline Vec sqrt(Vec a) {
    return _mm256_sqrt_ps(a);
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
#else
typedef float Vec __attribute__((vector_size(16)));
inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vec v) {
    std::memcpy(p, &v, sizeof v);
}
inline Vec broadcast(float v) {
    return Vec{v, v, v, v};
}
inline Vec sqrt(Vec a) {
    for (int i = 0; i < 4; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return a * b + c;
}
#endif
constexpr int kWidth = sizeof(Vec) / sizeof(float);
inline Vec zero() {
    return Vec{};
}
inline Vec add(Vec a, Vec b) {
    return a + b;
}
inline Vec sub(Vec a, Vec b) {
    return a - b;
}
inline Vec mul(Vec a, Vec b) {
    return a * b;
}
inline Vec div(Vec a, Vec b) {
    return a / b;
}

// The first n floats (0 to kWidth); the other lanes are 0.
inline Vec load_first(const float* p, int64_t n) {
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#elif defined(__AVX2__)
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i count = _mm256_set1_epi32(static_cast<int>(n));
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(count, lanes));
#else
    Vec v = zero();
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return v;
#endif
}

constexpr int kSumLanes = 16;
constexpr int kSumVecs = kSumLanes / kWidth;

// kSumGroup sums of kSumLanes lanes are what the registers hold; Sums holds their results.
#if defined(__AVX2__) && !defined(__AVX512F__)
using Sums = __m128;
constexpr int kSumGroup = 4;
inline void store(float* p, Sums sums) {
    _mm_storeu_ps(p, sums);
}
#else
using Sums = Vec;
constexpr int kSumGroup = kWidth;
#endif

// The first `count` (0 to kSumGroup) elements of sums.
inline void store_first(float* p, Sums sums, int count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), sums);
#else
    alignas(16) float all[kSumGroup];
    store(all, sums);
    for (int i = 0; i < count; ++i) p[i] = all[i];
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// a0 + a2, a1 + a3, b0 + b2, b1 + b3 of each half.
inline Vec add_pairs(Vec a, Vec b) {
    return add(_mm256_blend_ps(a, b, 0xCC), _mm256_shuffle_ps(a, b, 0x4E));
}
// The lower half of lanes (first + second) of four sums, or the upper half.
inline __m128 half_sums(Vec a, Vec b, Vec c, Vec d) {
    const Vec quarters = _mm256_hadd_ps(add_pairs(a, b), add_pairs(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1));
}
#endif

// Element i of the result is the sum of the kSumLanes lanes of v[i]: quarters a of it first, by
// (a0 + a2) + (a1 + a3), then (first + second) + (third + fourth).
inline Sums horizontal_sums(const Vec (&v)[kSumGroup][kSumVecs]) {
#if defined(__AVX512F__)
    Vec quad[4];  // quad[q], 128-bit lane l: partial sums of v[4q] ... v[4q + 3]
    for (int q = 0; q < 4; ++q) {
        const Vec(*u)[1] = v + 4 * q;
        const Vec ab =
            add(_mm512_unpacklo_ps(u[0][0], u[1][0]), _mm512_unpackhi_ps(u[0][0], u[1][0]));
        const Vec cd =
            add(_mm512_unpacklo_ps(u[2][0], u[3][0]), _mm512_unpackhi_ps(u[2][0], u[3][0]));
        const __m512d ab_pairs = _mm512_castps_pd(ab), cd_pairs = _mm512_castps_pd(cd);
        quad[q] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab_pairs, cd_pairs)),
                      _mm512_castpd_ps(_mm512_unpackhi_pd(ab_pairs, cd_pairs)));
    }
    const Vec low = add(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88),
                        _mm512_shuffle_f32x4(quad[0], quad[1], 0xDD));
    const Vec high = add(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88),
                         _mm512_shuffle_f32x4(quad[2], quad[3], 0xDD));
    return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
#elif defined(__AVX2__)
    return _mm_add_ps(half_sums(v[0][0], v[1][0], v[2][0], v[3][0]),
                      half_sums(v[0][1], v[1][1], v[2][1], v[3][1]));
#else
    Sums sums;
    for (int i = 0; i < kSumGroup; ++i) {
        float quarter[kSumVecs];
        for (int q = 0; q < kSumVecs; ++q)
            quarter[q] = (v[i][q][0] + v[i][q][2]) + (v[i][q][1] + v[i][q][3]);
        sums[i] = (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
    }
    return sums;
#endif
}

// The sum of kSumLanes lanes by halves: lane i and i + 8, then i + 4, i + 2, i + 1.
inline float halved_sum(const Vec (&v)[kSumVecs]) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m256 eight =
        _mm256_add_ps(_mm512_castps512_ps256(v[0]), _mm512_extractf32x8_ps(v[0], 1));
#else
    const __m256 eight = add(v[0], v[1]);
#endif
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    const Vec four = add(add(v[0], v[2]), add(v[1], v[3]));
    return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}

// target[c][r] = source[r][c] for 8 rows and 8 columns; strides in floats.
inline void transpose_8x8(const float* source, int64_t source_stride, float* target,
                          int64_t target_stride) {
#if defined(__AVX2__)
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(source + i * source_stride);
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(target + i * target_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(target + (i + 4) * target_stride,
                         _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
#else
    for (int r = 0; r < 8; ++r)
        for (int c = 0; c < 8; ++c) target[c * target_stride + r] = source[r * source_stride + c];
#endif
}

}  // namespace
}  // namespace lottery_sparse
