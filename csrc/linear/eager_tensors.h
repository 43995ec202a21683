// Tensors of _eager, in torch's C++ interface.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include <vector>

namespace lottery_sparse {
namespace {

using at::Tensor;
using variable_list = std::vector<Tensor>;

// Whether kernels may read this tensor: on the CPU, and no subclass's, which may hold anything, nor
// one whose numbers are not what its memory says (negative views, zero tensors).
bool ordinary(const Tensor& t) {
    static const auto keys = [](const Tensor& t) {
        return t.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
    };
    static const c10::DispatchKeySet wanted = keys(at::detail::empty_cpu({0}, at::kFloat));
    return t.defined() && keys(t) == wanted;
}
bool ordinary(const Tensor& t, at::ScalarType dtype) {
    return ordinary(t) && t.scalar_type() == dtype;
}

// at::empty without the dispatcher.
Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
    return at::detail::empty_cpu(sizes, dtype);
}

}  // namespace
}  // namespace lottery_sparse
