// Partial sums of blocks that divide the columns -> y.
#pragma once

#include "packed/cuda_finish.h"

namespace lottery_sparse {
namespace {

constexpr int kAddThreads = 256;

struct AddSplits {
    CudaLinear linear;
    CudaScale scale;
};

LS_GLOBAL(kAddThreads, 1)
add_kernel(AddSplits p) {
    const int64_t size = p.linear.batch * p.linear.out_features;
    const int64_t i = static_cast<int64_t>(block_x()) * kAddThreads + thread_index();
    if (i >= size) return;
    float sum = 0.0f;
    for (int64_t split = 0; split < p.linear.splits; ++split)
        sum += p.linear.partial[split * size + i];
    const int64_t m = i / p.linear.out_features, n = i % p.linear.out_features;
    store_number(p.linear.y, p.linear.y_type, i, finished(p.linear, p.scale, m, n, sum));
}

// The partial sums of all splits, in their order -> y.
const char* add_splits(const CudaLinear& p, const CudaScale& s, const Device& device) {
    if (p.splits == 1) return nullptr;
    const int64_t blocks = (p.batch * p.out_features + kAddThreads - 1) / kAddThreads;
    return launch(add_kernel, blocks, 1, kAddThreads, 0, device, AddSplits{p, s});
}

}  // namespace
}  // namespace lottery_sparse
