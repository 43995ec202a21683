// What both kinds of rims share, those on torch's stable ABI and those on its C++ interface.
//
// Loops on torch's threads: torch's library runs them, through its C interface:
// at::parallel_for in a file of ours that is compiled without OpenMP would be a plain loop.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>

#include "common/parallel.h"

namespace lottery_sparse {

inline const Parallel kParallel([](int64_t begin, int64_t end, int64_t grain, Parallel::Body body,
                                   void* context) {
    if (torch_parallel_for(begin, end, grain, body, context) != 0)
        throw std::runtime_error("a parallel region failed");
});

template <class Tensor>
bool same_shape(const Tensor& a, const Tensor& b) {
    if (a.dim() != b.dim()) return false;
    for (int64_t d = 0; d < a.dim(); ++d)
        if (a.size(d) != b.size(d)) return false;
    return true;
}

}  // namespace lottery_sparse
