#include <cstring>

#include "bits.h"
#include "packed_linear.h"
#include "simd.h"

namespace lottery_sparse {
namespace {

constexpr int kVecs = kBitmapGroup / kWidth;

// The 16 columns of a group: kept values in their places, zeros elsewhere.
struct Group {
    Vec part[kVecs];
};

#if defined(__AVX512F__)
inline Group expand(uint32_t kept, const float* values) {
    return {{_mm512_maskz_expand_ps(static_cast<__mmask16>(kept), _mm512_loadu_ps(values))}};
}
inline Group expand(uint32_t kept, const Bfloat16* values) {
    const __mmask16 lanes = static_cast<__mmask16>((1u << count_bits(kept)) - 1);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, values));
    return {{_mm512_maskz_expand_ps(static_cast<__mmask16>(kept),
                                    _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)))}};
}
#else
inline float number(float v) {
    return v;
}
inline float number(Bfloat16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}
template <class Value>
inline Group expand(uint32_t kept, const Value* values) {
    alignas(64) float columns[kBitmapGroup] = {};
    for (; kept; kept &= kept - 1) columns[__builtin_ctz(kept)] = number(*values++);
    Group group;
    for (int v = 0; v < kVecs; ++v) group.part[v] = load(columns + v * kWidth);
    return group;
}
#endif

// Rows of w and of x that are in registers together.
template <int kRows, int kBatch, class Value>
inline void multiply_rows(const BitmapTile<Value>& p, int64_t row, int64_t first) {
    Vec sum[kRows][kBatch];
    for (int r = 0; r < kRows; ++r)
        for (int m = 0; m < kBatch; ++m) sum[r][m] = zero();
    const int64_t words = packed_words(p.in_features);
    const uint16_t* bits[kRows];
    const Value* values[kRows];
    for (int r = 0; r < kRows; ++r) {
        bits[r] = p.bits + (row + r) * words * 2;
        values[r] = p.values + p.starts[row + r];
    }
    const float* x = p.x + first * p.stride;
    for (int64_t k = 0; k < p.in_features; k += kBitmapGroup) {
        for (int r = 0; r < kRows; ++r) {
            const uint32_t kept = bits[r][k / kBitmapGroup];
            const Group group = expand(kept, values[r]);
            values[r] += count_bits(kept);
            for (int m = 0; m < kBatch; ++m)
                for (int v = 0; v < kVecs; ++v)
                    sum[r][m] =
                        fma(group.part[v], load(x + m * p.stride + k + v * kWidth), sum[r][m]);
        }
    }
    alignas(64) float lanes[kWidth];
    for (int r = 0; r < kRows; ++r)
        for (int m = 0; m < kBatch; ++m) {
            store(lanes, sum[r][m]);
            for (int width = kWidth / 2; width; width /= 2)
                for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
            p.y[(first + m) * p.out_features + row + r] =
                p.bias ? lanes[0] + p.bias[row + r] : lanes[0];
        }
}

template <int kRows, int kBatch, class Value>
inline void multiply_batch(const BitmapTile<Value>& p, int64_t begin, int64_t end, int64_t first) {
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows) multiply_rows<kRows, kBatch>(p, row, first);
    for (; row < end; ++row) multiply_rows<1, kBatch>(p, row, first);
}

template <class Value>
void multiply(const BitmapTile<Value>& p, int64_t begin, int64_t end) {
    int64_t first = 0;
    for (; first + 16 <= p.batch; first += 16) multiply_batch<1, 16>(p, begin, end, first);
    for (; first + 8 <= p.batch; first += 8) multiply_batch<2, 8>(p, begin, end, first);
    for (; first + 4 <= p.batch; first += 4) multiply_batch<4, 4>(p, begin, end, first);
    for (; first + 2 <= p.batch; first += 2) multiply_batch<4, 2>(p, begin, end, first);
    for (; first < p.batch; ++first) multiply_batch<4, 1>(p, begin, end, first);
}

}  // namespace

const BitmapKernels LS_KERNELS(bitmap_linear_float) = {multiply};
const BitmapKernelsHalf LS_KERNELS(bitmap_linear_half) = {multiply};

}  // namespace lottery_sparse
