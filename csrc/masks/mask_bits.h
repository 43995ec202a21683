// Bool masks (one byte per weight) and packed bits (bits.h): counting and converting.
#pragma once

#include <cstdint>

#include "common/variants.h"

namespace lottery_sparse {

struct MaskBitsKernels {
    // Number of kept (non-zero) bytes among mask[0..count).
    int64_t (*count_kept)(const uint8_t* mask, int64_t count);
    // mask [rows, columns] -> bits [rows, packed_words(columns)]; converts rows [begin, end).
    void (*pack_rows)(const uint8_t* mask, int64_t columns, uint32_t* bits, int64_t begin,
                      int64_t end);
    // The inverse; writes 0 or 1.
    void (*unpack_rows)(const uint32_t* bits, int64_t columns, uint8_t* mask, int64_t begin,
                        int64_t end);
};

LS_DECLARE_KERNELS(MaskBitsKernels, mask_bits);

}  // namespace lottery_sparse
