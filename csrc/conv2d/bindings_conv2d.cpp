// The rim of compact_conv2d.
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "conv2d/sparse_conv2d.h"
#include "linear/lists_rim.h"

namespace lottery_sparse {
namespace {

Pair checked_pair(const char* name, const std::vector<int64_t>& v, int64_t least) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    STD_TORCH_CHECK(v.size() == 2 && std::min(v[0], v[1]) >= least && std::max(v[0], v[1]) <= kMost,
                    name, " must be two integers of at least ", least, " and at most ", kMost, ".");
    return {v[0], v[1]};
}

struct Options {
    Pair kernel;
    Pair stride;
    Pair padding;
    Pair dilation;
    int64_t groups;
    bool channels_last;
};

Options checked_options(const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                        int64_t groups, bool channels_last) {
    const Options options = {checked_pair("kernel_size", kernel, 1),
                             checked_pair("stride", stride, 1),
                             checked_pair("padding", padding, 0),
                             checked_pair("dilation", dilation, 1),
                             groups,
                             channels_last};
    STD_TORCH_CHECK(groups > 0, "groups is ", groups, ", but must be positive.");
    STD_TORCH_CHECK(options.stride.h * options.stride.w <= kMaxPhases, "stride is (", stride[0],
                    ", ", stride[1], "); the native kernels take a product of up to ", kMaxPhases,
                    ".");
    return options;
}

// Sizes and lists of a compact convolution; tensors stay alive in the caller.
struct Arguments {
    Conv2dShape shape;
    CompactLists lists;
};

int64_t output_size(int64_t image, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation) {
    const int64_t room = image + 2 * padding - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
}

// Checks what both ops take. x [B, ...] or [E, B, ...]; values [C] or [E, C].
Arguments checked_conv2d(Tensor& x, Tensor& values, Tensor& starts, Tensor& columns,
                         const Options& o) {
    x = checked("x", x, ScalarType::Float);
    const auto [replicates, rows, lists] =
        checked_lists(values, ScalarType::Float, starts, columns);
    check_rank("x", x, 4, values.dim() + 3);
    const int64_t first = x.dim() - 3, channel = o.channels_last ? first + 2 : first;
    const int64_t row = o.channels_last ? first : first + 1;
    const Pair image = {x.size(row), x.size(row + 1)};
    const Pair output = {output_size(image.h, o.kernel.h, o.stride.h, o.padding.h, o.dilation.h),
                         output_size(image.w, o.kernel.w, o.stride.w, o.padding.w, o.dilation.w)};
    const bool shared_x = values.dim() == 2 && x.dim() == 4;
    const Conv2dShape shape = {
        replicates,     x.size(first - 1), x.size(channel), rows,      o.groups,   image,
        output,         o.kernel,          o.stride,        o.padding, o.dilation, shared_x,
        o.channels_last};
    STD_TORCH_CHECK(x.dim() == 4 || x.size(0) == replicates, "x has shape ", shape_text(x),
                    ", but there are ", replicates, " networks.");
    STD_TORCH_CHECK(shape.in_channels % o.groups == 0 && shape.out_channels % o.groups == 0,
                    "groups is ", o.groups, ", which does not divide ", shape.in_channels,
                    " input and ", shape.out_channels, " output channels.");
    STD_TORCH_CHECK(lines_fit(shape), "x has shape ", shape_text(x),
                    ", whose padded images are too large for the native kernels.");
    STD_TORCH_CHECK(output.h > 0 && output.w > 0, "x has shape ", shape_text(x),
                    ", which is smaller than the kernel.");
    return {shape, lists};
}

// Of images of y or x, with networks or without.
std::vector<int64_t> images_size(const Conv2dShape& s, bool networks, int64_t channels,
                                 const Pair& image) {
    std::vector<int64_t> size;
    if (networks) size.push_back(s.replicates);
    size.push_back(s.batch);
    if (!s.channels_last) size.push_back(channels);
    size.push_back(image.h);
    size.push_back(image.w);
    if (s.channels_last) size.push_back(channels);
    return size;
}

Tensor compact_conv2d_op(Tensor x, Tensor values, Tensor starts, Tensor columns,
                         std::optional<Tensor> bias, std::vector<int64_t> kernel_size,
                         std::vector<int64_t> stride, std::vector<int64_t> padding,
                         std::vector<int64_t> dilation, int64_t groups, bool channels_last) {
    const Options options =
        checked_options(kernel_size, stride, padding, dilation, groups, channels_last);
    const auto [shape, lists] = checked_conv2d(x, values, starts, columns, options);
    if (bias) {
        bias = checked("bias", *bias, ScalarType::Float);
        STD_TORCH_CHECK(bias->numel() == shape.replicates * shape.out_channels, "bias has shape ",
                        shape_text(*bias), ", which does not fit starts ", shape_text(starts), ".");
    }
    Tensor y = empty(images_size(shape, values.dim() == 2, shape.out_channels, shape.output),
                     ScalarType::Float);
    compact_conv2d_forward(
        {shape, lists, floats(x), floats(values), bias ? floats(*bias) : nullptr, output<float>(y)},
        kParallel);
    return y;
}

std::tuple<Tensor, Tensor, Tensor> compact_conv2d_backward_op(
    Tensor dy, Tensor x, Tensor values, Tensor starts, Tensor columns, Tensor column_starts,
    Tensor rows, Tensor positions, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool channels_last,
    bool need_dx, bool need_dvalues, bool need_dbias) {
    const Options options =
        checked_options(kernel_size, stride, padding, dilation, groups, channels_last);
    auto [shape, lists] = checked_conv2d(x, values, starts, columns, options);
    dy = checked("dy", dy, ScalarType::Float);
    const auto dy_size = images_size(shape, values.dim() == 2, shape.out_channels, shape.output);
    bool fits = dy.dim() == static_cast<int64_t>(dy_size.size());
    for (int64_t d = 0; fits && d < dy.dim(); ++d) fits = dy.size(d) == dy_size[d];
    STD_TORCH_CHECK(fits, "dy has shape ", shape_text(dy), ", which does not fit x ", shape_text(x),
                    ".");
    const int64_t k = shape.in_channels / shape.groups * shape.kernel.h * shape.kernel.w;
    add_lists_by_column(lists, values, shape.replicates, k, column_starts, rows, positions);
    Tensor dx = empty({0}, ScalarType::Float), dvalues = dx, dbias = dx;
    if (need_dx) dx = torch::stable::empty(x.sizes(), ScalarType::Float);
    if (need_dvalues) dvalues = torch::stable::empty(values.sizes(), ScalarType::Float);
    if (need_dbias)
        dbias = values.dim() == 2 ? empty({shape.replicates, shape.out_channels}, ScalarType::Float)
                                  : empty({shape.out_channels}, ScalarType::Float);
    compact_conv2d_backward(
        {shape, lists, floats(dy), floats(x), floats(values), need_dx ? output<float>(dx) : nullptr,
         need_dvalues ? output<float>(dvalues) : nullptr,
         need_dbias ? output<float>(dbias) : nullptr},
        kParallel);
    return {dx, dvalues, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CPU, m) {
    m.impl("compact_conv2d", TORCH_BOX(&compact_conv2d_op));
    m.impl("compact_conv2d_backward", TORCH_BOX(&compact_conv2d_backward_op));
}

}  // namespace lottery_sparse
