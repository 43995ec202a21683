// What the two sides of a CUDA kernel share: the driver on the host, which a C++ compiler compiles,
// and the kernel, which includes common/cuda_kernel.h.
#pragma once

#include <cstdint>

namespace lottery_sparse {

// How the numbers of a tensor are stored.
enum class Number : int { kFloat = 0, kFloat16 = 1, kBFloat16 = 2 };

// 16 and 8 bytes, read or written at once.
struct alignas(16) Words4 {
    uint32_t word[4];
};
struct alignas(8) Words2 {
    uint32_t word[2];
};

struct Device {
    int processors;  // multiprocessors
    int shared;      // bytes that a block can have
    void* stream;
};

}  // namespace lottery_sparse
