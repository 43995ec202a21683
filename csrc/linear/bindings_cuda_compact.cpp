// The rim of _C_cuda for compact layers, see cuda_compact.h. The caller keeps the lists right:
// column and row numbers below K and N, starts that ascend. Kernels of the CPU check them, these do
// not.
#include <optional>
#include <tuple>

#include "linear/cuda_compact.h"
#include "rim/cuda_rim.h"

namespace lottery_sparse {
namespace {

int64_t networks_of(const Tensor& t, int64_t dims) {
    return t.dim() > dims ? t.size(0) : 1;
}

// Lists by row or by column, and the tensors that they point to.
struct Lists {
    Tensor starts, columns;
    CudaKept kept;
    int64_t networks, rows;

    Lists(const Tensor& given_starts, const Tensor& given_columns, const Tensor& values)
        : starts(checked_on("starts", given_starts, values)),
          columns(checked_on("columns", given_columns, values)),
          networks(networks_of(values, 1)) {
        const bool wide = columns.scalar_type() == ScalarType::Int;
        STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Long &&
                            (wide || columns.scalar_type() == ScalarType::Short),
                        "starts must be int64 and columns int16 or int32, got ",
                        toString(starts.scalar_type()), " and ", toString(columns.scalar_type()),
                        ".");
        STD_TORCH_CHECK(same_shape(columns, values) && starts.dim() == values.dim() &&
                            networks_of(starts, 1) == networks && starts.size(-1) > 0,
                        "values ", shape_text(values), ", columns ", shape_text(columns),
                        " and starts ", shape_text(starts), " do not fit each other.");
        rows = starts.size(-1) - 1;
        kept = {static_cast<const int64_t*>(starts.const_data_ptr()),
                columns.numel() ? columns.const_data_ptr() : nullptr, values.size(-1), wide};
    }
};

// x [B, K] or [E, B, K] in panels [1 or E, panels, K, rows of a panel].
Tensor pack(CudaPack p, const Tensor& x, const Device& device) {
    p.networks = networks_of(x, 2);
    p.batch = x.size(-2);
    p.in_features = x.size(-1);
    p.type = number_of("x", x);
    const int64_t rows = panel_rows(p.type), panels = (p.batch + rows - 1) / rows;
    const Tensor packed = torch::stable::new_empty(x, {p.networks, panels, p.in_features, rows});
    if (packed.numel()) {
        p.x = x.const_data_ptr();
        p.panels = packed.mutable_data_ptr();
    }
    if (packed.numel() || p.lists) check_launch(cuda_compact_pack(p, device));
    return packed;
}

void check_x(const char* name, const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda() && (x.dim() == 2 || x.dim() == 3), name,
                    " must be a CUDA tensor [B, K] or [E, B, K], got shape ", shape_text(x), ".");
}

void check_values(const Tensor& values, const Tensor& x) {
    STD_TORCH_CHECK(
        values.scalar_type() == x.scalar_type() && (values.dim() == 1 || values.dim() == 2),
        "values must be [C] or [E, C] in the dtype of x, got ", toString(values.scalar_type()), " ",
        shape_text(values), ".");
}

Tensor pack_panels_op(Tensor x) {
    check_x("x", x);
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    return pack({}, torch::stable::contiguous(x), device_of(x));
}

Tensor product(CudaCompact p, const Lists& lists, const Tensor& packed, const Tensor& values,
               const Device& device, bool networks_apart) {
    p.networks = lists.networks;
    p.out_features = lists.rows;
    p.in_features = packed.size(2);
    p.shared_x = packed.size(0) == 1;
    p.kept = lists.kept;
    p.type = number_of("values", values);
    STD_TORCH_CHECK(p.shared_x || packed.size(0) == p.networks, "x is of ", packed.size(0),
                    " networks, but values of ", p.networks, ".");
    std::vector<int64_t> shape = {p.batch, p.out_features};
    if (networks_apart) shape.insert(shape.begin(), p.networks);
    const Tensor y = torch::stable::new_empty(values, shape);
    if (!y.numel()) return y;
    p.panels = packed.numel() ? packed.const_data_ptr() : nullptr;
    p.values = values.numel() ? values.const_data_ptr() : nullptr;
    p.y = y.mutable_data_ptr();
    check_launch(cuda_compact_linear(p, device));
    return y;
}

std::tuple<Tensor, Tensor> compact_linear_op(Tensor x, Tensor values, Tensor starts, Tensor columns,
                                             std::optional<Tensor> bias) {
    check_x("x", x);
    check_values(values, x);
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    x = torch::stable::contiguous(x);
    values = checked_on("values", values, x);
    const Lists lists(starts, columns, values);
    CudaCompact p = {};
    p.batch = x.size(-2);
    if (bias) {
        bias = checked_on("bias", *bias, x);
        STD_TORCH_CHECK(
            bias->scalar_type() == x.scalar_type() && bias->numel() == lists.networks * lists.rows,
            "bias must have the dtype of x and ", lists.networks * lists.rows, " numbers, got ",
            toString(bias->scalar_type()), " ", shape_text(*bias), ".");
        if (bias->numel()) p.bias = bias->const_data_ptr();
    }
    const Device device = device_of(x);
    const Tensor packed = pack({}, x, device);
    return {product(p, lists, packed, values, device, values.dim() == 2), packed};
}

std::tuple<Tensor, Tensor> compact_linear_backward_op(Tensor dy, Tensor packed_x, Tensor values,
                                                      Tensor starts, Tensor columns,
                                                      Tensor column_starts, Tensor rows,
                                                      Tensor positions, bool shared_x, bool need_dx,
                                                      bool need_dvalues) {
    check_x("dy", dy);
    check_values(values, dy);
    const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
    dy = torch::stable::contiguous(dy);
    values = checked_on("values", values, dy);
    const Lists by_row(starts, columns, values), by_column(column_starts, rows, values);
    positions = checked_on("positions", positions, dy);
    STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Int && same_shape(positions, values) &&
                        networks_of(dy, 2) == by_row.networks && dy.size(-1) == by_row.rows,
                    "dy ", shape_text(dy), ", values ", shape_text(values), " and positions ",
                    shape_text(positions), " do not fit each other.");
    const Device device = device_of(dy);
    Tensor dx = torch::stable::new_empty(dy, {0}), dvalues = torch::stable::new_empty(dy, {0});
    CudaPack ordering = {};
    Tensor ordered = values;
    if (need_dx && values.numel()) {
        ordered = torch::stable::new_empty(values, values.sizes());
        ordering.lists = by_row.networks;
        ordering.slots = values.size(-1);
        ordering.ends = by_row.rows + 1;
        ordering.starts = by_row.kept.starts;
        ordering.positions = static_cast<const int32_t*>(positions.const_data_ptr());
        ordering.values = values.const_data_ptr();
        ordering.ordered = ordered.mutable_data_ptr();
    }
    const Tensor packed_dy = pack(ordering, dy, device);
    if (need_dx) {
        CudaCompact p = {};
        p.batch = dy.size(-2);
        dx = product(p, by_column, packed_dy, ordered, device, values.dim() == 2);
    }
    if (need_dvalues) {
        dvalues = torch::stable::new_empty(values, values.sizes());
        if (!values.numel()) return {dx, dvalues};
        packed_x = checked_on("packed_x", packed_x, dy);
        const int64_t panels = packed_dy.size(1);
        STD_TORCH_CHECK(packed_x.scalar_type() == dy.scalar_type() && packed_x.dim() == 4 &&
                            packed_x.size(0) == (shared_x ? 1 : by_row.networks) &&
                            packed_x.size(1) == panels && packed_x.size(2) == by_column.rows &&
                            packed_x.size(3) == packed_dy.size(3),
                        "packed_x has shape ", shape_text(packed_x), ", which does not fit dy ",
                        shape_text(dy), " and ", by_column.rows, " columns.");
        const Tensor partial = torch::stable::new_empty(
            dy, {panels, by_row.networks, values.size(-1)}, ScalarType::Float);
        CudaDvalues p = {};
        p.networks = by_row.networks;
        p.batch = dy.size(-2);
        p.in_features = by_column.rows;
        p.out_features = by_row.rows;
        p.shared_x = shared_x;
        p.type = number_of("dy", dy);
        p.kept = by_row.kept;
        if (packed_x.numel()) p.panels = packed_x.const_data_ptr();
        if (packed_dy.numel()) p.dy_panels = packed_dy.const_data_ptr();
        if (partial.numel()) p.partial = output<float>(partial);
        p.dvalues = dvalues.mutable_data_ptr();
        check_launch(cuda_compact_dvalues(p, device));
    }
    return {dx, dvalues};
}

void scatter_kept_op(Tensor dense, Tensor values, Tensor starts, Tensor columns) {
    STD_TORCH_CHECK(dense.is_cuda() && dense.is_contiguous(),
                    "dense must be a contiguous CUDA tensor, got shape ", shape_text(dense), ".");
    const torch::stable::accelerator::DeviceGuard guard(dense.get_device_index());
    values = checked_on("values", values, dense);
    const Lists lists(starts, columns, values);
    const int64_t rows = lists.networks * lists.rows;
    STD_TORCH_CHECK(rows ? dense.numel() % rows == 0 : dense.numel() == 0, "dense has shape ",
                    shape_text(dense), ", but the lists are of ", rows, " rows.");
    if (!dense.numel() || !values.numel()) return;
    check_launch(cuda_scatter_kept(
        {lists.networks, lists.rows, dense.numel() / rows, lists.kept, values.const_data_ptr(),
         dense.mutable_data_ptr(), number_of("values", values), number_of("dense", dense)},
        device_of(dense)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lottery_sparse_cuda, m) {
    m.def("pack_panels(Tensor x) -> Tensor");
    m.def(
        "compact_linear(Tensor x, Tensor values, Tensor starts, Tensor columns, Tensor? bias) "
        "-> (Tensor, Tensor)");
    m.def(
        "compact_linear_backward(Tensor dy, Tensor packed_x, Tensor values, Tensor starts, "
        "Tensor columns, Tensor column_starts, Tensor rows, Tensor positions, bool shared_x, "
        "bool need_dx, bool need_dvalues) -> (Tensor, Tensor)");
    m.def("scatter_kept_(Tensor(a!) dense, Tensor values, Tensor starts, Tensor columns) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_cuda, CUDA, m) {
    m.impl("pack_panels", TORCH_BOX(&pack_panels_op));
    m.impl("compact_linear", TORCH_BOX(&compact_linear_op));
    m.impl("compact_linear_backward", TORCH_BOX(&compact_linear_backward_op));
    m.impl("scatter_kept_", TORCH_BOX(&scatter_kept_op));
}

}  // namespace lottery_sparse
