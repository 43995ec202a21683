// What the sums of a block become; shared by the kernel files of ternary_linear.
// Internal linkage: see LS_HOST_DEVICE in bits.h.
#pragma once

#include "packed/ternary_linear.h"

namespace lottery_sparse {
namespace {

constexpr int64_t kRows = kTernaryRows;

// y = scale * sum + bias of one block and one row of x.
inline void finish(const float sums[kRows], const float* scale, bool by_row, const float* bias,
                   int64_t block, int64_t out_features, float* y) {
    const int64_t first = block * kRows;
    const int64_t n = out_features - first < kRows ? out_features - first : kRows;
    for (int64_t i = 0; i < n; ++i) {
        const float scaled = sums[i] * scale[by_row ? first + i : 0];
        y[first + i] = bias ? scaled + bias[first + i] : scaled;
    }
}

}  // namespace
}  // namespace lottery_sparse
