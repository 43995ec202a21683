// Whether numbers are finite. A product that skips pruned weights asks: where a pruned weight meets
// NaN or Inf, the dense product has 0 * NaN, which is NaN.
#pragma once

#include <cstdint>

#include "common/bfloat16.h"
#include "common/variants.h"

namespace lottery_sparse {

// True only if all numbers are finite. False may be a false alarm, for numbers of 1e19 and more.
struct FiniteKernels {
    bool (*floats)(const float* numbers, int64_t count);
    bool (*halves)(const Bfloat16* numbers, int64_t count);
};

LS_DECLARE_KERNELS(FiniteKernels, finite);

// Internal linkage: see LS_HOST_DEVICE in bits.h.
namespace {

inline bool all_finite(const float* numbers, int64_t count) {
    return LS_CHOSEN_KERNELS(finite).floats(numbers, count);
}
inline bool all_finite(const Bfloat16* numbers, int64_t count) {
    return LS_CHOSEN_KERNELS(finite).halves(numbers, count);
}

inline bool is_finite(float v) {
    return v - v == 0.0f;
}

}  // namespace

}  // namespace lottery_sparse
