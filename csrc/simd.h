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
#if defined(__AVX512F__)
using Vec = __m512;
constexpr int kWidth = 16;
inline Vec zero() {
    return _mm512_setzero_ps();
}
inline Vec load(const float* p) {
    return _mm512_loadu_ps(p);
}
inline void store(float* p, Vec v) {
    _mm512_storeu_ps(p, v);
}
inline Vec broadcast(float v) {
    return _mm512_set1_ps(v);
}
inline Vec add(Vec a, Vec b) {
    return _mm512_add_ps(a, b);
}
inline Vec sub(Vec a, Vec b) {
    return _mm512_sub_ps(a, b);
}
inline Vec mul(Vec a, Vec b) {
    return _mm512_mul_ps(a, b);
}
inline Vec div(Vec a, Vec b) {
    return _mm512_div_ps(a, b);
}
inline Vec sqrt(Vec a) {
    return _mm512_sqrt_ps(a);
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
#elif defined(__AVX2__)
using Vec = __m256;
constexpr int kWidth = 8;
inline Vec zero() {
    return _mm256_setzero_ps();
}
inline Vec load(const float* p) {
    return _mm256_loadu_ps(p);
}
inline void store(float* p, Vec v) {
    _mm256_storeu_ps(p, v);
}
inline Vec broadcast(float v) {
    return _mm256_set1_ps(v);
}
inline Vec add(Vec a, Vec b) {
    return _mm256_add_ps(a, b);
}
inline Vec sub(Vec a, Vec b) {
    return _mm256_sub_ps(a, b);
}
inline Vec mul(Vec a, Vec b) {
    return _mm256_mul_ps(a, b);
}
inline Vec div(Vec a, Vec b) {
    return _mm256_div_ps(a, b);
}
inline Vec sqrt(Vec a) {
    return _mm256_sqrt_ps(a);
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
#else
typedef float Vec __attribute__((vector_size(16)));
constexpr int kWidth = 4;
inline Vec zero() {
    return Vec{};
}
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
inline Vec sqrt(Vec a) {
    for (int i = 0; i < kWidth; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return a * b + c;
}
#endif

// The first `count` (0 to kWidth) elements of v.
inline void store_first(float* p, Vec v, int count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
#elif defined(__AVX2__)
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes), v);
#else
    for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// Element i of the result is the sum of v[i], added in the same order for every i.
inline Vec horizontal_sums(const Vec v[kWidth]) {
#if defined(__AVX512F__)
    Vec quad[4];  // quad[q], 128-bit lane l: partial sums of v[4q] ... v[4q + 3]
    for (int q = 0; q < 4; ++q) {
        const Vec* u = v + 4 * q;
        const Vec ab = add(_mm512_unpacklo_ps(u[0], u[1]), _mm512_unpackhi_ps(u[0], u[1]));
        const Vec cd = add(_mm512_unpacklo_ps(u[2], u[3]), _mm512_unpackhi_ps(u[2], u[3]));
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
    const Vec low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const Vec high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
#else
    Vec sums;
    for (int i = 0; i < kWidth; ++i) sums[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    return sums;
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
