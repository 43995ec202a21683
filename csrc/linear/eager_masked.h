// A masked layer for _eager: its weight at rest, and its product by the kernel or the dense
// library.
#pragma once

#include <torch/csrc/python_headers.h>
//
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <cstring>
#include <optional>

#include "linear/eager_node.h"
#include "linear/sparse_linear.h"
#include "masks/select_kept.h"
#include "rim/parallel_rim.h"

namespace lottery_sparse {
namespace {

// ---- at rest -----------------------------------------------------------------------------------

// What `rest.Rest`, a tuple of Python, says of a layer; these are its fields.
enum RestField { kOwn, kTensors, kVersions, kAddress, kKept, kSpots, kValues, kLeastRows, kNode };

// A layer's weight, known to hold what the layer computes with.
struct AtRest {
    Tensor weight, mask;
    bool prunes;                // the mask prunes something
    int64_t least_rows_float;   // from so many rows of x on the sparse kernel is the faster way:
    int64_t least_rows_bfloat;  // in float32, and in bfloat16
};

// Whether the weight is at rest, as far as can be seen: `Rest.is_of` and `Rest.holds`, for CPU
// tensors, but for the look at some entries.
bool is_at_rest(PyObject* rest, PyObject* parameters, PyObject* buffers, AtRest& found) {
    static PyObject* const names[] = {
        PyUnicode_InternFromString("weight"), PyUnicode_InternFromString("weight_mask"),
        PyUnicode_InternFromString("weight_frozen"), PyUnicode_InternFromString("weight_signs")};
    const auto field = [rest](RestField i) { return PyTuple_GET_ITEM(rest, i); };
    PyObject *own = field(kOwn), *tensors = field(kTensors), *versions = field(kVersions);
    const Py_ssize_t versioned = PyTuple_GET_SIZE(versions);
    if (versioned == 0) return false;  // never at rest so far
    for (int i = 0; i < 4; ++i) {
        PyObject* mine = PyDict_GetItemWithError(i == 0 ? parameters : buffers, names[i]);
        if (mine == nullptr || mine != PyTuple_GET_ITEM(own, i)) return false;
        PyObject* tensor = PyTuple_GET_ITEM(tensors, i);
        if (tensor == Py_None) continue;
        if (!THPVariable_Check(tensor)) return false;
        const uint32_t version = THPVariable_Unpack(tensor)._version();
        if (i >= versioned || PyLong_AsUnsignedLong(PyTuple_GET_ITEM(versions, i)) != version)
            return false;
    }
    found.weight = THPVariable_Unpack(PyTuple_GET_ITEM(tensors, 0));
    found.mask = THPVariable_Unpack(PyTuple_GET_ITEM(tensors, 1));
    const Tensor& weight = found.weight;
    if (!ordinary(weight) || !ordinary(found.mask, at::kBool)) return false;
    if (PyLong_AsVoidPtr(field(kAddress)) != weight.const_data_ptr()) return false;
    found.prunes = PyLong_AsLongLong(field(kKept)) < weight.numel();
    found.least_rows_float = PyLong_AsLongLong(PyTuple_GET_ITEM(field(kLeastRows), 0));
    found.least_rows_bfloat = PyLong_AsLongLong(PyTuple_GET_ITEM(field(kLeastRows), 1));
    return !PyErr_Occurred();
}

// Whether some entries, kept and pruned, hold what they held: a write that counts no version moved
// others, or none. A kernel that skips pruned entries needs no look.
bool looks_at_rest(PyObject* rest, const Tensor& weight) {
    PyObject *spots = PyTuple_GET_ITEM(rest, kSpots), *values = PyTuple_GET_ITEM(rest, kValues);
    if (spots == Py_None || values == Py_None) return true;
    const Tensor &at = THPVariable_Unpack(spots), &held = THPVariable_Unpack(values);
    if (!ordinary(at, at::kLong) || !ordinary(held, weight.scalar_type()) ||
        at.numel() != held.numel())
        return false;
    const auto* index = at.const_data_ptr<int64_t>();
    const auto* wanted = static_cast<const char*>(held.const_data_ptr());
    const auto* there = static_cast<const char*>(weight.const_data_ptr());
    const auto width = static_cast<int64_t>(weight.element_size());
    for (int64_t i = 0; i < at.numel(); ++i) {
        int64_t element = index[i];  // of the contiguous weight; then where it lies
        if (!weight.is_contiguous()) {
            int64_t left = index[i];
            element = 0;
            for (int64_t d = weight.dim() - 1; d >= 0; --d) {
                element += left % weight.size(d) * weight.stride(d);
                left /= weight.size(d);
            }
        }
        if (std::memcmp(there + element * width, wanted + i * width, width) != 0) return false;
    }
    return true;
}

// ---- the weight, with a gradient that is zero at pruned entries --------------------------------

Tensor fresh_like(const Tensor& t, at::ScalarType dtype) {
    return at::detail::empty_strided_cpu(t.sizes(), t.strides(), dtype);
}

// where(mask, values, 0) of tensors that lie in memory alike, without gaps; in the memory of values
// if nobody else has it.
Tensor where_kept(const Tensor& mask, const Tensor& values) {
    constexpr int64_t kGrain = 1 << 16;
    const bool own = values.use_count() == 1 && values.storage().use_count() == 1;
    Tensor kept = own ? values : fresh_like(mask, values.scalar_type());
    const auto width = static_cast<int64_t>(values.element_size());
    const auto* from = static_cast<const char*>(values.const_data_ptr());
    auto* to = static_cast<char*>(kept.mutable_data_ptr());
    const auto* bytes = static_cast<const uint8_t*>(mask.const_data_ptr());
    const auto select = LS_CHOSEN_KERNELS(select_kept).select;
    kParallel(values.numel(), kGrain, [&](int64_t begin, int64_t end) {
        select(bytes + begin, from + begin * width, nullptr, to + begin * width, end - begin,
               static_cast<int>(width));
    });
    return kept;
}

struct KeptGradient {
    static constexpr const char* kName = "KeptGradientBackward";

    static variable_list gradients(const Saved& all, const Tensor& grad) {
        const Tensor& mask = all.tensors[0];
        if (at::GradMode::is_enabled() || !ordinary(grad) || !grad.is_floating_point() ||
            grad.element_size() < 2 || grad.sizes() != mask.sizes())  // gradients of gradients, ...
            return {at::where(mask, grad, at::zeros({}, grad.options()))};
        // element by element in the order in which the mask lies, channels_last among others
        if (!mask.is_non_overlapping_and_dense())
            return {at::where(mask, grad, at::zeros({}, grad.options()))};
        if (grad.strides() == mask.strides()) return {where_kept(mask, grad)};
        return {where_kept(mask, fresh_like(mask, grad.scalar_type()).copy_(grad))};
    }
};

// The layer's weight for the dense library.
Tensor with_kept_gradient(const AtRest& layer) {
    const Tensor& weight = layer.weight;
    if (!layer.prunes || !asks_gradients(weight)) return weight;
    // the same memory and version counter, so that a write before the backward is noticed
    Tensor same(weight.unsafeGetTensorImpl()->shallow_copy_and_detach(
        torch::autograd::impl::version_counter(weight), /*allow_tensor_metadata_change=*/false));
    const auto node = node_of<KeptGradient>(weight);
    node->watched = {{"weight_mask of a masked layer", layer.mask}};
    torch::autograd::set_history(same, node);
    return same;
}

// ---- the product over kept weights -------------------------------------------------------------

template <class F>
void with_storage(at::ScalarType dtype, const F& f) {
    dtype == at::kBFloat16 ? f(Bfloat16{}) : f(float{});
}

struct MaskedProduct {
    static constexpr const char* kName = "MaskedLinearBackward";

    static SparseLinearShape shape_of(const Tensor& x, const Tensor& weight) {
        return {1, x.size(0), weight.size(1), weight.size(0), false};
    }
    // Whether the kernel takes them: matrices of one dtype that fit each other.
    static bool fits(const Tensor& x, const Tensor& weight, const Tensor& mask) {
        return x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) &&
               weight.sizes() == mask.sizes() && ordinary(x) && ordinary(mask, at::kBool) &&
               ordinary(weight, x.scalar_type()) && weight.is_contiguous() &&
               mask.is_contiguous() &&
               (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
    }

    static Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& mask,
                          const Tensor& bias) {
        const Tensor source = x.contiguous();
        Tensor y = fresh({x.size(0), weight.size(0)}, x.scalar_type());
        with_storage(x.scalar_type(), [&](auto t) {
            using T = decltype(t);
            const auto* b = bias.defined() ? static_cast<const T*>(bias.const_data_ptr()) : nullptr;
            sparse_linear_forward(
                SparseLinearForward<T>{shape_of(x, weight),
                                       static_cast<const T*>(source.const_data_ptr()),
                                       static_cast<const T*>(weight.const_data_ptr()),
                                       static_cast<const uint8_t*>(mask.const_data_ptr()), b,
                                       static_cast<T*>(y.mutable_data_ptr())},
                kParallel);
        });
        return y;
    }

    static variable_list gradients(const Saved& all, const Tensor& dy) {
        const Tensor &x = all.tensors[0], &weight = all.tensors[1], &mask = all.tensors[2];
        const bool need_dx = all.need[0], need_dw = all.need[1], need_db = all.need[2];
        variable_list found(3);
        if (need_db) found[2] = dy.sum(0);
        if (!need_dx && !need_dw) return found;
        const bool kernel = !at::GradMode::is_enabled() && fits(x, weight, mask) &&
                            ordinary(dy, x.scalar_type()) && dy.dim() == 2 &&
                            dy.size(0) == x.size(0) && dy.size(1) == weight.size(0);
        if (!kernel) {  // gradients of gradients, or what hooks made of the tensors
            static const auto op =
                c10::Dispatcher::singleton()
                    .findSchemaOrThrow("lottery_sparse::masked_linear_backward", "")
                    .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                      const Tensor&, const std::optional<Tensor>&,
                                                      const std::optional<Tensor>&, bool, bool)>();
            auto [dx, dw] =
                op.call(dy, x, weight, mask, std::nullopt, std::nullopt, need_dx, need_dw);
            if (need_dx) found[0] = dx;
            if (need_dw) found[1] = dw;
            return found;
        }
        const Tensor grad = dy.contiguous(), source = x.contiguous();
        if (need_dx) found[0] = fresh(x.sizes(), x.scalar_type());
        if (need_dw) found[1] = fresh(weight.sizes(), x.scalar_type());
        with_storage(x.scalar_type(), [&](auto t) {
            using T = decltype(t);
            const auto out = [](Tensor& t) {
                return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
            };
            sparse_linear_backward(
                SparseLinearBackward<T>{shape_of(x, weight),
                                        static_cast<const T*>(grad.const_data_ptr()),
                                        static_cast<const T*>(source.const_data_ptr()),
                                        static_cast<const T*>(weight.const_data_ptr()),
                                        static_cast<const uint8_t*>(mask.const_data_ptr()),
                                        out(found[0]), out(found[1])},
                kParallel);
        });
        return found;
    }
};

// By the kernel; undefined: it does not take these.
Tensor by_kernel(const Tensor& x, const AtRest& layer, const Tensor& bias) {
    Tensor rows = x.dim() == 2 ? x : x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2);
    Tensor weight = layer.weight, addend = bias;
    if (at::autocast::is_autocast_enabled(at::kCPU)) {
        const auto cast = [to = at::autocast::get_autocast_dtype(at::kCPU)](const Tensor& t) {
            return t.defined() ? at::autocast::cached_cast(to, t, c10::DeviceType::CPU) : t;
        };
        const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
        rows = cast(rows), weight = cast(weight), addend = cast(addend);
    }
    if (!MaskedProduct::fits(rows, weight, layer.mask)) return {};
    if (addend.defined() && !(ordinary(addend, rows.scalar_type()) && addend.is_contiguous() &&
                              addend.dim() == 1 && addend.size(0) == weight.size(0)))
        return {};
    RECORD_FUNCTION("lottery_sparse::masked_linear", c10::ArrayRef<const c10::IValue>{});
    Tensor y;
    {
        const at::AutoDispatchBelowADInplaceOrView guard;
        y = MaskedProduct::forward(rows, weight, layer.mask, addend);
    }
    if (asks_gradients(rows, weight, addend)) {
        const auto node = node_of<MaskedProduct>(rows, weight, addend);
        node->save(rows);
        node->save(weight);
        node->watched = {{"weight_mask of a masked layer", layer.mask}};
        torch::autograd::set_history(y, node);
    }
    if (x.dim() == 2) return y;
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    return y.view(sizes);
}

// y = x Wᵀ + b; undefined: a call for the registered op.
// `looks`: some entries were looked at, and are at rest; the kernel does without.
Tensor masked_linear(const Tensor& x, const AtRest& layer, const Tensor& bias, bool looks) {
    const Tensor& weight = layer.weight;
    const bool casts = at::autocast::is_autocast_enabled(at::kCPU);
    if (weight.dim() != 2 || x.dim() == 0 || x.size(-1) != weight.size(1)) return {};
    if (!casts && x.scalar_type() != weight.scalar_type()) return {};
    const auto dtype = casts ? at::autocast::get_autocast_dtype(at::kCPU) : x.scalar_type();
    const int64_t rows = x.numel() / std::max<int64_t>(1, x.size(-1));
    const bool sparse = dtype == at::kFloat      ? rows >= layer.least_rows_float
                        : dtype == at::kBFloat16 ? rows >= layer.least_rows_bfloat
                                                 : false;
    if (sparse) return by_kernel(x, layer, bias);
    if (!looks) return {};
    return at::linear(x, with_kept_gradient(layer),
                      bias.defined() ? std::optional<Tensor>(bias) : std::nullopt);
}

}  // namespace
}  // namespace lottery_sparse
