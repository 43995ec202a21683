// Random tensors from Philox (philox.h): element i depends on (key, i) only.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/variants.h"

namespace lottery_sparse {

// Fills are split at multiples of this many elements: a whole number of blocks for every law.
constexpr int64_t kRandomGrain = 1 << 13;

// Each writes elements [begin, end) of out[0..end); begin is a multiple of kRandomGrain.
struct RandomFillKernels {
    void (*words)(const PhiloxKey& key, int64_t begin, int64_t end, uint32_t* out);
    void (*signs)(const PhiloxKey& key, int64_t begin, int64_t end, float* out);
    void (*uniform)(const PhiloxKey& key, int64_t begin, int64_t end, float* out);
    // table: int32 [kNormalTableSize]
    void (*normal)(const PhiloxKey& key, int64_t begin, int64_t end, const int32_t* table,
                   float* out);
};

LS_DECLARE_KERNELS(RandomFillKernels, random_fill);

}  // namespace lottery_sparse
