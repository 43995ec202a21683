// compact_conv2d on planes: where they lie and in which order; kernels in
// sparse_conv2d_planes_cpu.cpp.
#include "conv2d/sparse_conv2d_planes.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "conv2d/sparse_conv2d_geometry.h"

namespace lottery_sparse {
namespace {

PaddedPlane padded_x(const Conv2dShape& s) {
    return {s.image, s.padding};
}

// dx reads dy as far outside as the kernel reaches beyond the padding.
PaddedPlane padded_dy(const Conv2dShape& s) {
    const auto pad = [](int64_t kernel, int64_t dilation, int64_t padding) {
        return std::max<int64_t>((kernel - 1) * dilation - padding, 0);
    };
    return {
        s.output,
        {pad(s.kernel.h, s.dilation.h, s.padding.h), pad(s.kernel.w, s.dilation.w, s.padding.w)}};
}

// The taps of all networks, [E, C]; offset(entry of the kernel) within a plane, and `plane` floats
// from a channel's plane to the next one.
template <class F>
Buffer<PlaneTap> taps_of(const Conv2dShape& s, const CompactLists& lists, const float* values,
                         int64_t plane, const F& offset, const Parallel& parallel) {
    ListCheck check;
    const int64_t kernel = s.kernel.h * s.kernel.w, in = s.in_channels / s.groups;
    const int64_t rows = s.out_channels, out = rows / s.groups;
    std::vector<int32_t> within(kernel);
    for (int64_t k = 0; k < kernel; ++k)
        within[k] = static_cast<int32_t>(offset(k / s.kernel.w, k % s.kernel.w));
    Buffer<PlaneTap> taps = buffer<PlaneTap>(s.replicates * lists.capacity);
    parallel(s.replicates * rows, kTapGrain, [&](int64_t begin, int64_t end) {
        if (!rows_fit(lists, rows, begin, end, in * kernel, check)) return;
        for (int64_t r = begin; r < end; ++r) {
            const int64_t e = r / rows, first = e * lists.capacity;
            const int64_t* starts = lists.starts + r + e;
            for (int64_t i = first + starts[0]; i < first + starts[1]; ++i) {
                const int64_t column = number_at(lists.columns, lists.wide, i);
                const int64_t channel = r % rows / out * in + column / kernel;
                taps[i] = {values ? values[i] : 0.0f,
                           static_cast<int32_t>(channel * plane + within[column % kernel]),
                           static_cast<int32_t>(channel)};
            }
        }
    });
    check.done();
    return taps;
}

}  // namespace

bool planes_fit(const Conv2dShape& s) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    return s.stride.h == 1 && s.stride.w == 1 && !s.channels_last &&
           padded_dy(s).floats() <= kPlaneFloats &&
           (s.image.w % kPlaneAlign == 0 ||
            s.in_channels * s.image.h * whole_rows(s.image.w) <= kPlaneFloats) &&
           padded_x(s).floats() <= kMost / std::max<int64_t>(s.in_channels, 1);
}

// An output plane has at most so many kept weights, as measured on 3x3 kernels with 1 to 64 input
// channels and widths of 8 to 32. Rows that fill their vectors badly cost products; small planes
// cost calls.
bool planes_win(const Conv2dShape& s, int64_t kept, bool backward) {
    constexpr double kMostForward = 8.0, kPixelsBackward = 300.0;
    constexpr int64_t kImageFloats = 1 << 16;  // of x: beyond, products wait for it
    const double filled = static_cast<double>(s.output.w) / whole_rows(s.output.w);
    const double pixels = static_cast<double>(s.output.h * s.output.w);
    const double most =
        backward ? pixels * filled / kPixelsBackward : kMostForward * filled * filled;
    return planes_fit(s) && kept <= most * s.out_channels &&
           s.in_channels * padded_x(s).floats() <= kImageFloats;
}

void compact_conv2d_planes_forward(const CompactConv2dForward& p, const Parallel& parallel) {
    const Conv2dShape& s = p.shape;
    const auto& kernels = LS_CHOSEN_KERNELS(sparse_conv2d_planes);
    const PaddedPlane padded = padded_x(s);
    const int64_t x_image = s.in_channels * s.image.h * s.image.w;
    const int64_t y_image = s.out_channels * s.output.h * s.output.w;
    const int64_t planes = s.in_channels * padded.floats();  // of an image
    const auto taps = taps_of(
        s, p.lists, p.values, padded.floats(),
        [&](int64_t r, int64_t c) {
            return padded.at(r * s.dilation.h - s.padding.h, c * s.dilation.w - s.padding.w);
        },
        parallel);
    // packed for all networks, some images at a time
    const int64_t networks = s.shared_x ? 1 : s.replicates;
    const int64_t bytes = networks * planes * static_cast<int64_t>(sizeof(float));
    const int64_t most = std::max<int64_t>(kGroupBytes / std::max<int64_t>(bytes, 1), 1);
    const int64_t size = std::min(most, s.batch);
    const Buffer<float> x = buffer<float>(size * networks * planes);
    const int64_t blocks = divide_up(s.out_channels, kTaskChannels);
    for (int64_t first = 0; first < s.batch; first += size) {
        const int64_t images = std::min(size, s.batch - first);
        parallel(images * networks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)  // [image, network]
                kernels.pad(padded, p.x + (i % networks * s.batch + first + i / networks) * x_image,
                            s.in_channels, x.get() + i * planes);
        });
        parallel(images * s.replicates * blocks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t c = i % blocks * kTaskChannels, e = i / blocks % s.replicates;
                const int64_t image = i / blocks / s.replicates;
                kernels.multiply(
                    {taps.get() + e * p.lists.capacity, p.lists.starts + e * (s.out_channels + 1),
                     x.get() + (image * networks + (s.shared_x ? 0 : e)) * planes, padded.pitch,
                     p.bias ? p.bias + e * s.out_channels : nullptr,
                     p.y + (e * s.batch + first + image) * y_image, s.output},
                    c, std::min(c + kTaskChannels, s.out_channels));
            }
        });
    }
}

void compact_conv2d_planes_backward(const CompactConv2dBackward& p, const Parallel& parallel) {
    const Conv2dShape& s = p.shape;
    const auto& kernels = LS_CHOSEN_KERNELS(sparse_conv2d_planes);
    const PaddedPlane padded = padded_dy(s);
    const int64_t x_image = s.in_channels * s.image.h * s.image.w;
    const int64_t y_image = s.out_channels * s.output.h * s.output.w;
    const int64_t capacity = p.lists.capacity, rows = s.out_channels;
    const auto taps = taps_of(
        s, p.lists, p.dx ? p.values : nullptr, 0,
        [&](int64_t r, int64_t c) {
            return padded.at(s.padding.h - r * s.dilation.h, s.padding.w - c * s.dilation.w);
        },
        parallel);
    // what kImagesOfTask images give, added up below: same bits for any thread count
    const int64_t parts = divide_up(s.batch, kImagesOfTask);
    const int64_t slots = p.dvalues ? capacity : 0, sums = slots + (p.dbias ? rows : 0);
    const Buffer<float> partial = buffer<float>(parts * s.replicates * sums);
    // networks that share x add to the same dx, one after the other
    const int64_t networks = s.shared_x ? s.replicates : 1;
    parallel(parts * s.replicates / networks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t part = i % parts, first = part * kImagesOfTask;
            const int64_t last = std::min(first + kImagesOfTask, s.batch);
            for (int64_t e = i / parts * networks; e < i / parts * networks + networks; ++e) {
                float* sum = partial.get() + (e * parts + part) * sums;
                std::memset(sum, 0, sums * sizeof(float));
                for (int64_t b = first; b < last; ++b) {
                    const int64_t at = ((s.shared_x ? 0 : e) * s.batch + b) * x_image;
                    float* dx = p.dx ? p.dx + at : nullptr;
                    if (dx && !(s.shared_x && (e > 0 || p.add_dx)))
                        std::memset(dx, 0, x_image * sizeof(float));
                    kernels.gradients({taps.get() + e * capacity, p.lists.starts + e * (rows + 1),
                                       rows, s.in_channels, &padded,
                                       p.dy + (e * s.batch + b) * y_image,
                                       p.dvalues ? p.x + at : nullptr, s.image, dx,
                                       p.dvalues ? sum : nullptr, p.dbias ? sum + slots : nullptr});
                }
            }
        }
    });
    parallel(s.replicates * sums, kTapGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t e = i / sums, slot = i % sums;
            double total = 0.0;
            const bool used = slot >= slots || slot < p.lists.starts[e * (rows + 1) + rows];
            for (int64_t part = 0; used && part < parts; ++part)
                total += partial[(e * parts + part) * sums + slot];
            float* out =
                slot < slots ? p.dvalues + e * capacity + slot : p.dbias + e * rows + slot - slots;
            *out = static_cast<float>(total);
        }
    });
}

}  // namespace lottery_sparse
