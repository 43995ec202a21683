// The end of a product of cuda_linear.h: sums -> y, or -> partial sums.
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

}  // namespace lottery_sparse
