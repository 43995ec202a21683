// Packed mask bits: bit j of word w of a row is column 32 w + j, rows padded with zeros to 128
// bits.
#pragma once

#include <cstdint>

// Functions that run on the host and on a CUDA device. `static` on the host: files compiled for
// different instruction sets include this, and the linker must not merge their copies.
#if defined(__CUDACC__)
#define LS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LS_HOST_DEVICE static inline
#endif

namespace lottery_sparse {

constexpr int64_t kWordBits = 32;
constexpr int64_t kRowAlignBits = 128;  // one 16-byte load

// Words per packed row of `columns` columns.
LS_HOST_DEVICE int64_t packed_words(int64_t columns) {
    return (columns + kRowAlignBits - 1) / kRowAlignBits * (kRowAlignBits / kWordBits);
}

}  // namespace lottery_sparse
