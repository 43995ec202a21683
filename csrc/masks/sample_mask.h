// Learned masks: element i is kept where 24 bits of its random word are below the exact
// floor(sigmoid(score) 2^24).
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/variants.h"

namespace lottery_sparse {

// Masks are split at multiples of this many elements.
constexpr int64_t kSampleGrain = 1 << 13;

struct SampleMaskKernels {
    // Writes mask[begin..end), 0 or 1, of score[0..end); begin is a multiple of kSampleGrain.
    void (*sample)(const PhiloxKey& key, int64_t begin, int64_t end, const float* score,
                   uint8_t* mask);
    // out[i] = weight[i] where element i of score[0..size) is kept, else 0; returns how many are.
    int64_t (*draw)(const PhiloxKey& key, int64_t size, const float* score, const float* weight,
                    float* out);
    void (*scale)(float factor, int64_t size, float* values);
    // Sum of a[i] b[i].
    double (*dot)(const float* a, const float* b, int64_t size);
    // From the gradient of a drawn and rescaled weight to that of its scores, in place:
    // (factor grad[i] weight[i] + offset) p (1 - p), p = sigmoid(score[i]).
    void (*score_gradient)(float factor, float offset, const float* weight, const float* score,
                           int64_t size, float* grad);
};

LS_DECLARE_KERNELS(SampleMaskKernels, sample_mask);

}  // namespace lottery_sparse
