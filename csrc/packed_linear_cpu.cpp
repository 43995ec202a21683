#include <cstring>

#include "packed_linear.h"
#include "simd.h"

namespace lottery_sparse {
namespace {

constexpr int64_t kRows = 16;  // whose results leave together

inline float number(float v) {
    return v;
}
inline float number(Bfloat16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// ---- one row of x -------------------------------------------------------------------------------

#if defined(__AVX512F__)
inline __m512 numbers(__mmask16 lanes, const float* p) {
    return _mm512_maskz_loadu_ps(lanes, p);
}
inline __m512 numbers(__mmask16 lanes, const Bfloat16* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}
inline __m512i indices(__mmask16 lanes, const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
}
inline __m512i indices(__mmask16 lanes, const uint32_t* p) {
    return _mm512_maskz_loadu_epi32(lanes, p);
}

// The products of a row's entries, summed lane by lane.
template <class Index, class Value>
inline Vec row_lanes(const Index* columns, const Value* values, const float* x, int64_t count) {
    Vec sum[2] = {zero(), zero()};
    const auto step = [&](Vec& s, int64_t i, __mmask16 lanes) {
        const Vec gathered =
            _mm512_mask_i32gather_ps(zero(), lanes, indices(lanes, columns + i), x, sizeof(float));
        s = fma(numbers(lanes, values + i), gathered, s);
    };
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        step(sum[0], i, 0xFFFF);
        step(sum[1], i + 16, 0xFFFF);
    }
    if (i + 16 <= count) {
        step(sum[0], i, 0xFFFF);
        i += 16;
    }
    if (i < count) step(sum[1], i, static_cast<__mmask16>((1u << (count - i)) - 1));
    return add(sum[0], sum[1]);
}
#else
template <class Index, class Value>
inline Vec row_lanes(const Index* columns, const Value* values, const float* x, int64_t count) {
    constexpr int kSums = 8;
    float sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums)
        for (int j = 0; j < kSums; ++j) sums[j] += number(values[i + j]) * x[columns[i + j]];
    for (int j = 0; i < count; ++i, ++j) sums[j] += number(values[i]) * x[columns[i]];
    Vec lanes = load(sums);
    for (int j = kWidth; j < kSums; j += kWidth) lanes = add(lanes, load(sums + j));
    return lanes;
}
#endif

template <class Index, class Value>
void multiply_vector(const PackedTile<Index, Value>& p, int64_t begin, int64_t end) {
    for (int64_t r0 = begin; r0 < end; r0 += kWidth) {
        const int64_t n = end - r0 < kWidth ? end - r0 : kWidth;
        Vec lanes[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) {
            const int64_t first = i < n ? p.starts[r0 + i] : 0;
            const int64_t count = i < n ? p.starts[r0 + i + 1] - first : 0;
            lanes[i] = row_lanes(p.columns + first, p.values + first, p.x, count);
        }
        alignas(64) float sums[kWidth];
        store(sums, horizontal_sums(lanes));
        for (int64_t i = 0; i < n; ++i) p.y[r0 + i] = p.bias ? sums[i] + p.bias[r0 + i] : sums[i];
    }
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
void multiply_tile(const PackedTile<Index, Value>& p, int64_t begin, int64_t end) {
    constexpr int kVecs = kTile / kWidth;
    constexpr int kInFlight = kVecs <= 2 ? 4 : kVecs <= 4 ? 2 : 1;
    alignas(64) float sums[kRows][kTile];
    for (int64_t r0 = begin; r0 < end; r0 += kRows) {
        const int64_t n = end - r0 < kRows ? end - r0 : kRows;
        for (int64_t r = 0; r < n; ++r) {
            Vec sum[kInFlight][kVecs];
            for (int f = 0; f < kInFlight; ++f)
                for (int v = 0; v < kVecs; ++v) sum[f][v] = zero();
            const auto step = [&](Vec* s, int64_t i) {
                const float* x = p.x + static_cast<int64_t>(p.columns[i]) * kTile;
                const Vec value = broadcast(number(p.values[i]));
                for (int v = 0; v < kVecs; ++v) s[v] = fma(value, load(x + v * kWidth), s[v]);
            };
            int64_t i = p.starts[r0 + r];
            const int64_t row_end = p.starts[r0 + r + 1];
            for (; i + kInFlight <= row_end; i += kInFlight)
                for (int f = 0; f < kInFlight; ++f) step(sum[f], i + f);
            for (; i < row_end; ++i) step(sum[0], i);
            for (int v = 0; v < kVecs; ++v) {
                for (int f = 1; f < kInFlight; ++f) sum[0][v] = add(sum[0][v], sum[f][v]);
                store(sums[r] + v * kWidth, sum[0][v]);
            }
        }
        for (int64_t b = 0; b < p.batch; ++b) {
            float* y = p.y + b * p.out_features + r0;
            for (int64_t r = 0; r < n; ++r)
                y[r] = p.bias ? sums[r][b] + p.bias[r0 + r] : sums[r][b];
        }
    }
}

template <class Index, class Value>
void multiply(const PackedTile<Index, Value>& p, int64_t begin, int64_t end) {
    if (p.width == 1)
        multiply_vector(p, begin, end);
    else if (p.width == kNarrowTile)
        multiply_tile<kNarrowTile>(p, begin, end);
    else
        multiply_tile<kWideTile>(p, begin, end);
}

}  // namespace

const PackedKernels16 LS_KERNELS(packed_linear_16) = {pack, multiply};
const PackedKernels32 LS_KERNELS(packed_linear_32) = {pack, multiply};
const PackedKernels16Half LS_KERNELS(packed_linear_16_half) = {pack, multiply};
const PackedKernels32Half LS_KERNELS(packed_linear_32_half) = {pack, multiply};

}  // namespace lottery_sparse
