#include "linear/list_rows.h"
#include "linear/sparse_linear.h"

namespace lottery_sparse {
namespace {

constexpr int kTileVecs = kTileBatch / kWidth;
// Kept weights in flight: enough independent sums to hide the latency of a multiply-add.
constexpr int kInFlight = 2;
// Vectors of a tile that are summed at a time: as many as the registers hold.
constexpr int kPartVecs = kTileVecs < 4 ? kTileVecs : 4;

void pack_tile(const float* source, int64_t batch, int64_t features, float* tile) {
    if (batch < kTileBatch) std::memset(tile, 0, features * kTileBatch * sizeof(float));
    const int64_t block_rows = batch / 8 * 8, block_features = features / 8 * 8;
    for (int64_t k = 0; k < block_features; k += 8)
        for (int64_t b = 0; b < block_rows; b += 8)
            transpose_8x8(source + b * features + k, features, tile + k * kTileBatch + b,
                          kTileBatch);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t k = b < block_rows ? block_features : 0; k < features; ++k)
            tile[k * kTileBatch + b] = source[b * features + k];
}

// sums[0..kPartVecs kWidth) = bias + sum over kept entries [begin, end) of value * tile[column].
template <class Index>
inline void multiply_part(const KeptRows<Index>& rows, int64_t begin, int64_t end,
                          const float* tile, float bias, float* sums) {
    Vec sum[kInFlight][kPartVecs];
    for (int f = 0; f < kInFlight; ++f)
        for (int v = 0; v < kPartVecs; ++v) sum[f][v] = f == 0 ? broadcast(bias) : zero();
    int64_t i = begin;
    for (; i + kInFlight <= end; i += kInFlight) {
        for (int f = 0; f < kInFlight; ++f) {
            const float* x = tile + static_cast<int64_t>(rows.columns[i + f]) * kTileBatch;
            const Vec value = broadcast(rows.values[i + f]);
            for (int v = 0; v < kPartVecs; ++v)
                sum[f][v] = fma(value, load(x + v * kWidth), sum[f][v]);
        }
    }
    for (; i < end; ++i) {
        const float* x = tile + static_cast<int64_t>(rows.columns[i]) * kTileBatch;
        const Vec value = broadcast(rows.values[i]);
        for (int v = 0; v < kPartVecs; ++v) sum[0][v] = fma(value, load(x + v * kWidth), sum[0][v]);
    }
    for (int v = 0; v < kPartVecs; ++v) {
        for (int f = 1; f < kInFlight; ++f) sum[0][v] = add(sum[0][v], sum[f][v]);
        store(sums + v * kWidth, sum[0][v]);
    }
}

// The same for sums[0..kTileBatch).
template <class Index>
inline void multiply_row(const KeptRows<Index>& rows, int64_t begin, int64_t end, const float* tile,
                         float bias, float* sums) {
    for (int b = 0; b < kTileBatch; b += kPartVecs * kWidth)
        multiply_part(rows, begin, end, tile + b, bias, sums + b);
}

// out[b][i] (+)= sums[i][b] for the first n (<= kRowBlock) rows of sums and the batch.
inline void store_block(const float* sums, int64_t n, float* out, int64_t out_stride, int64_t batch,
                        bool add_to_out) {
    if (n == kRowBlock && batch == kTileBatch && !add_to_out) {  // the usual case
        for (int64_t b = 0; b < kTileBatch; b += 8)
            for (int64_t i = 0; i < kRowBlock; i += 8)
                transpose_8x8(sums + i * kTileBatch + b, kTileBatch, out + b * out_stride + i,
                              out_stride);
        return;
    }
    alignas(64) float by_batch[kTileBatch][kRowBlock];
    for (int64_t i = 0; i < n; i += 8)
        for (int64_t b = 0; b < kTileBatch; b += 8)
            transpose_8x8(sums + i * kTileBatch + b, kTileBatch, &by_batch[b][i], kRowBlock);
    if (n == kRowBlock && !add_to_out) {  // at a length the compiler knows
        for (int64_t b = 0; b < batch; ++b)
            std::memcpy(out + b * out_stride, by_batch[b], sizeof(by_batch[b]));
        return;
    }
    for (int64_t b = 0; b < batch; ++b) {
        float* row = out + b * out_stride;
        if (add_to_out)
            for (int64_t i = 0; i < n; ++i) row[i] += by_batch[b][i];
        else
            for (int64_t i = 0; i < n; ++i) row[i] = by_batch[b][i];
    }
}

template <class Index>
bool multiply(const TileProduct<Index>& p, int64_t begin, int64_t end) {
    alignas(64) float sums[kRowBlock][kTileBatch];
    for (int64_t r0 = begin; r0 < end; r0 += kRowBlock) {
        const int64_t n = end - r0 < kRowBlock ? end - r0 : kRowBlock;
        if (p.bounds && !rows_fit(*p.bounds, p.rows.columns, p.rows.starts + r0, n)) return false;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t first = p.rows.starts[r0 + i], last = p.rows.starts[r0 + i + 1];
            multiply_row(p.rows, first, last, p.tile, p.bias ? p.bias[r0 + i] : 0.0f, sums[i]);
        }
        store_block(sums[0], n, p.out + r0, p.out_stride, p.batch, p.add);
    }
    return true;
}

template <class Index>
void multiply_packed(const PackedProduct<Index>& p, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        float* out = p.out + r * kTileBatch;
        multiply_row(p.rows, p.rows.starts[r], p.rows.starts[r + 1], p.tile,
                     p.bias ? p.bias[r] : 0.0f, out);
        if (p.relu)  // keeps NaN, as torch.relu does
            for (int b = 0; b < kTileBatch; ++b) out[b] = out[b] < 0.0f ? 0.0f : out[b];
        if (p.gate)
            for (int b = 0; b < kTileBatch; ++b)
                out[b] = p.gate[r * kTileBatch + b] <= 0.0f ? 0.0f : out[b];
    }
}

// First of [begin, end) whose column is not below `column`.
template <class Index>
inline int64_t lower_bound(const Index* columns, int64_t begin, int64_t end, int64_t column) {
    while (begin < end) {
        const int64_t middle = begin + (end - begin) / 2;
        if (static_cast<int64_t>(columns[middle]) < column)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin;
}

template <class Index>
void scatter(const ScatterProduct<Index>& p) {
    std::memset(p.sums, 0, (p.last - p.first) * kTileBatch * sizeof(float));
    float* sums = p.sums - p.first * kTileBatch;
    for (int64_t r = 0; r < p.row_count; ++r) {
        int64_t i = p.rows.starts[r];
        const int64_t end = p.rows.starts[r + 1];
        if (p.first > 0) i = lower_bound(p.rows.columns, i, end, p.first);
        Vec x[kTileVecs];
        for (int v = 0; v < kTileVecs; ++v) x[v] = load(p.tile + r * kTileBatch + v * kWidth);
        for (; i < end && static_cast<int64_t>(p.rows.columns[i]) < p.last; ++i) {
            float* sum = sums + static_cast<int64_t>(p.rows.columns[i]) * kTileBatch;
            const Vec value = broadcast(p.rows.values[i]);
            for (int v = 0; v < kTileVecs; ++v)
                store(sum + v * kWidth, fma(value, x[v], load(sum + v * kWidth)));
        }
    }
    for (int64_t c = p.first; c < p.last; c += kRowBlock) {
        const int64_t n = p.last - c < kRowBlock ? p.last - c : kRowBlock;
        store_block(sums + c * kTileBatch, n, p.out + (c - p.first), p.out_stride, p.batch, p.add);
    }
}

// kSumGroup kept entries of a row share the row's dy: each sums its own products, lane by lane.
template <class Index>
bool sample(const SampledProduct<Index>& p, int64_t begin, int64_t end) {
    alignas(64) float sums[kSumGroup];
    for (int64_t r = begin; r < end; ++r) {
        float* dw = p.kept ? nullptr : p.dw + r * p.in_features;
        if (dw && !p.add) std::memset(dw, 0, p.in_features * sizeof(float));
        const int64_t row_begin = p.rows.starts[r], row_end = p.rows.starts[r + 1];
        if (p.bounds && (r - begin) % kRowBlock == 0 &&
            !rows_fit(*p.bounds, p.rows.columns, p.rows.starts + r, std::min(kRowBlock, end - r)))
            return false;
        for (int64_t i = row_begin; i < row_end; i += kSumGroup) {
            const int n = static_cast<int>(row_end - i < kSumGroup ? row_end - i : kSumGroup);
            int64_t offset[kSumGroup];  // a short group repeats its last entry
            for (int j = 0; j < kSumGroup; ++j)
                offset[j] = static_cast<int64_t>(p.rows.columns[i + (j < n ? j : n - 1)]);
            Vec sum[kSumGroup][kSumVecs];
            for (int j = 0; j < kSumGroup; ++j)
                for (int s = 0; s < kSumVecs; ++s) sum[j][s] = zero();
            for (int64_t t = 0; t < p.tiles; ++t) {
                const float* dy = p.dy + (t * p.out_features + r) * kTileBatch;
                const float* x = p.x + t * p.in_features * kTileBatch;
                for (int b = 0; b < kTileBatch; b += kSumLanes) {
                    Vec dy_b[kSumVecs];
                    for (int s = 0; s < kSumVecs; ++s) dy_b[s] = load(dy + b + s * kWidth);
                    for (int j = 0; j < kSumGroup; ++j)
                        for (int s = 0; s < kSumVecs; ++s)
                            sum[j][s] =
                                fma(dy_b[s], load(x + offset[j] * kTileBatch + b + s * kWidth),
                                    sum[j][s]);
                }
            }
            const Sums found = horizontal_sums(sum);
            if (!dw && !p.add && n == kSumGroup) {
                store(p.kept + i, found);
                continue;
            }
            if (!dw && !p.add) {
                store_first(p.kept + i, found, n);
                continue;
            }
            store(sums, found);
            if (dw)
                for (int j = 0; j < n; ++j) dw[offset[j]] += sums[j];
            else
                for (int j = 0; j < n; ++j) p.kept[i + j] += sums[j];
        }
    }
    return true;
}

float sum_row(const float* row, int64_t tiles, int64_t stride) {
    Vec sum[kTileVecs];
    for (int v = 0; v < kTileVecs; ++v) sum[v] = zero();
    for (int64_t t = 0; t < tiles; ++t)
        for (int v = 0; v < kTileVecs; ++v)
            sum[v] = add(sum[v], load(row + t * stride + v * kWidth));
    alignas(64) float lanes[kTileBatch];
    for (int v = 0; v < kTileVecs; ++v) store(lanes + v * kWidth, sum[v]);
    float total = 0.0f;
    for (float lane : lanes) total += lane;
    return total;
}

#if defined(__AVX512F__)
inline __m512i load_indices(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i load_indices(const uint32_t* p) {
    return _mm512_loadu_si512(p);
}

// Element i is p[index[i]], of 64 floats.
inline Vec choose_64(const float* p, __m512i index) {
    const Vec low = _mm512_permutex2var_ps(load(p), index, load(p + 16));
    const Vec high = _mm512_permutex2var_ps(load(p + 32), index, load(p + 48));
    return _mm512_mask_mov_ps(low, _mm512_cmpgt_epi32_mask(index, _mm512_set1_epi32(31)), high);
}
#endif

template <class Index>
void gather_row(const float* row, int64_t columns, const Index* kept, int64_t count,
                float* values) {
    int64_t i = 0;
#if defined(__AVX512F__)
    constexpr int64_t kSpan = 64;
    for (; i + kWidth <= count; i += kWidth) {
        const int64_t first = kept[i], last = kept[i + kWidth - 1];
        const int64_t base = first + kSpan <= columns ? first : columns - kSpan;
        if (base >= 0 && last - base < kSpan) {
            const __m512i from = _mm512_set1_epi32(static_cast<int>(base));
            store(values + i,
                  choose_64(row + base, _mm512_sub_epi32(load_indices(kept + i), from)));
        } else {
            for (int64_t j = i; j < i + kWidth; ++j) values[j] = row[kept[j]];
        }
    }
#endif
    for (; i < count; ++i) values[i] = row[kept[i]];
}

template <class Index>
constexpr SparseLinearKernels<Index> kKernels = {list_rows<Index, float>,
                                                 pack_tile,
                                                 multiply,
                                                 multiply_packed,
                                                 scatter,
                                                 sample,
                                                 sum_row,
                                                 gather_row,
                                                 order};

}  // namespace

const SparseLinearKernels<uint16_t> LS_KERNELS(sparse_linear_16) = kKernels<uint16_t>;
const SparseLinearKernels<uint32_t> LS_KERNELS(sparse_linear_32) = kKernels<uint32_t>;

}  // namespace lottery_sparse
