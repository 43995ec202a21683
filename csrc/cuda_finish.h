// The end of a product of cuda_linear.h: sums -> y, or -> partial sums and those -> y.
#pragma once

#include "cuda_linear.h"

namespace lottery_sparse {

LS_DEVICE float finished(const CudaLinear& p, const CudaScale& s, int64_t n, float sum) {
    float y = sum * s.factor;
    if (s.scale) y *= number_at(s.scale, s.type, s.by_row ? n : 0);
    return p.bias ? y + number_at(p.bias, p.bias_type, n) : y;
}

// The sum of one split for row m of x and row n of the weight, or of padding.
template <class T>
LS_DEVICE void finish(const CudaLinear& p, const CudaScale& s, int64_t m, int64_t n, float sum) {
    if (m >= p.batch || n >= p.out_features) return;
    if (p.splits == 1)
        static_cast<uint16_t*>(p.y)[m * p.out_features + n] = T::from_float(finished(p, s, n, sum));
    else
        p.partial[(block_y() * p.batch + m) * p.out_features + n] = sum;
}

namespace {

constexpr int kAddThreads = 256;

struct AddSplits {
    CudaLinear linear;
    CudaScale scale;
};

template <class T>
LS_GLOBAL(kAddThreads, 1)
add_kernel(AddSplits p) {
    const int64_t size = p.linear.batch * p.linear.out_features;
    const int64_t i = static_cast<int64_t>(block_x()) * kAddThreads + thread_index();
    if (i >= size) return;
    float sum = 0.0f;
    for (int64_t split = 0; split < p.linear.splits; ++split)
        sum += p.linear.partial[split * size + i];
    const float y = finished(p.linear, p.scale, i % p.linear.out_features, sum);
    static_cast<uint16_t*>(p.linear.y)[i] = T::from_float(y);
}

// The partial sums of all splits, in their order -> y.
const char* add_splits(const CudaLinear& p, const CudaScale& s, const Device& device) {
    if (p.splits == 1) return nullptr;
    const int64_t blocks = (p.batch * p.out_features + kAddThreads - 1) / kAddThreads;
    const auto kernel = p.type == Number::kFloat16 ? add_kernel<Float16> : add_kernel<BFloat16>;
    return launch(kernel, blocks, 1, kAddThreads, 0, device, AddSplits{p, s});
}

}  // namespace
}  // namespace lottery_sparse
