#include <array>

#include "common/simd.h"
#include "step/dense_tiles.h"

namespace lottery_sparse {
namespace {

// Rows x kVecs sums, which with a row of b and one broadcast fill the registers.
constexpr int kRows = kWidth == 16 ? kDenseRows : 6;
constexpr int kVecs = 2;
constexpr int kColumns = kVecs * kWidth;

template <int kCount>
void block(const DenseProduct& p, int64_t first) {
    // three rows to a pointer: their addresses are pointer + {0, 1, 2} a_row
    const float* a[(kCount + 2) / 3];
    for (int64_t c = 0; c < kTileBatch; c += kColumns) {
        for (int i = 0; i < (kCount + 2) / 3; ++i) a[i] = p.a + (first + 3 * i) * p.a_row;
        Vec sum[kCount][kVecs];
        for (int r = 0; r < kCount; ++r)
            for (int v = 0; v < kVecs; ++v)
                sum[r][v] = p.bias ? broadcast(p.bias[first + r]) : zero();
        const float* b = p.b + c;
        for (int64_t s = 0; s < p.steps; ++s, b += kTileBatch) {
            Vec row[kVecs];
            for (int v = 0; v < kVecs; ++v) row[v] = load(b + v * kWidth);
            for (int r = 0; r < kCount; ++r) {
                const Vec value = broadcast(a[r / 3][r % 3 * p.a_row]);
                for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(value, row[v], sum[r][v]);
            }
            for (const float*& pointer : a) pointer += p.a_step;
        }
        for (int r = 0; r < kCount; ++r)
            for (int v = 0; v < kVecs; ++v)
                store(p.out + (first + r) * p.out_stride + c + v * kWidth, sum[r][v]);
    }
    for (int64_t r = first; r < first + kCount; ++r) {
        float* out = p.out + r * p.out_stride;
        if (p.relu)  // keeps NaN, as torch.relu does
            for (int b = 0; b < kTileBatch; ++b) out[b] = out[b] < 0.0f ? 0.0f : out[b];
        if (p.gate)
            for (int b = 0; b < kTileBatch; ++b)
                out[b] = p.gate[r * kTileBatch + b] <= 0.0f ? 0.0f : out[b];
    }
}

using Block = void (*)(const DenseProduct&, int64_t);

template <int... kCounts>
constexpr std::array<Block, kRows> blocks(std::integer_sequence<int, kCounts...>) {
    return {block<kCounts + 1>...};
}

void multiply(const DenseProduct& p, int64_t begin, int64_t end) {
    constexpr std::array<Block, kRows> kBlocks = blocks(std::make_integer_sequence<int, kRows>());
    for (int64_t r = begin; r < end; r += kRows)
        kBlocks[(end - r < kRows ? end - r : kRows) - 1](p, r);
}

void transpose(const float* tile, int64_t features, int64_t batch, float* out, int64_t stride) {
    const int64_t block_features = features / 8 * 8, block_batch = batch / 8 * 8;
    for (int64_t f = 0; f < block_features; f += 8)
        for (int64_t b = 0; b < block_batch; b += 8)
            transpose_8x8(tile + f * kTileBatch + b, kTileBatch, out + b * stride + f, stride);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t f = b < block_batch ? block_features : 0; f < features; ++f)
            out[b * stride + f] = tile[f * kTileBatch + b];
}

#if defined(__AVX512F__)
// Calls f(c, inside, bits, n) for 16 columns from c on at a time: those that exist, those kept, and
// how many were kept before. Ends when these are `count`.
template <class F>
inline void for_sixteens(const uint8_t* mask, int64_t columns, int64_t count, const F& f) {
    for (int64_t c = 0, n = 0; c < columns && n < count; c += 16) {
        const __mmask16 inside = columns - c < 16 ? (1u << (columns - c)) - 1 : 0xFFFF;
        const __m128i bytes = _mm_maskz_loadu_epi8(inside, mask + c);
        const __mmask16 bits = _mm_test_epi8_mask(bytes, bytes);
        f(c, inside, bits, n);
        n += count_bits(bits);
    }
}
#endif

void pick(const uint8_t* mask, const float* dense, int64_t columns, int64_t count, float* kept) {
#if defined(__AVX512F__)
    for_sixteens(mask, columns, count, [&](int64_t c, __mmask16 inside, __mmask16 bits, int64_t n) {
        const Vec row = _mm512_maskz_loadu_ps(inside, dense + c);
        _mm512_storeu_ps(kept + n, _mm512_maskz_compress_ps(bits, row));
    });
#else
    for (int64_t c = 0, n = 0; c < columns; c += 64)
        for (uint64_t bits = kept_bits(mask + c, columns - c); bits && n < count; bits &= bits - 1)
            kept[n++] = dense[c + __builtin_ctzll(bits)];
#endif
}

void place(const uint8_t* mask, const float* kept, int64_t columns, int64_t count, float* dense) {
#if defined(__AVX512F__)
    for_sixteens(mask, columns, count, [&](int64_t c, __mmask16 inside, __mmask16 bits, int64_t n) {
        const __mmask16 listed = count - n < 16 ? (1u << (count - n)) - 1 : 0xFFFF;
        const Vec row = _mm512_maskz_loadu_ps(inside, dense + c);
        const Vec values = _mm512_maskz_loadu_ps(listed, kept + n);
        _mm512_mask_storeu_ps(dense + c, inside, _mm512_mask_expand_ps(row, bits, values));
    });
#else
    for (int64_t c = 0, n = 0; c < columns; c += 64)
        for (uint64_t bits = kept_bits(mask + c, columns - c); bits && n < count; bits &= bits - 1)
            dense[c + __builtin_ctzll(bits)] = kept[n++];
#endif
}

}  // namespace

const DenseTilesKernels LS_KERNELS(dense_tiles) = {multiply, transpose, pick, place};

}  // namespace lottery_sparse
