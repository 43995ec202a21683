// Learned masks: element i is kept where 24 bits of its random word are below the exact
// floor(sigmoid(score) 2^24).
#pragma once

#include <cstdint>

#include "philox.h"
#include "variants.h"

namespace lottery_sparse {

// Masks are split at multiples of this many elements.
constexpr int64_t kSampleGrain = 1 << 13;

struct SampleMaskKernels {
    // Writes mask[begin..end), 0 or 1, of score[0..end); begin is a multiple of kSampleGrain.
    void (*sample)(const PhiloxKey& key, int64_t begin, int64_t end, const float* score,
                   uint8_t* mask);
};

LS_DECLARE_KERNELS(SampleMaskKernels, sample_mask);

}  // namespace lottery_sparse
