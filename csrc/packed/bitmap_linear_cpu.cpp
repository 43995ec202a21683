#include <array>

#include "common/bits.h"
#include "common/simd.h"
#include "packed/packed_linear.h"

namespace lottery_sparse {
namespace {

static_assert(kBitmapGroup == kSumLanes);

// The 16 columns of a group: kept values in their places, zeros elsewhere.
struct Group {
    Vec part[kSumVecs];
};

#if defined(__AVX512F__)
// Zeros that a compiler does not know, so that values are expanded into them. On Zen 4 an expansion
// that makes the zeros itself waits for what its register held before, the group before this one.
inline Vec unknown_zeros() {
    Vec zeros = zero();
    asm("" : "+v"(zeros));
    return zeros;
}
inline Group expand(uint32_t kept, const float* values) {
    return {{_mm512_mask_expandloadu_ps(unknown_zeros(), static_cast<__mmask16>(kept), values)}};
}
inline Group expand(uint32_t kept, const Bfloat16* values) {
    const __mmask16 lanes = static_cast<__mmask16>((1u << count_bits(kept)) - 1);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, values));
    return {{_mm512_mask_expand_ps(unknown_zeros(), static_cast<__mmask16>(kept),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)))}};
}
#else
#if defined(__AVX2__)
// Byte i of entry m is the rank of bit i among the ones of m, negative if it is none of them.
constexpr std::array<std::array<int8_t, 8>, 256> rank_table() {
    std::array<std::array<int8_t, 8>, 256> table{};
    for (int m = 0; m < 256; ++m)
        for (int i = 0, rank = 0; i < 8; ++i)
            table[m][i] = static_cast<int8_t>(m >> i & 1 ? rank++ : -1);
    return table;
}
alignas(64) constexpr auto kRanks = rank_table();

inline Group expand(uint32_t kept, const float* values) {
    Group group;
    for (int v = 0; v < kSumVecs; ++v, kept >>= kWidth) {
        const __m256i rank = _mm256_cvtepi8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kRanks[kept & 0xFF].data())));
        const int64_t count = count_bits(kept & 0xFF);
        const Vec listed = _mm256_permutevar8x32_ps(load_first(values, count), rank);
        group.part[v] = _mm256_blendv_ps(listed, zero(), _mm256_castsi256_ps(rank));
        values += count;
    }
    return group;
}
#endif
template <class Value>
inline Group expand(uint32_t kept, const Value* values) {
    alignas(64) float columns[kBitmapGroup] = {};
    for (; kept; kept &= kept - 1) columns[__builtin_ctz(kept)] = number(*values++);
    Group group;
    for (int v = 0; v < kSumVecs; ++v) group.part[v] = load(columns + v * kWidth);
    return group;
}
#endif

// The rows of w whose groups are expanded side by side.
template <class Value, int kRows>
struct Rows {
    Rows(const BitmapTile<Value>& p, int64_t row, int64_t n) {
        const int64_t words = packed_words(p.in_features) * 2;  // of 16 bits
        for (int64_t r = 0; r < kRows; ++r) {  // a row that is not there repeats the first
            const int64_t from = row + (r < n ? r : 0);
            bits[r] = p.bits + from * words;
            values[r] = p.values + p.starts[from];
        }
    }
    Group next(int r, int64_t group) {
        const uint32_t kept = bits[r][group];
        const Group expanded = expand(kept, values[r]);
        values[r] += count_bits(kept);
        return expanded;
    }

    const uint16_t* bits[kRows];
    const Value* values[kRows];
};

template <class Value>
inline void write(const BitmapTile<Value>& p, int64_t m, int64_t row, float total) {
    p.y[m * p.out_features + row] = p.bias ? total + p.bias[row] : total;
}

// One or two rows of x: a group meets them as it is expanded.
template <int kBatch, class Value>
void multiply_few(const BitmapTile<Value>& p, int64_t begin, int64_t end) {
    constexpr int kFit = 8 / (kBatch * kSumVecs);  // whose sums the registers hold
    constexpr int kRows = kFit < 4 ? kFit : 4;
    for (int64_t row = begin; row < end; row += kRows) {
        const int64_t n = end - row < kRows ? end - row : kRows;
        Rows<Value, kRows> rows(p, row, n);
        Vec sum[kRows][kBatch][kSumVecs];
        for (int r = 0; r < kRows; ++r)
            for (int m = 0; m < kBatch; ++m)
                for (int v = 0; v < kSumVecs; ++v) sum[r][m][v] = zero();
        for (int64_t k = 0; k < p.in_features; k += kBitmapGroup)
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const Group group = rows.next(r, k / kBitmapGroup);
#pragma GCC unroll 2
                for (int m = 0; m < kBatch; ++m)
#pragma GCC unroll 4
                    for (int v = 0; v < kSumVecs; ++v)
                        sum[r][m][v] = fma(group.part[v], load(p.x + m * p.stride + k + v * kWidth),
                                           sum[r][m][v]);
            }
        float totals[kRows][kBatch];  // of all rows: sums stay in registers where indices are known
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
            for (int m = 0; m < kBatch; ++m) totals[r][m] = halved_sum(sum[r][m]);
        for (int r = 0; r < n; ++r)
            for (int m = 0; m < kBatch; ++m) write(p, m, row + r, totals[r][m]);
    }
}

// More: a slab of columns is expanded first, and stays in the first-level cache.
constexpr int64_t kSlab = 1024;
constexpr int kSide = kBitmapSide;  // rows of x in registers, with kRows of w
constexpr int kRows = 4;

template <class Value>
void multiply_many(const BitmapTile<Value>& p, int64_t begin, int64_t end) {
    alignas(64) float slab[kRows][kSlab];
    for (int64_t row = begin; row < end; row += kRows) {
        const int64_t n = end - row < kRows ? end - row : kRows;
        Rows<Value, kRows> rows(p, row, n);
        Vec sums[kBitmapBatch][kRows][kSumVecs];
        for (int64_t m = 0; m < p.batch; ++m)
            for (auto& of_row : sums[m])
                for (Vec& lanes : of_row) lanes = zero();
        for (int64_t k0 = 0; k0 < p.in_features; k0 += kSlab) {
            const int64_t k1 = p.in_features - k0 < kSlab ? p.in_features : k0 + kSlab;
            for (int64_t k = k0; k < k1; k += kBitmapGroup)
                for (int r = 0; r < kRows; ++r) {
                    const Group group = rows.next(r, k / kBitmapGroup);
                    for (int v = 0; v < kSumVecs; ++v)
                        store(slab[r] + k - k0 + v * kWidth, group.part[v]);
                }
            for (int64_t m0 = 0; m0 < p.batch; m0 += kSide)
                for (int v = 0; v < kSumVecs; ++v) {  // one vector of lanes after the other
                    // rows beyond the batch are there
                    const float* x = p.x + m0 * p.stride + k0 + v * kWidth;
                    Vec sum[kSide][kRows];
                    for (int m = 0; m < kSide; ++m)
                        for (int r = 0; r < kRows; ++r)
                            sum[m][r] = m0 + m < p.batch ? sums[m0 + m][r][v] : zero();
                    for (int64_t k = 0; k < k1 - k0; k += kSumLanes) {
                        Vec w[kRows];
                        for (int r = 0; r < kRows; ++r) w[r] = load(slab[r] + k + v * kWidth);
                        for (int m = 0; m < kSide; ++m) {
                            const Vec x_m = load(x + m * p.stride + k);
                            for (int r = 0; r < kRows; ++r) sum[m][r] = fma(w[r], x_m, sum[m][r]);
                        }
                    }
                    for (int m = 0; m < kSide && m0 + m < p.batch; ++m)
                        for (int r = 0; r < kRows; ++r) sums[m0 + m][r][v] = sum[m][r];
                }
        }
        for (int64_t m = 0; m < p.batch; ++m)
            for (int r = 0; r < n; ++r) write(p, m, row + r, halved_sum(sums[m][r]));
    }
}

template <class Value>
void multiply(const BitmapTile<Value>& p, int64_t begin, int64_t end) {
    if (p.batch == 1)
        multiply_few<1>(p, begin, end);
    else if (p.batch == 2)
        multiply_few<2>(p, begin, end);
    else
        multiply_many(p, begin, end);
}

}  // namespace

const BitmapKernels LS_KERNELS(bitmap_linear_float) = {multiply};
const BitmapKernelsHalf LS_KERNELS(bitmap_linear_half) = {multiply};

}  // namespace lottery_sparse
