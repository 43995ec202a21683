// The rim of the linear products: masked_linear and compact_linear.
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "rim.h"
#include "sparse_linear.h"

namespace lottery_sparse {
namespace {

// Checks x, weight and mask of masked_linear, makes them contiguous, and returns their sizes.
SparseLinearShape checked_shape(Tensor& x, Tensor& weight, Tensor& mask) {
    x = checked("x", x, ScalarType::Float);
    weight = checked("weight", weight, ScalarType::Float);
    mask = checked("mask", mask, ScalarType::Bool);
    check_rank("weight", weight, 2, 3);
    check_rank("x", x, 2, weight.dim());
    STD_TORCH_CHECK(same_shape(weight, mask), "mask has shape ", shape_text(mask),
                    ", but weight has ", shape_text(weight), "; they must be equal.");
    const int64_t d = weight.dim();
    const SparseLinearShape shape = {d == 3 ? weight.size(0) : 1, x.size(x.dim() - 2),
                                     weight.size(d - 1), weight.size(d - 2),
                                     d == 3 && x.dim() == 2};
    STD_TORCH_CHECK(
        x.size(x.dim() - 1) == shape.in_features && (x.dim() == 2 || x.size(0) == shape.replicates),
        "x has shape ", shape_text(x), ", which does not fit weight ", shape_text(weight), ".");
    STD_TORCH_CHECK(
        std::max(shape.in_features, shape.out_features) <= std::numeric_limits<uint32_t>::max(),
        "weight has shape ", shape_text(weight), "; the native kernels take up to 2^32 - 1.");
    return shape;
}

std::vector<int64_t> output_size(const SparseLinearShape& shape, const Tensor& weight) {
    if (weight.dim() == 3) return {shape.replicates, shape.batch, shape.out_features};
    return {shape.batch, shape.out_features};
}

Tensor masked_linear_op(Tensor x, Tensor weight, Tensor mask, std::optional<Tensor> bias) {
    const SparseLinearShape shape = checked_shape(x, weight, mask);
    if (bias) {
        bias = checked("bias", *bias, ScalarType::Float);
        STD_TORCH_CHECK(bias->numel() == shape.replicates * shape.out_features, "bias has shape ",
                        shape_text(*bias), ", which does not fit weight ", shape_text(weight), ".");
    }
    Tensor y = empty(output_size(shape, weight), ScalarType::Float);
    sparse_linear_forward({shape, floats(x), floats(weight), bytes(mask),
                           bias ? floats(*bias) : nullptr, output<float>(y)},
                          kParallel);
    return y;
}

std::tuple<Tensor, Tensor> masked_linear_backward_op(Tensor dy, Tensor x, Tensor weight,
                                                     Tensor mask, bool need_dx, bool need_dw) {
    const SparseLinearShape shape = checked_shape(x, weight, mask);
    dy = checked("dy", dy, ScalarType::Float);
    STD_TORCH_CHECK(dy.dim() == weight.dim() &&
                        dy.numel() == shape.replicates * shape.batch * shape.out_features &&
                        dy.size(dy.dim() - 1) == shape.out_features,
                    "dy has shape ", shape_text(dy), ", which does not fit x ", shape_text(x),
                    " and weight ", shape_text(weight), ".");
    const auto like = [](bool needed, const Tensor& t) {
        return needed ? torch::stable::empty(t.sizes(), ScalarType::Float)
                      : empty({0}, ScalarType::Float);
    };
    Tensor dx = like(need_dx, x), dw = like(need_dw, weight);
    sparse_linear_backward(
        {shape, floats(dy), floats(x), floats(weight), bytes(mask),
         need_dx ? output<float>(dx) : nullptr, need_dw ? output<float>(dw) : nullptr},
        kParallel);
    return {dx, dw};
}

// Sizes and lists of a compact layer; tensors stay alive in the caller.
struct CompactArguments {
    SparseLinearShape shape;
    CompactLists lists;
};

// Checks what both ops take. values [C] or [E, C]; starts [N + 1] or [E, N + 1].
CompactArguments checked_compact(Tensor& values, Tensor& starts, Tensor& columns, int64_t batch,
                                 int64_t in_features, bool shared_x) {
    values = checked("values", values, ScalarType::Float);
    check_rank("values", values, 1, 2);
    starts = checked("starts", starts, ScalarType::Long);
    const bool wide = columns.scalar_type() == ScalarType::Int;
    columns = checked("columns", columns, wide ? ScalarType::Int : ScalarType::Short);
    const int64_t d = values.dim();
    STD_TORCH_CHECK(same_shape(values, columns) && starts.dim() == d &&
                        (d == 1 || starts.size(0) == values.size(0)) && starts.size(d - 1) > 0,
                    "values ", shape_text(values), ", columns ", shape_text(columns),
                    " and starts ", shape_text(starts), " do not fit each other.");
    const int64_t replicates = d == 2 ? values.size(0) : 1;
    return {{replicates, batch, in_features, starts.size(d - 1) - 1, d == 2 && shared_x},
            {static_cast<const int64_t*>(starts.const_data_ptr()), columns.const_data_ptr(),
             nullptr, nullptr, nullptr, values.size(d - 1), wide}};
}

std::tuple<Tensor, Tensor> compact_linear_op(Tensor x, Tensor values, Tensor starts, Tensor columns,
                                             std::optional<Tensor> bias) {
    x = checked("x", x, ScalarType::Float);
    check_rank("x", x, 2, values.dim() + 1);
    const int64_t batch = x.size(x.dim() - 2), k = x.size(x.dim() - 1);
    const auto [shape, lists] =
        checked_compact(values, starts, columns, batch, k, /*shared_x=*/x.dim() == 2);
    STD_TORCH_CHECK(x.dim() == 2 || x.size(0) == shape.replicates, "x has shape ", shape_text(x),
                    ", but there are ", shape.replicates, " networks.");
    if (bias) {
        bias = checked("bias", *bias, ScalarType::Float);
        STD_TORCH_CHECK(bias->numel() == shape.replicates * shape.out_features, "bias has shape ",
                        shape_text(*bias), ", which does not fit starts ", shape_text(starts), ".");
    }
    const int64_t tiles = (batch + kTileBatch - 1) / kTileBatch;
    Tensor y = values.dim() == 2
                   ? empty({shape.replicates, batch, shape.out_features}, ScalarType::Float)
                   : empty({batch, shape.out_features}, ScalarType::Float);
    Tensor packed =
        empty({x.dim() == 2 ? 1 : shape.replicates, tiles, k, kTileBatch}, ScalarType::Float);
    compact_linear_forward({shape, lists, floats(x), floats(values), bias ? floats(*bias) : nullptr,
                            output<float>(y), output<float>(packed)},
                           kParallel);
    return {y, packed};
}

std::tuple<Tensor, Tensor, Tensor> compact_linear_backward_op(Tensor dy, Tensor packed_x,
                                                              Tensor values, Tensor starts,
                                                              Tensor columns, Tensor column_starts,
                                                              Tensor rows, Tensor positions,
                                                              bool shared_x, bool need_dx,
                                                              bool need_dvalues, bool need_dbias) {
    dy = checked("dy", dy, ScalarType::Float);
    check_rank("dy", dy, values.dim() + 1, values.dim() + 1);
    packed_x = checked("packed_x", packed_x, ScalarType::Float);
    check_rank("packed_x", packed_x, 4, 4);
    const int64_t batch = dy.size(dy.dim() - 2), k = packed_x.size(2);
    auto [shape, lists] = checked_compact(values, starts, columns, batch, k, shared_x);
    column_starts = checked("column_starts", column_starts, ScalarType::Long);
    rows = checked("rows", rows, lists.wide ? ScalarType::Int : ScalarType::Short);
    positions = checked("positions", positions, ScalarType::Int);
    STD_TORCH_CHECK(dy.size(dy.dim() - 1) == shape.out_features && same_shape(rows, values) &&
                        same_shape(positions, values) &&
                        column_starts.numel() == shape.replicates * (k + 1),
                    "dy ", shape_text(dy), ", rows ", shape_text(rows), ", positions ",
                    shape_text(positions), " and column_starts ", shape_text(column_starts),
                    " do not fit values ", shape_text(values), ".");
    lists.column_starts = static_cast<const int64_t*>(column_starts.const_data_ptr());
    lists.rows = rows.const_data_ptr();
    lists.positions = static_cast<const int32_t*>(positions.const_data_ptr());
    const bool separate_x = values.dim() == 2 && !shared_x;
    Tensor dx = empty({0}, ScalarType::Float), dvalues = dx, dbias = dx;
    if (need_dx)
        dx = separate_x ? empty({shape.replicates, batch, k}, ScalarType::Float)
                        : empty({batch, k}, ScalarType::Float);
    if (need_dvalues) dvalues = torch::stable::empty(values.sizes(), ScalarType::Float);
    if (need_dbias)
        dbias = values.dim() == 2 ? empty({shape.replicates, shape.out_features}, ScalarType::Float)
                                  : empty({shape.out_features}, ScalarType::Float);
    compact_linear_backward(
        {shape, lists, floats(dy), floats(packed_x), floats(values),
         need_dx ? output<float>(dx) : nullptr, need_dvalues ? output<float>(dvalues) : nullptr,
         need_dbias ? output<float>(dbias) : nullptr},
        kParallel);
    return {dx, dvalues, dbias};
}

Tensor pack_tiles_op(Tensor x) {
    x = checked("x", x, ScalarType::Float);
    check_rank("x", x, 2, 3);
    const int64_t count = x.dim() == 3 ? x.size(0) : 1, batch = x.size(x.dim() - 2),
                  features = x.size(x.dim() - 1);
    Tensor tiles = empty({count, (batch + kTileBatch - 1) / kTileBatch, features, kTileBatch},
                         ScalarType::Float);
    pack_tiles(floats(x), count, batch, features, output<float>(tiles), kParallel);
    return tiles;
}

// `dense` [..., N, K] of any rank as rows of the lists.
CompactArguments checked_entries(const Tensor& dense, Tensor& values, Tensor& starts,
                                 Tensor& columns) {
    CompactArguments found =
        checked_compact(values, starts, columns, /*batch=*/0, /*in_features=*/0, false);
    const int64_t rows = found.shape.replicates * found.shape.out_features;
    found.shape.in_features = rows ? dense.numel() / rows : 0;
    STD_TORCH_CHECK(found.shape.in_features * rows == dense.numel(), "dense has shape ",
                    shape_text(dense), ", which does not fit starts ", shape_text(starts), ".");
    return found;
}

Tensor gather_kept_op(Tensor dense, Tensor starts, Tensor columns) {
    dense = checked("dense", dense, ScalarType::Float);
    Tensor values = torch::stable::empty(columns.sizes(), ScalarType::Float);
    const auto [shape, lists] = checked_entries(dense, values, starts, columns);
    gather_kept({shape, lists, const_cast<float*>(floats(dense)), output<float>(values)},
                kParallel);
    return values;
}

void scatter_kept_op(Tensor dense, Tensor values, Tensor starts, Tensor columns) {
    STD_TORCH_CHECK(
        dense.is_cpu() && dense.scalar_type() == ScalarType::Float && dense.is_contiguous(),
        "dense must be a contiguous float32 CPU tensor for the native kernels.");
    const auto [shape, lists] = checked_entries(dense, values, starts, columns);
    scatter_kept({shape, lists, output<float>(dense), const_cast<float*>(floats(values))},
                 kParallel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CPU, m) {
    m.impl("masked_linear", TORCH_BOX(&masked_linear_op));
    m.impl("masked_linear_backward", TORCH_BOX(&masked_linear_backward_op));
    m.impl("compact_linear", TORCH_BOX(&compact_linear_op));
    m.impl("compact_linear_backward", TORCH_BOX(&compact_linear_backward_op));
    m.impl("pack_tiles", TORCH_BOX(&pack_tiles_op));
    m.impl("gather_kept", TORCH_BOX(&gather_kept_op));
    m.impl("scatter_kept_", TORCH_BOX(&scatter_kept_op));
}

}  // namespace lottery_sparse
