// Bool masks <-> packed bits (bits.h) on a GPU.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace lottery_sparse {

struct CudaBits {
    int64_t rows;
    int64_t columns;
    int64_t words;   // of a packed row
    uint8_t* mask;   // [rows, columns]
    uint32_t* bits;  // [rows, words]
};

// mask -> bits, where a byte that is not zero is a kept weight; and bits -> mask. Both return
// nullptr, or the message of CUDA.
const char* cuda_pack_mask(const CudaBits& p, const Device& device);
const char* cuda_unpack_mask(const CudaBits& p, const Device& device);

}  // namespace lottery_sparse
