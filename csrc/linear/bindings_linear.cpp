// The rim of the linear products: masked_linear and compact_linear.
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>

#include "linear/lists_rim.h"
#include "linear/sparse_linear.h"

namespace lottery_sparse {
namespace {

// Kernels take float or bfloat16, all of a call's tensors alike.
template <class T>
constexpr ScalarType kDtype = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::BFloat16;

// f(T{}) for the T of this tensor; a check that it is float refuses another dtype.
template <class F>
auto with_storage(const Tensor& t, const F& f) {
    return t.scalar_type() == ScalarType::BFloat16 ? f(Bfloat16{}) : f(float{});
}

template <class T>
const T* data(const Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* checked_bias(std::optional<Tensor>& bias, const SparseLinearShape& shape) {
    if (!bias) return nullptr;
    bias = checked("bias", *bias, kDtype<T>);
    STD_TORCH_CHECK(bias->numel() == shape.replicates * shape.out_features, "bias has shape ",
                    shape_text(*bias), ", which does not fit ", shape.replicates, " networks of ",
                    shape.out_features, " rows.");
    return data<T>(*bias);
}

// Checks x, weight and mask of masked_linear, makes them contiguous, and returns their sizes.
template <class T>
SparseLinearShape checked_shape(Tensor& x, Tensor& weight, Tensor& mask) {
    x = checked("x", x, kDtype<T>);
    weight = checked("weight", weight, kDtype<T>);
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
        "weight has shape ", shape_text(weight),
        "; the native kernels take up to 2^32 - 1 rows and columns.");
    return shape;
}

std::vector<int64_t> output_size(const SparseLinearShape& shape, bool networks) {
    if (networks) return {shape.replicates, shape.batch, shape.out_features};
    return {shape.batch, shape.out_features};
}

Tensor masked_linear_op(Tensor x, Tensor weight, Tensor mask, std::optional<Tensor> bias) {
    return with_storage(x, [&]<class T>(T) {
        const SparseLinearShape shape = checked_shape<T>(x, weight, mask);
        const T* b = checked_bias<T>(bias, shape);
        Tensor y = empty(output_size(shape, weight.dim() == 3), kDtype<T>);
        sparse_linear_forward<T>({shape, data<T>(x), data<T>(weight), bytes(mask), b, output<T>(y)},
                                 kParallel);
        return y;
    });
}

std::tuple<Tensor, Tensor> masked_linear_backward_op(Tensor dy, Tensor x, Tensor weight,
                                                     Tensor mask, bool need_dx, bool need_dw) {
    return with_storage(x, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
        const SparseLinearShape shape = checked_shape<T>(x, weight, mask);
        dy = checked("dy", dy, kDtype<T>);
        STD_TORCH_CHECK(dy.dim() == weight.dim() &&
                            dy.numel() == shape.replicates * shape.batch * shape.out_features &&
                            dy.size(dy.dim() - 1) == shape.out_features,
                        "dy has shape ", shape_text(dy), ", which does not fit x ", shape_text(x),
                        " and weight ", shape_text(weight), ".");
        const auto like = [](bool needed, const Tensor& t) {
            return needed ? torch::stable::empty(t.sizes(), kDtype<T>) : empty({0}, kDtype<T>);
        };
        Tensor dx = like(need_dx, x), dw = like(need_dw, weight);
        sparse_linear_backward<T>(
            {shape, data<T>(dy), data<T>(x), data<T>(weight), bytes(mask),
             need_dx ? output<T>(dx) : nullptr, need_dw ? output<T>(dw) : nullptr},
            kParallel);
        return {dx, dw};
    });
}

// Sizes and lists of a compact layer; tensors stay alive in the caller.
struct CompactArguments {
    SparseLinearShape shape;
    CompactLists lists;
};

// Checks what both ops take.
template <class T>
CompactArguments checked_compact(Tensor& values, Tensor& starts, Tensor& columns, int64_t batch,
                                 int64_t in_features, bool shared_x) {
    const auto [replicates, rows, lists] = checked_lists(values, kDtype<T>, starts, columns);
    return {{replicates, batch, in_features, rows, values.dim() == 2 && shared_x}, lists};
}

std::tuple<Tensor, Tensor> compact_linear_op(Tensor x, Tensor values, Tensor starts, Tensor columns,
                                             std::optional<Tensor> bias) {
    return with_storage(x, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
        x = checked("x", x, kDtype<T>);
        check_rank("x", x, 2, values.dim() + 1);
        const int64_t batch = x.size(x.dim() - 2), k = x.size(x.dim() - 1);
        const bool shared_x = x.dim() == 2;
        const auto [shape, lists] = checked_compact<T>(values, starts, columns, batch, k, shared_x);
        STD_TORCH_CHECK(shared_x || x.size(0) == shape.replicates, "x has shape ", shape_text(x),
                        ", but there are ", shape.replicates, " networks.");
        const T* b = checked_bias<T>(bias, shape);
        const int64_t tiles = (batch + kTileBatch - 1) / kTileBatch;
        Tensor y = empty(output_size(shape, values.dim() == 2), kDtype<T>);
        Tensor packed =
            empty({shared_x ? 1 : shape.replicates, tiles, k, kTileBatch}, ScalarType::Float);
        compact_linear_forward(
            {shape, lists, data<T>(x), data<T>(values), b, output<T>(y), output<float>(packed)},
            kParallel);
        return {y, packed};
    });
}

std::tuple<Tensor, Tensor, Tensor> compact_linear_backward_op(Tensor dy, Tensor packed_x,
                                                              Tensor values, Tensor starts,
                                                              Tensor columns, Tensor column_starts,
                                                              Tensor rows, Tensor positions,
                                                              bool shared_x, bool need_dx,
                                                              bool need_dvalues, bool need_dbias) {
    return with_storage(dy, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor> {
        dy = checked("dy", dy, kDtype<T>);
        check_rank("dy", dy, values.dim() + 1, values.dim() + 1);
        packed_x = checked("packed_x", packed_x, ScalarType::Float);
        check_rank("packed_x", packed_x, 4, 4);
        const int64_t batch = dy.size(dy.dim() - 2), k = packed_x.size(2);
        auto [shape, lists] = checked_compact<T>(values, starts, columns, batch, k, shared_x);
        STD_TORCH_CHECK(dy.size(dy.dim() - 1) == shape.out_features, "dy has shape ",
                        shape_text(dy), ", which does not fit starts ", shape_text(starts), ".");
        add_lists_by_column(lists, values, shape.replicates, k, column_starts, rows, positions);
        STD_TORCH_CHECK(
            !need_dvalues || (packed_x.size(0) == (shape.shared_x ? 1 : shape.replicates) &&
                              packed_x.size(1) == (batch + kTileBatch - 1) / kTileBatch &&
                              packed_x.size(3) == kTileBatch),
            "packed_x has shape ", shape_text(packed_x), ", which does not fit dy ", shape_text(dy),
            ".");
        const bool networks = values.dim() == 2;
        Tensor dx = empty({0}, kDtype<T>), dvalues = dx, dbias = dx;
        if (need_dx)
            dx = networks && !shared_x ? empty({shape.replicates, batch, k}, kDtype<T>)
                                       : empty({batch, k}, kDtype<T>);
        if (need_dvalues) dvalues = torch::stable::empty(values.sizes(), kDtype<T>);
        if (need_dbias)
            dbias = networks ? empty({shape.replicates, shape.out_features}, kDtype<T>)
                             : empty({shape.out_features}, kDtype<T>);
        compact_linear_backward(
            {shape, lists, data<T>(dy), floats(packed_x), data<T>(values),
             need_dx ? output<T>(dx) : nullptr, need_dvalues ? output<T>(dvalues) : nullptr,
             need_dbias ? output<T>(dbias) : nullptr},
            kParallel);
        return {dx, dvalues, dbias};
    });
}

Tensor pack_tiles_op(Tensor x) {
    return with_storage(x, [&]<class T>(T) {
        x = checked("x", x, kDtype<T>);
        check_rank("x", x, 2, 3);
        const int64_t count = x.dim() == 3 ? x.size(0) : 1, batch = x.size(x.dim() - 2),
                      features = x.size(x.dim() - 1);
        Tensor tiles = empty({count, (batch + kTileBatch - 1) / kTileBatch, features, kTileBatch},
                             ScalarType::Float);
        pack_tiles(data<T>(x), count, batch, features, output<float>(tiles), kParallel);
        return tiles;
    });
}

// `dense` [..., N, K] of any rank as rows of the lists.
template <class T>
CompactArguments checked_entries(const Tensor& dense, Tensor& values, Tensor& starts,
                                 Tensor& columns) {
    CompactArguments found =
        checked_compact<T>(values, starts, columns, /*batch=*/0, /*in_features=*/0, false);
    const int64_t rows = found.shape.replicates * found.shape.out_features;
    found.shape.in_features = rows ? dense.numel() / rows : 0;
    STD_TORCH_CHECK(found.shape.in_features * rows == dense.numel(), "dense has shape ",
                    shape_text(dense), ", which does not fit starts ", shape_text(starts), ".");
    return found;
}

Tensor gather_kept_op(Tensor dense, Tensor starts, Tensor columns) {
    return with_storage(dense, [&]<class T>(T) {
        dense = checked("dense", dense, kDtype<T>);
        Tensor values = torch::stable::empty(columns.sizes(), kDtype<T>);
        const auto [shape, lists] = checked_entries<T>(dense, values, starts, columns);
        gather_kept(KeptEntries<T>{shape, lists, const_cast<T*>(data<T>(dense)), output<T>(values)},
                    kParallel);
        return values;
    });
}

void scatter_kept_op(Tensor dense, Tensor values, Tensor starts, Tensor columns) {
    with_storage(dense, [&]<class T>(T) {
        STD_TORCH_CHECK(dense.is_cpu() && dense.scalar_type() == kDtype<T> && dense.is_contiguous(),
                        "dense must be a contiguous ", toString(kDtype<T>),
                        " CPU tensor for the native kernels.");
        const auto [shape, lists] = checked_entries<T>(dense, values, starts, columns);
        scatter_kept(
            KeptEntries<T>{shape, lists, output<T>(dense), const_cast<T*>(data<T>(values))},
            kParallel);
    });
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
