#include <cstring>
#include <type_traits>

#include "common/simd.h"
#include "packed/ternary_block.h"

namespace lottery_sparse {
namespace {

// Calls f(constant) with the width of a tile.
template <class F>
void with_width(int64_t width, const F& f) {
    switch (width) {
        case 1:
            return f(std::integral_constant<int, 1>());
        case 2:
            return f(std::integral_constant<int, 2>());
        case 4:
            return f(std::integral_constant<int, 4>());
        case 8:
            return f(std::integral_constant<int, 8>());
        default:
            return f(std::integral_constant<int, 16>());
    }
}

// Blocks whose sums the registers hold together.
template <int kWidthX>
constexpr int kAtOnce = kWidthX <= 4 ? 4 : 16 / kWidthX;

// Calls f(constant number of blocks, first block): kMost at a time, the rest one by one.
template <int kMost, class F>
void for_blocks(int64_t begin, int64_t end, const F& f) {
    int64_t block = begin;
    for (; block + kMost <= end; block += kMost) f(std::integral_constant<int, kMost>(), block);
    for (; block < end; ++block) f(std::integral_constant<int, 1>(), block);
}

// ---- int8 activations ---------------------------------------------------------------------------

// A row that holds NaN or Inf becomes NaN as a whole: it has no largest magnitude to scale by.
void quantise(const float* x, int64_t in_features, int64_t words, int64_t width, uint32_t* column,
              float* scale, int32_t* sum) {
    uint32_t most = 0;  // bits of non-negative floats are ordered like the floats, Inf < NaN
    for (int64_t k = 0; x && k < in_features; ++k) {
        uint32_t bits;
        std::memcpy(&bits, x + k, sizeof bits);
        bits &= 0x7FFFFFFFu;
        most = bits > most ? bits : most;
    }
    const bool finite = most < 0x7F800000u;
    float largest;
    std::memcpy(&largest, &most, sizeof largest);
    // below this 127 / largest would overflow, and every product with it is 0 beside any bias
    const bool zero_row = !(largest > 1e-36f);
    const float factor = finite && !zero_row ? 127.0f / largest : 0.0f;
    *scale = finite ? (zero_row ? 0.0f : largest / 127.0f) : __builtin_nanf("");
    int32_t total = 0;
    for (int64_t w = 0; w < 4 * words; ++w) {
        int8_t q[4] = {};
        for (int64_t b = 0; b < 4; ++b) {
            const int64_t k = 4 * w + b;
            if (factor == 0.0f || k >= in_features) continue;
            // adding 1.5 * 2^23 rounds to the nearest integer, ties to even, without a call
            q[b] = static_cast<int8_t>((x[k] * factor + 12582912.0f) - 12582912.0f);
            total += q[b];
        }
        std::memcpy(column + w * width, q, sizeof q);
    }
    *sum = total;
}

inline void finish_int8(const TernaryTileX& p, const int32_t* sums, int64_t block, int64_t m) {
    if (m >= p.batch) return;
    alignas(64) float exact[kRows];
    for (int i = 0; i < kRows; ++i)
        exact[i] = static_cast<float>(sums[i] - p.x_sum[m]) * p.x_scale[m];
    finish(exact, p.scale, p.scale_by_row, p.bias, block, p.out_features, p.y + m * p.out_features);
}

#if defined(__AVX512BW__)

#define LS_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

// One row of x. The codes stay where they are in their bytes, so slot j sums 4^j of what it should;
// the four sums are divided at the end, exactly.
template <int kBlocks>
LS_VNNI void multiply_vnni_one(const TernaryTileX& p, int64_t block) {
    __m512i sum[kBlocks][4];
    for (int r = 0; r < kBlocks; ++r)
        for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_si512();
    const uint32_t* codes = p.codes + block * p.words * kRows;
    const int64_t stride = p.words * kRows;
    for (int64_t w = 0; w < p.words; ++w) {
        __m512i code[kBlocks];
        for (int r = 0; r < kBlocks; ++r)
            code[r] = _mm512_loadu_si512(codes + r * stride + w * kRows);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __m512i x = _mm512_set1_epi32(static_cast<int32_t>(p.x[4 * w + j]));
            const __m512i slot = _mm512_set1_epi8(static_cast<char>(3 << 2 * j));
            for (int r = 0; r < kBlocks; ++r)
                sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], _mm512_and_si512(code[r], slot), x);
        }
    }
    alignas(64) int32_t sums[kRows];
    for (int r = 0; r < kBlocks; ++r) {
        __m512i total = sum[r][0];
        for (int j = 1; j < 4; ++j)
            total = _mm512_add_epi32(total, _mm512_srai_epi32(sum[r][j], 2 * j));
        _mm512_store_si512(sums, total);
        finish_int8(p, sums, block + r, 0);
    }
}

template <int kWidthX, int kBlocks>
LS_VNNI void multiply_vnni(const TernaryTileX& p, int64_t block) {
    const __m512i three = _mm512_set1_epi8(3);
    __m512i sum[kBlocks][kWidthX];
    for (int r = 0; r < kBlocks; ++r)
        for (int m = 0; m < kWidthX; ++m) sum[r][m] = _mm512_setzero_si512();
    const uint32_t* codes = p.codes + block * p.words * kRows;
    const int64_t stride = p.words * kRows;
    for (int64_t w = 0; w < p.words; ++w) {
        __m512i code[kBlocks];
        for (int r = 0; r < kBlocks; ++r)
            code[r] = _mm512_loadu_si512(codes + r * stride + w * kRows);
        const uint32_t* x = p.x + 4 * w * kWidthX;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            __m512i slot[kBlocks];
            for (int r = 0; r < kBlocks; ++r)
                slot[r] = _mm512_and_si512(_mm512_srli_epi32(code[r], 2 * j), three);
#pragma GCC unroll 16
            for (int m = 0; m < kWidthX; ++m) {
                const __m512i bytes = _mm512_set1_epi32(static_cast<int32_t>(x[j * kWidthX + m]));
                for (int r = 0; r < kBlocks; ++r)
                    sum[r][m] = _mm512_dpbusd_epi32(sum[r][m], slot[r], bytes);
            }
        }
    }
    alignas(64) int32_t sums[kRows];
    for (int r = 0; r < kBlocks; ++r)
        for (int m = 0; m < kWidthX; ++m) {
            _mm512_store_si512(sums, sum[r][m]);
            finish_int8(p, sums, block + r, m);
        }
}

void multiply_int8_vnni(const TernaryTileX& p, int64_t begin, int64_t end) {
    with_width(p.width, [&](auto width) {
        for_blocks<kAtOnce<width>>(begin, end, [&](auto blocks, int64_t block) {
            if constexpr (width == 1)
                multiply_vnni_one<blocks>(p, block);
            else
                multiply_vnni<width, blocks>(p, block);
        });
    });
}

#endif

// Pairs of products fit 16 bits (2 * 2 * 127), and so do 64 of them.
constexpr int64_t kShortWords = 16;

#if defined(__AVX2__)
template <int kWidthX>
void multiply_block_int8(const TernaryTileX& p, int64_t block) {
    const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    const uint32_t* codes = p.codes + block * p.words * kRows;
    alignas(64) int32_t sums[kWidthX][kRows] = {};
    for (int64_t w0 = 0; w0 < p.words; w0 += kShortWords) {
        const int64_t w1 = p.words - w0 < kShortWords ? p.words : w0 + kShortWords;
        for (int half = 0; half < 2; ++half) {
            __m256i sum[kWidthX];
            for (int m = 0; m < kWidthX; ++m) sum[m] = _mm256_setzero_si256();
            for (int64_t w = w0; w < w1; ++w) {
                const __m256i code = _mm256_loadu_si256(
                    reinterpret_cast<const __m256i*>(codes + w * kRows + 8 * half));
                const uint32_t* x = p.x + 4 * w * kWidthX;
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const __m256i slot = _mm256_and_si256(_mm256_srli_epi32(code, 2 * j), three);
#pragma GCC unroll 8
                    for (int m = 0; m < kWidthX; ++m) {
                        const __m256i bytes =
                            _mm256_set1_epi32(static_cast<int32_t>(x[j * kWidthX + m]));
                        sum[m] = _mm256_add_epi16(sum[m], _mm256_maddubs_epi16(slot, bytes));
                    }
                }
            }
            for (int m = 0; m < kWidthX; ++m) {
                __m256i* total = reinterpret_cast<__m256i*>(sums[m] + 8 * half);
                _mm256_store_si256(total, _mm256_add_epi32(_mm256_load_si256(total),
                                                           _mm256_madd_epi16(sum[m], ones)));
            }
        }
    }
    for (int m = 0; m < kWidthX; ++m) finish_int8(p, sums[m], block, m);
}
#else
template <int kWidthX>
void multiply_block_int8(const TernaryTileX& p, int64_t block) {
    const uint32_t* codes = p.codes + block * p.words * kRows;
    for (int m = 0; m < kWidthX; ++m) {
        int32_t sums[kRows] = {};
        for (int64_t w = 0; w < p.words; ++w)
            for (int j = 0; j < 4; ++j) {
                int8_t x[4];
                std::memcpy(x, p.x + (4 * w + j) * kWidthX + m, sizeof x);
                for (int r = 0; r < kRows; ++r) {
                    const uint32_t slot = codes[w * kRows + r] >> 2 * j;
                    for (int b = 0; b < 4; ++b)
                        sums[r] += static_cast<int32_t>(slot >> 8 * b & 3u) * x[b];
                }
            }
        finish_int8(p, sums, block, m);
    }
}
#endif

void multiply_int8(const TernaryTileX& p, int64_t begin, int64_t end) {
#if defined(__AVX512BW__)
    static const bool vnni = __builtin_cpu_supports("avx512vnni");
    if (vnni) return multiply_int8_vnni(p, begin, end);
#endif
    with_width(p.width, [&](auto width) {
        for (int64_t block = begin; block < end; ++block) multiply_block_int8<width>(p, block);
    });
}

// ---- bfloat16 activations -----------------------------------------------------------------------

#if defined(__AVX512BW__)

#define LS_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

void pack_half(const uint16_t* x, int64_t in_features, int64_t words, int64_t width,
               uint32_t* column) {
    for (int64_t w = 0; w < words; ++w) {
        uint16_t v[kTernaryColumns] = {};
        const int64_t left = in_features - w * kTernaryColumns;
        if (x)
            std::memcpy(v, x + w * kTernaryColumns,
                        (left < kTernaryColumns ? left : kTernaryColumns) * sizeof(uint16_t));
        for (int i = 0; i < 8; ++i) {
            const int k = 8 * (i % 2) + i / 2;
            column[(8 * w + i) * width] = v[k] | static_cast<uint32_t>(v[k + 4]) << 16;
        }
    }
}

template <int kWidthX, int kBlocks>
LS_BF16 void multiply_pairs(const TernaryTileX& p, int64_t block) {
    // two codes -> two bfloat16 of -1, 0 and 1
    alignas(64) uint32_t pairs[16];
    const uint32_t one[4] = {0xBF80u, 0, 0x3F80u, 0};
    for (int i = 0; i < 16; ++i) pairs[i] = one[i % 4] | one[i / 4] << 16;
    const __m512i table = _mm512_load_si512(pairs);
    __m512 sum[kBlocks][kWidthX];
    for (int r = 0; r < kBlocks; ++r)
        for (int m = 0; m < kWidthX; ++m) sum[r][m] = _mm512_setzero_ps();
    const uint32_t* codes = p.codes + block * p.words * kRows;
    const int64_t stride = p.words * kRows;
    for (int64_t w = 0; w < p.words; ++w) {
        __m512i code[kBlocks];
        for (int r = 0; r < kBlocks; ++r)
            code[r] = _mm512_loadu_si512(codes + r * stride + w * kRows);
        const uint32_t* x = p.x + 8 * w * kWidthX;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            __m512i weights[kBlocks];
            for (int r = 0; r < kBlocks; ++r)
                weights[r] = _mm512_permutexvar_epi32(_mm512_srli_epi32(code[r], 4 * i), table);
#pragma GCC unroll 16
            for (int m = 0; m < kWidthX; ++m) {
                const __m512i pair = _mm512_set1_epi32(static_cast<int32_t>(x[i * kWidthX + m]));
                for (int r = 0; r < kBlocks; ++r)
                    sum[r][m] = _mm512_dpbf16_ps(sum[r][m], (__m512bh)weights[r], (__m512bh)pair);
            }
        }
    }
    alignas(64) float sums[kRows];
    for (int r = 0; r < kBlocks; ++r)
        for (int m = 0; m < p.batch; ++m) {
            _mm512_store_ps(sums, sum[r][m]);
            finish(sums, p.scale, p.scale_by_row, p.bias, block + r, p.out_features,
                   p.y + m * p.out_features);
        }
}

void multiply_half(const TernaryTileX& p, int64_t begin, int64_t end) {
    with_width(p.width, [&](auto width) {
        for_blocks<width == 1 ? 8 : kAtOnce<width>>(begin, end, [&](auto blocks, int64_t block) {
            multiply_pairs<width, blocks>(p, block);
        });
    });
}

#else
constexpr void (*pack_half)(const uint16_t*, int64_t, int64_t, int64_t, uint32_t*) = nullptr;
constexpr void (*multiply_half)(const TernaryTileX&, int64_t, int64_t) = nullptr;
#endif

}  // namespace

const TernaryTileKernels LS_KERNELS(ternary_tiles) = {quantise, multiply_int8, pack_half,
                                                      multiply_half};

}  // namespace lottery_sparse
