// What the files of the rim share: tensors in, pointers out, through torch's stable ABI. Everything
// is checked before any parallel region, because an exception inside one loses its message.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "rim/parallel_rim.h"

namespace lottery_sparse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& t) {
    std::string text = "(";
    for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
    return text + ")";
}

// `t`, contiguous, after checking that it is a CPU tensor of this dtype.
inline Tensor checked(const char* name, const Tensor& t, ScalarType dtype) {
    STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor for the native kernels.");
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", toString(dtype),
                    " for the native kernels, got ", toString(t.scalar_type()), ".");
    return torch::stable::contiguous(t);
}

inline void check_rank(const char* name, const Tensor& t, int64_t least, int64_t most) {
    STD_TORCH_CHECK(least <= t.dim() && t.dim() <= most, name, " has shape ", shape_text(t),
                    ", but the native kernels take ", least, " to ", most, " dimensions.");
}

inline Tensor empty(std::vector<int64_t> size, ScalarType dtype) {
    return torch::stable::empty(size, dtype);
}

inline const float* floats(const Tensor& t) {
    return static_cast<const float*>(t.const_data_ptr());
}
inline const uint8_t* bytes(const Tensor& t) {
    return static_cast<const uint8_t*>(t.const_data_ptr());
}
// That the lists of each network begin with slot 0 and end within its slots; contiguous int64
// [E, ...] or [...]. What lies between is checked where it is read, see list_check.h.
inline void check_ends(const char* name, const Tensor& starts, int64_t slots) {
    const int64_t* ends = static_cast<const int64_t*>(starts.const_data_ptr()) - 1;
    const int64_t count = starts.numel(), length = starts.size(starts.dim() - 1);
    for (int64_t i = length; 0 < i && i <= count; i += length) {
        STD_TORCH_CHECK(ends[i - length + 1] == 0, name, " begin with ", ends[i - length + 1],
                        ", not 0.");
        STD_TORCH_CHECK(0 <= ends[i] && ends[i] <= slots, name, " end with ", ends[i],
                        ", but there are ", slots, " slots.");
    }
}
template <class T>
T* output(const Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace lottery_sparse
