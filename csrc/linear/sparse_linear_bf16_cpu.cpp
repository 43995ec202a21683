#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms inside gcc's AVX-512 headers
#endif
#include "linear/list_rows.h"
#include "linear/sparse_linear.h"

namespace lottery_sparse {
namespace {

// A pair of features is one 32-bit number, so a block of 2 kWidth features and kWidth batch columns
// is a transposition of kWidth x kWidth numbers: half the shuffles of floats. Its results are split
// into the even feature, moved to the upper half, and the odd one, which is there.
constexpr int kBlock = kWidth;
constexpr int kBlockFeatures = 2 * kBlock;
static_assert(kTileBatch % kBlock == 0);

inline void pack_block(const Bfloat16* source, int64_t features, float* tile) {
#if defined(__AVX512F__)
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(source + i * features);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // a[i + j], 128-bit lane l: pair 4 l + j of rows i to i + 3
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {  // a transposition of lanes
        const __m512i low = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xDD);
        const __m512i high_odd = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xDD);
        b[j] = _mm512_shuffle_i32x4(low, high, 0x88);
        b[j + 8] = _mm512_shuffle_i32x4(low, high, 0xDD);
        b[j + 4] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        b[j + 12] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xDD);
    }
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    for (int p = 0; p < 16; ++p) {
        float* out = tile + 2 * p * kTileBatch;
        _mm512_storeu_si512(out, _mm512_slli_epi32(b[p], 16));
        _mm512_storeu_si512(out + kTileBatch, _mm512_and_si512(b[p], upper));
    }
#elif defined(__AVX2__)
    __m256i a[8], b[8];
    for (int i = 0; i < 8; ++i)
        a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i * features));
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        b[j] = _mm256_permute2x128_si256(a[j], a[j + 4], 0x20);
        b[j + 4] = _mm256_permute2x128_si256(a[j], a[j + 4], 0x31);
    }
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
    for (int p = 0; p < 8; ++p) {
        float* out = tile + 2 * p * kTileBatch;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_slli_epi32(b[p], 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kTileBatch),
                            _mm256_and_si256(b[p], upper));
    }
#else
    for (int f = 0; f < kBlockFeatures; ++f)
        for (int b = 0; b < kBlock; ++b)
            tile[f * kTileBatch + b] = number(source[b * features + f]);
#endif
}

// The same for a block that ends early.
inline void pack_part(const Bfloat16* source, int64_t features, int64_t rows, int64_t columns,
                      float* tile) {
    Bfloat16 padded[kBlock * kBlockFeatures] = {};
    for (int64_t r = 0; r < rows; ++r)
        std::memcpy(padded + r * kBlockFeatures, source + r * features, columns * sizeof(Bfloat16));
    alignas(64) float packed[kBlockFeatures * kTileBatch];
    pack_block(padded, kBlockFeatures, packed);
    for (int64_t f = 0; f < columns; ++f)
        std::memcpy(tile + f * kTileBatch, packed + f * kTileBatch, kBlock * sizeof(float));
}

void pack_tile(const Bfloat16* source, int64_t batch, int64_t features, float* tile) {
    for (int64_t k = 0; k < features; k += kBlockFeatures) {
        const int64_t columns = features - k < kBlockFeatures ? features - k : kBlockFeatures;
        for (int64_t b = 0; b < kTileBatch; b += kBlock) {
            const int64_t left = batch - b, rows = left < 0 ? 0 : left < kBlock ? left : kBlock;
            const Bfloat16* from = source + (rows ? b * features + k : 0);
            float* to = tile + k * kTileBatch + b;
            if (rows == kBlock && columns == kBlockFeatures)
                pack_block(from, features, to);
            else
                pack_part(from, features, rows, columns, to);
        }
    }
}

void widen(const Bfloat16* source, int64_t count, float* target) {
    for (int64_t i = 0; i < count; ++i) target[i] = number(source[i]);
}

void round(const float* source, int64_t count, Bfloat16* target) {
    for (int64_t i = 0; i < count; ++i) target[i] = rounded(source[i]);
}

void gather_row(const Bfloat16* row, int64_t columns, const uint16_t* kept, int64_t count,
                Bfloat16* values) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    constexpr int64_t kSpan = 64, kStep = 32;  // columns to choose from, and chosen at a time
    for (; i + kStep <= count; i += kStep) {
        const int64_t first = kept[i], last = kept[i + kStep - 1];
        const int64_t base = first + kSpan <= columns ? first : columns - kSpan;
        if (base >= 0 && last - base < kSpan) {
            const __m512i from = _mm512_set1_epi16(static_cast<int16_t>(base));
            const __m512i chosen =
                _mm512_permutex2var_epi16(_mm512_loadu_si512(row + base),
                                          _mm512_sub_epi16(_mm512_loadu_si512(kept + i), from),
                                          _mm512_loadu_si512(row + base + kStep));
            _mm512_storeu_si512(values + i, chosen);
        } else {
            for (int64_t j = i; j < i + kStep; ++j) values[j] = row[kept[j]];
        }
    }
#endif
    for (; i < count; ++i) values[i] = row[kept[i]];
}

}  // namespace

const Bfloat16Kernels LS_KERNELS(sparse_linear_bf16) = {
    pack_tile, list_rows<uint16_t, Bfloat16>, list_rows<uint32_t, Bfloat16>, widen, round, order,
    gather_row};

}  // namespace lottery_sparse
