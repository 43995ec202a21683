#include <cstring>

#include "common/simd.h"
#include "packed/ternary_block.h"

namespace lottery_sparse {
namespace {

// x[16 w + j], 0 beyond K.
inline void word_of(const float* x, int64_t in_features, int64_t w, float out[kTernaryColumns]) {
    const int64_t left = in_features - w * kTernaryColumns;
    if (left < kTernaryColumns) std::memset(out, 0, kTernaryColumns * sizeof(float));
    std::memcpy(out, x + w * kTernaryColumns,
                (left < kTernaryColumns ? left : kTernaryColumns) * sizeof(float));
}

// A sum runs over this many words before it joins the total: rounding grows with the longer of two
// short sums, not with K.
constexpr int64_t kSumWords = 32;

#if defined(__AVX512F__)

// Two codes are a nibble: columns 8 h + b and 8 h + b + 4 of a word at bits 8 b + 4 h. A table has
// their 16 sums; those with a code of 3 are never chosen.
constexpr int64_t kTableFloats = 8 * 16;

void tables(const float* x, int64_t batch, int64_t in_features, int64_t begin, int64_t end,
            float* out) {
    const __m512 low = _mm512_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0);
    const __m512 high = _mm512_setr_ps(-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0);
    alignas(64) float v[kTernaryColumns];
    for (int64_t w = begin; w < end; ++w)
        for (int64_t m = 0; m < batch; ++m) {
            word_of(x + m * in_features, in_features, w, v);
            float* table = out + (w * batch + m) * kTableFloats;
            for (int i = 0; i < 8; ++i) {
                const int b = i / 2, h = i % 2;
                store(table + i * 16, add(_mm512_mul_ps(low, broadcast(v[8 * h + b])),
                                          _mm512_mul_ps(high, broadcast(v[8 * h + b + 4]))));
            }
        }
}

template <int kBatch, int kBlocks>
inline void multiply_blocks(const TernaryTile& p, int64_t block) {
    alignas(64) float totals[kBatch][kBlocks][kRows] = {};
    const uint32_t* codes = p.codes + block * p.words * kRows;
    const int64_t stride = p.words * kRows;
    for (int64_t w0 = 0; w0 < p.words; w0 += kSumWords) {
        const int64_t w1 = p.words - w0 < kSumWords ? p.words : w0 + kSumWords;
        Vec sum[kBatch][kBlocks];
        for (int m = 0; m < kBatch; ++m)
            for (int r = 0; r < kBlocks; ++r) sum[m][r] = zero();
        for (int64_t w = w0; w < w1; ++w) {
            __m512i code[kBlocks];
            for (int r = 0; r < kBlocks; ++r)
                code[r] = _mm512_loadu_si512(codes + r * stride + w * kRows);
            const float* table = p.tables + w * kBatch * kTableFloats;
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i)
                for (int r = 0; r < kBlocks; ++r) {
                    const __m512i index = i ? _mm512_srli_epi32(code[r], 4 * i) : code[r];
                    for (int m = 0; m < kBatch; ++m)
                        sum[m][r] = add(
                            sum[m][r],
                            _mm512_permutexvar_ps(index, load(table + m * kTableFloats + i * 16)));
                }
        }
        for (int m = 0; m < kBatch; ++m)
            for (int r = 0; r < kBlocks; ++r)
                store(totals[m][r], add(load(totals[m][r]), sum[m][r]));
    }
    for (int m = 0; m < kBatch; ++m)
        for (int r = 0; r < kBlocks; ++r)
            finish(totals[m][r], p.scale, p.scale_by_row, p.bias, block + r, p.out_features,
                   p.y + m * p.out_features);
}

template <int kBatch>
inline void multiply_all(const TernaryTile& p, int64_t begin, int64_t end) {
    constexpr int kBlocks = kBatch == 1 ? 8 : 4;
    int64_t block = begin;
    for (; block + kBlocks <= end; block += kBlocks) multiply_blocks<kBatch, kBlocks>(p, block);
    for (; block < end; ++block) multiply_blocks<kBatch, 1>(p, block);
}

#else

// A table per column: what codes 0 to 3 add.
constexpr int64_t kTableFloats = kTernaryColumns * 4;

void tables(const float* x, int64_t batch, int64_t in_features, int64_t begin, int64_t end,
            float* out) {
    float v[kTernaryColumns];
    for (int64_t w = begin; w < end; ++w)
        for (int64_t m = 0; m < batch; ++m) {
            word_of(x + m * in_features, in_features, w, v);
            float* table = out + (w * batch + m) * kTableFloats;
            for (int64_t j = 0; j < kTernaryColumns; ++j) {
                table[4 * j] = -v[j];
                table[4 * j + 1] = table[4 * j + 3] = 0.0f * v[j];  // NaN for NaN and Inf
                table[4 * j + 2] = v[j];
            }
        }
}

// sums[row] += the table entries that the codes of one word choose, in the pairs and the order of
// the wider tables above.
#if defined(__AVX2__)
inline Vec chosen(const float* table, __m256i code, int column) {
    const Vec entries = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(table + 4 * column));
    return _mm256_permutevar_ps(entries, _mm256_srli_epi32(code, column % 4 * 8 + column / 4 * 2));
}
inline void add_word(const uint32_t* code, const float* table, Vec sum[2]) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code + 8));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const int j = i % 2 * 8 + i / 2;
        sum[0] = add(sum[0], add(chosen(table, low, j), chosen(table, low, j + 4)));
        sum[1] = add(sum[1], add(chosen(table, high, j), chosen(table, high, j + 4)));
    }
}
#else
inline void add_word(const uint32_t* code, const float* table, Vec sum[kRows / kWidth]) {
    float lanes[kRows];
    std::memcpy(lanes, sum, sizeof lanes);
    const auto chosen = [&](int r, int j) {
        return table[4 * j + (code[r] >> (j % 4 * 8 + j / 4 * 2) & 3u)];
    };
    for (int i = 0; i < 8; ++i)
        for (int r = 0; r < kRows; ++r) {
            const int j = i % 2 * 8 + i / 2;
            lanes[r] += chosen(r, j) + chosen(r, j + 4);
        }
    std::memcpy(sum, lanes, sizeof lanes);
}
#endif

template <int kBatch>
inline void multiply_all(const TernaryTile& p, int64_t begin, int64_t end) {
    constexpr int kVecs = kRows / kWidth;
    for (int64_t block = begin; block < end; ++block) {
        alignas(64) float totals[kBatch][kRows] = {};
        for (int64_t w0 = 0; w0 < p.words; w0 += kSumWords) {
            const int64_t w1 = p.words - w0 < kSumWords ? p.words : w0 + kSumWords;
            Vec sum[kBatch][kVecs];
            for (int m = 0; m < kBatch; ++m)
                for (int v = 0; v < kVecs; ++v) sum[m][v] = zero();
            for (int64_t w = w0; w < w1; ++w)
                for (int m = 0; m < kBatch; ++m)
                    add_word(p.codes + (block * p.words + w) * kRows,
                             p.tables + (w * kBatch + m) * kTableFloats, sum[m]);
            for (int m = 0; m < kBatch; ++m)
                for (int v = 0; v < kVecs; ++v) {
                    float* total = totals[m] + v * kWidth;
                    store(total, add(load(total), sum[m][v]));
                }
        }
        for (int m = 0; m < kBatch; ++m)
            finish(totals[m], p.scale, p.scale_by_row, p.bias, block, p.out_features,
                   p.y + m * p.out_features);
    }
}

#endif

void multiply(const TernaryTile& p, int64_t begin, int64_t end) {
    p.batch == 1 ? multiply_all<1>(p, begin, end) : multiply_all<2>(p, begin, end);
}

}  // namespace

const TernaryKernels LS_KERNELS(ternary_linear) = {kTableFloats, tables, multiply};

}  // namespace lottery_sparse
