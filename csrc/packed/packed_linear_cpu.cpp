#include <cstring>

#include "common/simd.h"
#include "packed/packed_linear.h"

namespace lottery_sparse {
namespace {

constexpr int64_t kRows = 16;  // whose results leave together

// ---- one row of x -------------------------------------------------------------------------------

constexpr int kLanes = kSumLanes;  // entries of a row that are summed side by side

#if defined(__AVX2__)
// Four loads and three shuffles: half the time of a gather instruction on Zen 4.
template <class Index>
inline __m128 gather4(const float* x, const Index* columns) {
    __m128 v = _mm_load_ss(x + columns[0]);
    v = _mm_insert_ps(v, _mm_load_ss(x + columns[1]), 0x10);
    v = _mm_insert_ps(v, _mm_load_ss(x + columns[2]), 0x20);
    return _mm_insert_ps(v, _mm_load_ss(x + columns[3]), 0x30);
}
template <class Index>
inline __m256 gather8(const float* x, const Index* columns) {
    return _mm256_set_m128(gather4(x, columns + 4), gather4(x, columns));
}
#endif

#if defined(__AVX512F__)
inline Vec numbers(const float* p) {
    return load(p);
}
inline Vec numbers(const Bfloat16* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
template <class Index>
inline Vec gather(const float* x, const Index* columns) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(gather8(x, columns)), gather8(x, columns + 8),
                              1);
}
#elif defined(__AVX2__)
inline Vec numbers(const float* p) {
    return load(p);
}
inline Vec numbers(const Bfloat16* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
template <class Index>
inline Vec gather(const float* x, const Index* columns) {
    return gather8(x, columns);
}
#else
template <class Value>
inline Vec numbers(const Value* p) {
    return Vec{number(p[0]), number(p[1]), number(p[2]), number(p[3])};
}
template <class Index>
inline Vec gather(const float* x, const Index* columns) {
    return Vec{x[columns[0]], x[columns[1]], x[columns[2]], x[columns[3]]};
}
#endif

// The products of a row's entries, summed lane by lane.
template <class Index, class Value>
inline void row_lanes(const Index* columns, const Value* values, const float* x, int64_t count,
                      Vec (&lanes)[kSumVecs]) {
    Vec sum[kSumVecs];
    for (int v = 0; v < kSumVecs; ++v) sum[v] = zero();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int v = 0; v < kSumVecs; ++v)
            sum[v] =
                fma(numbers(values + i + v * kWidth), gather(x, columns + i + v * kWidth), sum[v]);
    const int vecs_left = i == count ? 0 : kSumVecs;
    for (int v = 0; v < vecs_left; ++v, i += kWidth) {
        if (i + kWidth <= count) {
            sum[v] = fma(numbers(values + i), gather(x, columns + i), sum[v]);
        } else if (i < count) {
            alignas(64) float rest_values[kWidth] = {}, rest_x[kWidth] = {};
            int64_t at = i;
            for (int j = 0; at < count; ++at, ++j) {
                rest_values[j] = number(values[at]);
                rest_x[j] = x[columns[at]];
            }
            sum[v] = fma(load(rest_values), load(rest_x), sum[v]);
        } else {
            sum[v] = add(sum[v], zero());  // makes 0 of -0, as the products of padding do
        }
    }
    for (int v = 0; v < kSumVecs; ++v) lanes[v] = sum[v];
}

template <class Index, class Value>
bool multiply_vector(const PackedTile<Index, Value>& p, int64_t begin, int64_t end) {
    for (int64_t r0 = begin; r0 < end; r0 += kSumGroup) {
        const int64_t n = end - r0 < kSumGroup ? end - r0 : kSumGroup;
        if (p.bounds && !rows_fit(*p.bounds, p.columns, p.starts + r0, n)) return false;
        Vec lanes[kSumGroup][kSumVecs];
        for (int64_t i = 0; i < kSumGroup; ++i) {
            const int64_t first = i < n ? p.starts[r0 + i] : 0;
            const int64_t last = i < n ? p.starts[r0 + i + 1] : 0;
            row_lanes(p.columns + first, p.values + first, p.x, last - first, lanes[i]);
        }
        alignas(64) float sums[kSumGroup];
        store(sums, horizontal_sums(lanes));
        for (int64_t i = 0; i < n; ++i) p.y[r0 + i] = p.bias ? sums[i] + p.bias[r0 + i] : sums[i];
    }
    return true;
}

// ---- tiles --------------------------------------------------------------------------------------

void pack(const float* x, int64_t batch, int64_t in_features, int64_t width, int64_t begin,
          int64_t end, float* tile) {
    std::memset(tile + begin * width, 0, (end - begin) * width * sizeof(float));
    const int64_t rows = batch / 8 * 8, blocks_end = begin + (end - begin) / 8 * 8;
    for (int64_t k = begin; k < blocks_end; k += 8)
        for (int64_t b = 0; b < rows; b += 8)
            transpose_8x8(x + b * in_features + k, in_features, tile + k * width + b, width);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t k = b < rows ? blocks_end : begin; k < end; ++k)
            tile[k * width + b] = x[b * in_features + k];
}

template <int kTile, class Index, class Value>
bool multiply_tile(const PackedTile<Index, Value>& p, int64_t begin, int64_t end) {
    constexpr int kVecs = kTile / kWidth;
    // Entry i joins the sum i modulo kInFlight, and those left over join the first; of these sums
    // the registers hold kAtATime.
    constexpr int kInFlight = 4;
    constexpr int kAtATime = kVecs <= 2 ? 4 : kVecs <= 4 ? 2 : 1;
    alignas(64) float sums[kRows][kTile];
    for (int64_t r0 = begin; r0 < end; r0 += kRows) {
        const int64_t n = end - r0 < kRows ? end - r0 : kRows;
        if (p.bounds && !rows_fit(*p.bounds, p.columns, p.starts + r0, n)) return false;
        for (int64_t r = 0; r < n; ++r) {
            const auto step = [&](Vec* s, int64_t i) {
                const float* x = p.x + static_cast<int64_t>(p.columns[i]) * kTile;
                const Vec value = broadcast(number(p.values[i]));
                for (int v = 0; v < kVecs; ++v) s[v] = fma(value, load(x + v * kWidth), s[v]);
            };
            const int64_t row_begin = p.starts[r0 + r], row_end = p.starts[r0 + r + 1];
            for (int first = 0; first < kInFlight; first += kAtATime) {
                Vec sum[kAtATime][kVecs];
                for (int f = 0; f < kAtATime; ++f)
                    for (int v = 0; v < kVecs; ++v) sum[f][v] = zero();
                int64_t i = row_begin;
                for (; i + kInFlight <= row_end; i += kInFlight)
                    for (int f = 0; f < kAtATime; ++f) step(sum[f], i + first + f);
                if (first == 0)
                    for (; i < row_end; ++i) step(sum[0], i);
                for (int v = 0; v < kVecs; ++v) {
                    float* total = sums[r] + v * kWidth;
                    if (first > 0) sum[0][v] = add(load(total), sum[0][v]);
                    for (int f = 1; f < kAtATime; ++f) sum[0][v] = add(sum[0][v], sum[f][v]);
                    store(total, sum[0][v]);
                }
            }
        }
        alignas(64) float by_batch[kTile][kRows];
        for (int64_t r = 0; r < n; r += 8)
            for (int64_t b = 0; b < p.batch; b += 8)
                transpose_8x8(&sums[r][b], kTile, &by_batch[b][r], kRows);
        for (int64_t b = 0; b < p.batch; ++b) {
            float* y = p.y + b * p.out_features + r0;
            if (p.bias)
                for (int64_t r = 0; r < n; ++r) y[r] = by_batch[b][r] + p.bias[r0 + r];
            else
                std::memcpy(y, by_batch[b], n * sizeof(float));
        }
    }
    return true;
}

template <class Index, class Value>
bool multiply(const PackedTile<Index, Value>& p, int64_t begin, int64_t end) {
    if (p.width == 1) return multiply_vector(p, begin, end);
    return p.width == kNarrowTile ? multiply_tile<kNarrowTile>(p, begin, end)
                                  : multiply_tile<kWideTile>(p, begin, end);
}

}  // namespace

const PackedKernels16 LS_KERNELS(packed_linear_16) = {pack, multiply};
const PackedKernels32 LS_KERNELS(packed_linear_32) = {pack, multiply};
const PackedKernels16Half LS_KERNELS(packed_linear_16_half) = {pack, multiply};
const PackedKernels32Half LS_KERNELS(packed_linear_32_half) = {pack, multiply};

}  // namespace lottery_sparse
