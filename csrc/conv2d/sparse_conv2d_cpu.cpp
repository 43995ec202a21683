#include "common/simd.h"
#include "conv2d/sparse_conv2d.h"

namespace lottery_sparse {
namespace {

static_assert(kLanes == kSumLanes);
constexpr int kLineVecs = kSumVecs;

// ---- between images and lines -------------------------------------------------------------------

// out[j][lane] = source[lane * stride + j] for j < count (<= kLanes); missing lanes are 0.
inline void lines_of(const float* source, int64_t stride, int64_t lanes, int64_t count,
                     float (*out)[kLanes]);
// target[lane * stride + j] (+)= lines[j][lane]
inline void images_of(const float* const* lines, int64_t lanes, int64_t count, float* target,
                      int64_t stride, bool add_to_target);

#if defined(__AVX512F__)
inline void transpose(Vec v[16]) {
    Vec t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
        const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
        v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    // v[4 q + j], 128-bit lane l: column 4 l + j of rows 4 q ... 4 q + 3
    for (int j = 0; j < 4; ++j) {
        const Vec low = _mm512_shuffle_f32x4(v[j], v[4 + j], 0x88);
        const Vec high = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0x88);
        const Vec low_odd = _mm512_shuffle_f32x4(v[j], v[4 + j], 0xDD);
        const Vec high_odd = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0xDD);
        t[j] = _mm512_shuffle_f32x4(low, high, 0x88);
        t[8 + j] = _mm512_shuffle_f32x4(low, high, 0xDD);
        t[4 + j] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
        t[12 + j] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xDD);
    }
    for (int i = 0; i < 16; ++i) v[i] = t[i];
}

inline void lines_of(const float* source, int64_t stride, int64_t lanes, int64_t count,
                     float (*out)[kLanes]) {
    Vec v[16];
    const __mmask16 valid = static_cast<__mmask16>((1u << count) - 1);
    if (lanes == kLanes)
        for (int i = 0; i < 16; ++i) v[i] = _mm512_maskz_loadu_ps(valid, source + i * stride);
    else
        for (int i = 0; i < 16; ++i)
            v[i] = i < lanes ? _mm512_maskz_loadu_ps(valid, source + i * stride) : zero();
    transpose(v);
    for (int i = 0; i < 16; ++i) store(out[i], v[i]);
}

inline void images_of(const float* const* lines, int64_t lanes, int64_t count, float* target,
                      int64_t stride, bool add_to_target) {
    Vec v[16];
    for (int i = 0; i < 16; ++i) v[i] = load(lines[i]);
    transpose(v);
    const __mmask16 valid = static_cast<__mmask16>((1u << count) - 1);
    for (int64_t i = 0; i < lanes; ++i) {
        float* row = target + i * stride;
        if (add_to_target) v[i] = add(v[i], _mm512_maskz_loadu_ps(valid, row));
        _mm512_mask_storeu_ps(row, valid, v[i]);
    }
}
#else
inline void lines_of(const float* source, int64_t stride, int64_t lanes, int64_t count,
                     float (*out)[kLanes]) {
    if (lanes == kLanes && count == kLanes) {
        for (int l = 0; l < kLanes; l += 8)
            for (int j = 0; j < kLanes; j += 8)
                transpose_8x8(source + l * stride + j, stride, &out[j][l], kLanes);
        return;
    }
    for (int64_t j = 0; j < count; ++j)
        for (int64_t l = 0; l < kLanes; ++l) out[j][l] = l < lanes ? source[l * stride + j] : 0.0f;
}

inline void images_of(const float* const* lines, int64_t lanes, int64_t count, float* target,
                      int64_t stride, bool add_to_target) {
    alignas(64) float together[kLanes][kLanes], by_lane[kLanes][kLanes];
    for (int j = 0; j < kLanes; ++j) std::memcpy(together[j], lines[j], sizeof together[j]);
    for (int l = 0; l < kLanes; l += 8)
        for (int j = 0; j < kLanes; j += 8)
            transpose_8x8(&together[j][l], kLanes, &by_lane[l][j], kLanes);
    for (int64_t l = 0; l < lanes; ++l) {
        float* row = target + l * stride;
        if (add_to_target)
            for (int64_t j = 0; j < count; ++j) row[j] += by_lane[l][j];
        else
            std::memcpy(row, by_lane[l], count * sizeof(float));
    }
}
#endif

inline void copy_line(float* target, const float* source) {
    for (int v = 0; v < kLineVecs; ++v) store(target + v * kWidth, load(source + v * kWidth));
}

void pack(const PackPlanes& p, int64_t channel_begin, int64_t channel_end) {
    const int64_t plane = p.plane * kLanes;
    for (int64_t c = channel_begin; c < channel_end; ++c)
        for (int64_t g = 0; g < p.gap_count; ++g)
            std::memset(p.planes + c * plane + p.gaps[2 * g] * kLanes, 0,
                        (p.gaps[2 * g + 1] - p.gaps[2 * g]) * kLanes * sizeof(float));
    alignas(64) float lines[kLanes][kLanes];
    const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    if (p.channels_last) {
        for (int64_t q = 0; q < p.pixels; ++q) {
            if (p.lines[q] < 0) continue;
            float* target = p.planes + p.lines[q] * kLanes;
            for (int64_t c = channel_begin; c < channel_end; c += kLanes) {
                const int64_t n = least(kLanes, channel_end - c);
                lines_of(p.images + q * p.channels + c, p.image_stride, p.lanes, n, lines);
                for (int64_t j = 0; j < n; ++j) copy_line(target + (c + j) * plane, lines[j]);
            }
        }
        return;
    }
    for (int64_t c = channel_begin; c < channel_end; ++c) {
        float* target = p.planes + c * plane;
        for (int64_t q = 0; q < p.pixels; q += kLanes) {
            const int64_t n = least(kLanes, p.pixels - q);
            lines_of(p.images + c * p.pixels + q, p.image_stride, p.lanes, n, lines);
            for (int64_t j = 0; j < n; ++j)
                if (p.lines[q + j] >= 0) copy_line(target + p.lines[q + j] * kLanes, lines[j]);
        }
    }
}

// ---- y and dx -----------------------------------------------------------------------------------

// Where a block reads and writes; in floats.
struct Block {
    const float* source;
    int64_t row;
    int64_t step;
    float* out;
    int64_t out_row;
    int64_t out_step;
};

// kStep is the step in lines, or 0 = known at run time only.
template <int kRows, int kColumns, int kStep>
inline void multiply_block(const Tap* taps, const Tap* end, float bias, const Block& b) {
    const int64_t step = kStep ? kStep * kLanes : b.step;
    Vec sum[kRows][kColumns];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < kColumns; ++c) sum[r][c] = broadcast(bias);
    for (; taps != end; ++taps) {
        const float* x = b.source + static_cast<int64_t>(taps->line) * kLanes;
        const Vec value = broadcast(taps->value);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
            for (int c = 0; c < kColumns; ++c)
                sum[r][c] = fma(value, load(x + r * b.row + c * step), sum[r][c]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < kColumns; ++c) store(b.out + r * b.out_row + c * b.out_step, sum[r][c]);
}

// Positions [0, size) of one channel and phase.
template <int kRows, int kStep>
void multiply_positions(const Tap* taps, const Tap* end, float bias, const Block& origin,
                        const Pair& size) {
    constexpr int kColumns = kBlock / kRows;
    // as many sums as the registers hold
    constexpr int kPart = kWidth == 16 || kColumns < 4 ? kColumns : kColumns / 2;
    for (int64_t h = 0; h < size.h; h += kRows)
        for (int64_t w = 0; w < size.w; w += kPart)
            for (int v = 0; v < kLineVecs; ++v) {
                Block b = origin;
                b.source += h * b.row + w * b.step + v * kWidth;
                b.out += h * b.out_row + w * b.out_step + v * kWidth;
                multiply_block<kRows, kPart, kStep>(taps, end, bias, b);
            }
}

using MultiplyPositions = void (*)(const Tap*, const Tap*, float, const Block&, const Pair&);

template <int kRows>
MultiplyPositions with_step(int64_t step) {
    if (step == 1) return multiply_positions<kRows, 1>;
    if (step == 2) return multiply_positions<kRows, 2>;
    return multiply_positions<kRows, 0>;
}

// Unpacks `scratch` [channels][rows][width] of the region's pixels into the images.
void unpack(const RegionProduct& p, int64_t c, int64_t channels, const float* scratch) {
    const Pair begin = {p.first.h * p.spread.h, p.first.w * p.spread.w};
    const Pair held = {p.size.h * p.spread.h, p.size.w * p.spread.w};
    const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    const int64_t rows = least(held.h, p.image.h - begin.h);
    const int64_t width = least(held.w, p.image.w - begin.w);
    const int64_t plane = held.h * held.w * kLanes;
    const float* lines[kLanes];
    if (p.channels_last) {
        for (int64_t h = 0; h < rows; ++h)
            for (int64_t w = 0; w < width; ++w) {
                const float* line = scratch + (h * held.w + w) * kLanes;
                for (int64_t j = 0; j < kLanes; ++j)
                    lines[j] = line + (j < channels ? j : 0) * plane;
                const int64_t pixel = (begin.h + h) * p.image.w + begin.w + w;
                images_of(lines, p.lanes, channels, p.images + pixel * p.channels + c,
                          p.image_stride, p.add);
            }
        return;
    }
    const bool together = width == p.image.w;  // rows follow each other in the image
    const int64_t runs = together ? 1 : rows, run = together ? rows * width : width;
    for (int64_t k = 0; k < channels; ++k)
        for (int64_t h = 0; h < runs; ++h) {
            const float* line = scratch + k * plane + h * held.w * kLanes;
            float* target =
                p.images + (c + k) * p.image.h * p.image.w + (begin.h + h) * p.image.w + begin.w;
            int64_t w = 0;
            for (int64_t q = 0; q < run; q += kLanes) {
                const int64_t n = least(kLanes, run - q);
                for (int64_t j = 0; j < kLanes; ++j) {
                    lines[j] = line + w * kLanes;
                    if (q + j + 1 < run && ++w == width) {
                        w = 0;
                        line += held.w * kLanes;
                    }
                }
                images_of(lines, p.lanes, n, target + q, p.image_stride, p.add);
            }
        }
}

void multiply(const RegionProduct& p) {
    alignas(64) float scratch[kScratchLines * kLanes];
    const auto positions = p.block_rows == 1   ? with_step<1>(p.step)
                           : p.block_rows == 2 ? with_step<2>(p.step)
                                               : with_step<4>(p.step);
    const int64_t width = p.size.w * p.spread.w, plane = p.size.h * p.spread.h * width;
    int64_t together = p.channels_last ? kScratchLines / plane : 1;
    if (together > kLanes) together = kLanes;
    const float* source = p.source + (p.first.h * p.row_lines + p.first.w * p.step) * kLanes;
    for (int64_t c = p.channel_begin; c < p.channel_end; c += together) {
        const int64_t n = p.channel_end - c < together ? p.channel_end - c : together;
        for (int64_t k = 0; k < n; ++k) {
            const float bias = p.bias ? p.bias[c + k] : 0.0f;
            for (int64_t i = 0; i < p.phase_count; ++i) {
                const Phase& phase = p.phases[i];
                float* out = scratch + (k * plane + phase.phase.h * width + phase.phase.w) * kLanes;
                positions(p.taps + phase.starts[c + k], p.taps + phase.starts[c + k + 1], bias,
                          {source, p.row_lines * kLanes, p.step * kLanes, out,
                           p.spread.h * width * kLanes, p.spread.w * kLanes},
                          p.size);
            }
        }
        unpack(p, c, n, scratch);
    }
}

// ---- dvalues and dbias --------------------------------------------------------------------------

// kEntries kept entries of a row share the row's dy: each sums its own products, lane by lane.
template <int kEntries, int kStep>
inline void sample_entries(const BandSample& p, const Tap* taps, int n, const float* dy,
                           Vec (&sum)[kSumGroup][kLineVecs]) {
    constexpr int kColumns = kLineVecs == 1 ? 4 : 1;
    const int64_t step = (kStep ? kStep : p.step) * kLanes;
    int64_t offset[kEntries];  // a short group repeats its last entry
    for (int j = 0; j < kEntries; ++j) offset[j] = taps[j < n ? j : n - 1].line * kLanes;
    Vec sums[kEntries][kLineVecs];
    for (int j = 0; j < kEntries; ++j)
        for (int v = 0; v < kLineVecs; ++v) sums[j][v] = zero();
    const auto add_columns = [&]<int kCount>(const float* dy_at, const float* x_at) {
        Vec d[kCount][kLineVecs];
        for (int c = 0; c < kCount; ++c)
            for (int v = 0; v < kLineVecs; ++v) d[c][v] = load(dy_at + c * kLanes + v * kWidth);
#pragma GCC unroll 16
        for (int j = 0; j < kEntries; ++j)
#pragma GCC unroll 4
            for (int c = 0; c < kCount; ++c)
#pragma GCC unroll 4
                for (int v = 0; v < kLineVecs; ++v)
                    sums[j][v] =
                        fma(d[c][v], load(x_at + offset[j] + c * step + v * kWidth), sums[j][v]);
    };
    for (int64_t h = 0; h < p.size.h; ++h) {
        const float* dy_row = dy + h * p.dy_row * kLanes;
        const float* x_row = p.x + h * p.x_row * kLanes;
        int64_t w = 0;
        for (; w + kColumns <= p.size.w; w += kColumns)
            add_columns.template operator()<kColumns>(dy_row + w * kLanes, x_row + w * step);
        for (; w < p.size.w; ++w)
            add_columns.template operator()<1>(dy_row + w * kLanes, x_row + w * step);
    }
    for (int j = 0; j < kEntries; ++j)
        for (int v = 0; v < kLineVecs; ++v) sum[j][v] = sums[j][v];
}

template <int kStep>
void sample_rows(const BandSample& p, int64_t begin, int64_t end) {
    alignas(64) float sums[kSumGroup];
    Vec sum[kSumGroup][kLineVecs];
    for (int64_t r = begin; r < end; ++r) {
        const float* dy = p.dy + r * p.dy_plane * kLanes;
        const int64_t row_end = p.starts[r + 1];
        for (int64_t i = p.starts[r]; i < row_end; i += kSumGroup) {
            const int n = static_cast<int>(row_end - i < kSumGroup ? row_end - i : kSumGroup);
            for (auto& lanes : sum)
                for (Vec& lane : lanes) lane = zero();
            if (kSumGroup > 8 && n > 8)
                sample_entries<kSumGroup, kStep>(p, p.taps + i, n, dy, sum);
            else if (kSumGroup > 4 && n > 4)
                sample_entries < kSumGroup<8 ? kSumGroup : 8, kStep>(p, p.taps + i, n, dy, sum);
            else if (n > 2)
                sample_entries<4, kStep>(p, p.taps + i, n, dy, sum);
            else
                sample_entries<2, kStep>(p, p.taps + i, n, dy, sum);
            store(sums, horizontal_sums(sum));
            for (int j = 0; j < n; ++j) p.dvalues[i + j] += sums[j];
        }
    }
}

void sample(const BandSample& p, int64_t begin, int64_t end) {
    for (int64_t r = begin; p.dbias && r < end; ++r) {
        Vec sum[kLineVecs];
        for (int v = 0; v < kLineVecs; ++v) sum[v] = zero();
        for (int64_t h = 0; h < p.size.h; ++h) {
            const float* row = p.dy + (r * p.dy_plane + h * p.dy_row) * kLanes;
            for (int64_t w = 0; w < p.size.w; ++w)
                for (int v = 0; v < kLineVecs; ++v)
                    sum[v] = add(sum[v], load(row + w * kLanes + v * kWidth));
        }
        alignas(64) float lanes[kLanes];
        for (int v = 0; v < kLineVecs; ++v) store(lanes + v * kWidth, sum[v]);
        float total = 0.0f;
        for (float lane : lanes) total += lane;
        p.dbias[r] += total;
    }
    if (!p.dvalues) return;
    if (p.step == 1)
        sample_rows<1>(p, begin, end);
    else if (p.step == 2)
        sample_rows<2>(p, begin, end);
    else
        sample_rows<0>(p, begin, end);
}

}  // namespace

const SparseConv2dKernels LS_KERNELS(sparse_conv2d) = {pack, multiply, sample};

}  // namespace lottery_sparse
