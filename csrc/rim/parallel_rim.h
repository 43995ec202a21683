// Loops on torch's threads, for the rims. torch's library runs them, through its C interface:
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

}  // namespace lottery_sparse
