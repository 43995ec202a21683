#include "common/simd.h"
#include "conv2d/sparse_conv2d_planes.h"

namespace lottery_sparse {
namespace {

inline void store_first(float* p, Vec v, int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#elif defined(__AVX2__)
    // masked stores of this width take AMD's processors dozens of cycles
    __m128 left = _mm256_castps256_ps128(v);
    if (n & 4) {
        _mm_storeu_ps(p, left);
        left = _mm256_extractf128_ps(v, 1);
        p += 4;
    }
    if (n & 2) {
        _mm_storel_pi(reinterpret_cast<__m64*>(p), left);
        left = _mm_movehl_ps(left, left);
        p += 2;
    }
    if (n & 1) _mm_store_ss(p, left);
#else
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

template <bool kWhole>
inline Vec load_part(const float* p, int64_t n) {
    return kWhole ? load(p) : load_first(p, n);
}
template <bool kWhole>
inline void store_part(float* p, Vec v, int64_t n) {
    if (kWhole)
        store(p, v);
    else
        store_first(p, v, n);
}

// Copies the rows of a plane into the middle of its padding, and sums their lanes.
inline void place(const PaddedPlane& padded, const float* plane, float* out, Vec (&sum)[kSumVecs]) {
    const int64_t width = padded.image.w, height = padded.image.h, pitch = padded.pitch;
    Vec lanes[kSumVecs];
    for (Vec& part : lanes) part = zero();
    float* target = out + padded.at(0, 0);
    const auto copy = [&](int64_t w, int s, Vec v) {
        lanes[s] = add(lanes[s], v);
        store(target + w + s * kWidth, v);
    };
    for (int64_t h = 0; h < height; ++h, plane += width, target += pitch) {
        int64_t w = 0;
        for (; w + kSumLanes <= width; w += kSumLanes)
            for (int s = 0; s < kSumVecs; ++s) copy(w, s, load(plane + w + s * kWidth));
#pragma GCC unroll 4
        for (int s = 0; s < kSumVecs; ++s) {
            const int64_t left = width - w - s * kWidth;
            if (left >= kWidth)
                copy(w, s, load(plane + w + s * kWidth));
            else if (left > 0)
                copy(w, s, load_first(plane + w + s * kWidth, left));
        }
    }
    for (int s = 0; s < kSumVecs; ++s) sum[s] = lanes[s];
}

void pad(const PaddedPlane& padded, const float* planes, int64_t count, float* out) {
    const int64_t floats = padded.floats(), pixels = padded.image.h * padded.image.w;
    std::memset(out, 0, count * floats * sizeof(float));
    Vec unused[kSumVecs];
    for (int64_t c = 0; c < count; ++c)
        place(padded, planes + c * pixels, out + c * floats, unused);
}

// ---- y -----------------------------------------------------------------------------------------

template <int kRows, int kVecs, bool kWhole>
inline void multiply_block(const PlaneTap* taps, const PlaneTap* end, float bias,
                           const float* source, int64_t pitch, float* out, int64_t width,
                           int64_t n) {
    Vec sum[kRows][kVecs];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] = broadcast(bias);
    for (; taps != end; ++taps) {
        const float* x = source + taps->offset;
        const Vec value = broadcast(taps->value);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v)
                sum[r][v] = fma(value, load(x + r * pitch + v * kWidth), sum[r][v]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v)
            store_part<kWhole>(out + r * width + v * kWidth, sum[r][v], n);
}

template <int kRows>
inline void multiply_rows(const PlaneProduct& p, const PlaneTap* taps, const PlaneTap* end,
                          float bias, int64_t h, float* out) {
    const float* source = p.source + h * p.pitch;
    const int64_t width = p.output.w;
    out += h * width;
    int64_t w = 0;
    for (; w + 2 * kWidth <= width; w += 2 * kWidth)
        multiply_block<kRows, 2, true>(taps, end, bias, source + w, p.pitch, out + w, width, 0);
    for (; w + kWidth <= width; w += kWidth)
        multiply_block<kRows, 1, true>(taps, end, bias, source + w, p.pitch, out + w, width, 0);
    if (w < width)
        multiply_block<kRows, 1, false>(taps, end, bias, source + w, p.pitch, out + w, width,
                                        width - w);
}

void multiply(const PlaneProduct& p, int64_t begin, int64_t end) {
    const int64_t pixels = p.output.h * p.output.w;
    for (int64_t c = begin; c < end; ++c) {
        const PlaneTap *taps = p.taps + p.starts[c], *last = p.taps + p.starts[c + 1];
        const float bias = p.bias ? p.bias[c] : 0.0f;
        float* out = p.y + c * pixels;
        if (taps == last) {
            int64_t i = 0;
            for (; i + kWidth <= pixels; i += kWidth) store(out + i, broadcast(bias));
            for (; i < pixels; ++i) out[i] = bias;
            continue;
        }
        int64_t h = 0;
        for (; h + 4 <= p.output.h; h += 4) multiply_rows<4>(p, taps, last, bias, h, out);
        for (; h < p.output.h; ++h) multiply_rows<1>(p, taps, last, bias, h, out);
    }
}

// ---- dx, dvalues and dbias ---------------------------------------------------------------------

// Rows of dx and x, and where the taps read dy for them. Rows of dx have room for whole vectors: a
// masked store would keep the next row's load waiting.
struct PlaneRows {
    float* dx;
    int64_t dx_pitch;
    const float* x;
    int64_t width;
    int64_t pitch;  // of dy
};

// For a vector of columns of kRows rows, or n lanes of it: dx += value dy, sums += x dy. The
// pointers are those of the first row; `from` is where the taps read dy for it.
template <int kTaps, int kRows, bool kDx, bool kSample, bool kWhole>
inline void gradient_block(const PlaneRows& rows, const float* const (&reads)[kTaps],
                           const Vec (&values)[kTaps], float* dx, const float* x, int64_t from,
                           int64_t n, Vec (&sums)[kTaps][kRows]) {
    Vec to[kRows], factor[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        if (kDx) to[r] = load(dx + r * rows.dx_pitch);
        if (kSample) factor[r] = load_part<kWhole>(x + r * rows.width, n);
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const Vec d = load_part<kWhole>(reads[t] + from + r * rows.pitch, n);
            if (kDx) to[r] = fma(values[t], d, to[r]);
            if (kSample) sums[t][r] = fma(factor[r], d, sums[t][r]);
        }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
        if (kDx) store(dx + r * rows.dx_pitch, to[r]);
}

// kRows rows at a time from h on, up to `end`; adds to dvalues. A sum of dvalues has kSumLanes
// lanes, which are the columns modulo kSumLanes: one vector of them at a time.
template <int kTaps, int kRows, bool kDx, bool kSample>
inline int64_t gradient_rows(const PlaneRows& all, const PlaneTap* taps, const float* dy, int64_t h,
                             int64_t end, float* dvalues) {
    constexpr int kPasses = kSample ? kSumVecs : 1, kStride = kPasses * kWidth;
    const PlaneRows rows = all;
    const float* reads[kTaps];
    Vec values[kTaps], lanes[kTaps][kSumVecs];
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) {
        values[t] = broadcast(taps[t].value);
        reads[t] = dy + taps[t].offset;
    }
    const int64_t first = h;
#pragma GCC unroll 4
    for (int s = 0; s < kPasses; ++s) {
        Vec sums[kTaps][kRows];
#pragma GCC unroll 4
        for (int t = 0; t < kTaps; ++t)
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) sums[t][r] = zero();
        if (s * kWidth < rows.width) {
            float* dx = rows.dx + first * rows.dx_pitch;
            const float* x = rows.x + first * rows.width;
            int64_t from = first * rows.pitch;
            for (h = first; h + kRows <= end; h += kRows) {
                int64_t w = s * kWidth;
                for (; w + kWidth <= rows.width; w += kStride)
                    gradient_block<kTaps, kRows, kDx, kSample, true>(rows, reads, values, dx + w,
                                                                     x + w, from + w, 0, sums);
                if (w < rows.width)
                    gradient_block<kTaps, kRows, kDx, kSample, false>(
                        rows, reads, values, dx + w, x + w, from + w, rows.width - w, sums);
                dx += kRows * rows.dx_pitch;
                x += kRows * rows.width;
                from += kRows * rows.pitch;
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < kTaps; ++t) {
            lanes[t][s] = sums[t][0];
#pragma GCC unroll 4
            for (int r = 1; r < kRows; ++r) lanes[t][s] = add(lanes[t][s], sums[t][r]);
        }
    }
    if (kSample)
#pragma GCC unroll 4
        for (int t = 0; t < kTaps; ++t) dvalues[t] += halved_sum(lanes[t]);
    return h;
}

// kTaps weights of one row that read one input plane.
template <int kTaps, bool kDx, bool kSample>
void gradient_taps(const PlaneGradients& p, const PlaneTap* taps, const float* dy, float* dx,
                   float* dvalues) {
    constexpr int kRows = kTaps == 1 ? 4 : 2;  // enough sums for the latency of fma
    const int64_t end = p.image.h, dx_pitch = whole_rows(p.image.w);
    const PlaneRows rows = {kDx ? dx + taps->channel * end * dx_pitch : nullptr, dx_pitch,
                            kSample ? p.x + taps->channel * end * p.image.w : nullptr, p.image.w,
                            p.padded->pitch};
    const int64_t h = gradient_rows<kTaps, kRows, kDx, kSample>(rows, taps, dy, 0, end, dvalues);
    if (h < end) gradient_rows<kTaps, 1, kDx, kSample>(rows, taps, dy, h, end, dvalues);
}

template <bool kDx, bool kSample>
void gradients_of(const PlaneGradients& p) {
    alignas(64) float padded[kPlaneFloats], wide[kPlaneFloats];
    std::memset(padded, 0, p.padded->floats() * sizeof(float));
    const int64_t pixels = p.padded->image.h * p.padded->image.w;
    const int64_t width = p.image.w, pitch = whole_rows(width), rows = p.in_channels * p.image.h;
    float* dx = kDx && pitch > width ? wide : p.dx;
    if (kDx && dx != p.dx)
        for (int64_t h = 0; h < rows; ++h)
            std::memcpy(dx + h * pitch, p.dx + h * width, width * sizeof(float));
    for (int64_t r = 0; r < p.out_channels; ++r) {
        const int64_t end = p.starts[r + 1];
        if (p.starts[r] == end && !p.dbias) continue;
        Vec sum[kSumVecs];
        place(*p.padded, p.dy + r * pixels, padded, sum);
        if (p.dbias) p.dbias[r] += halved_sum(sum);
        if (!kDx && !kSample) continue;
        for (int64_t i = p.starts[r]; i < end;) {
            const PlaneTap* taps = p.taps + i;
            int n = 1;
            while (n < 4 && i + n < end && taps[n].channel == taps->channel) ++n;
            float* dvalues = kSample ? p.dvalues + i : nullptr;
            if (n == 4)
                gradient_taps<4, kDx, kSample>(p, taps, padded, dx, dvalues);
            else if (n == 3)
                gradient_taps<3, kDx, kSample>(p, taps, padded, dx, dvalues);
            else if (n == 2)
                gradient_taps<2, kDx, kSample>(p, taps, padded, dx, dvalues);
            else
                gradient_taps<1, kDx, kSample>(p, taps, padded, dx, dvalues);
            i += n;
        }
    }
    if (kDx && dx != p.dx)
        for (int64_t h = 0; h < rows; ++h)
            std::memcpy(p.dx + h * width, dx + h * pitch, width * sizeof(float));
}

void gradients(const PlaneGradients& p) {
    if (p.dx && p.dvalues)
        gradients_of<true, true>(p);
    else if (p.dx)
        gradients_of<true, false>(p);
    else if (p.dvalues)
        gradients_of<false, true>(p);
    else
        gradients_of<false, false>(p);
}

}  // namespace

const SparseConv2dPlanesKernels LS_KERNELS(sparse_conv2d_planes) = {pad, multiply, gradients};

}  // namespace lottery_sparse
