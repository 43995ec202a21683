// where(mask, values, others or 0), bit by bit: a NaN stays where it is.
#pragma once

#include <cstdint>

#include "common/variants.h"

namespace lottery_sparse {

struct SelectKeptKernels {
    // out[i] = mask[i] ? values[i] : others ? others[i] : 0 for i in [0, count), elements of
    // `width` bytes (2, 4 or 8).
    void (*select)(const uint8_t* mask, const void* values, const void* others, void* out,
                   int64_t count, int width);
    // The same in place. Returns whether it wrote: it writes nothing to values that are right.
    bool (*put_back)(const uint8_t* mask, void* values, const void* others, int64_t count,
                     int width);
};

LS_DECLARE_KERNELS(SelectKeptKernels, select_kept);

}  // namespace lottery_sparse
