// What a CUDA kernel says to its machine. A kernel file includes this, knows no torch, and compiles
// for two machines: by nvcc for a GPU, and by a C++ compiler for a machine of the tests, which
// -DLS_MACHINE names and which has everything that cuda_machine.h has.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/device.h"
#if defined(LS_MACHINE)
#include LS_MACHINE
#else
#include "common/cuda_machine.h"
#endif

namespace lottery_sparse {

constexpr int kLanes = 32;

LS_DEVICE Words4 words_at(const void* p) {
    return *static_cast<const Words4*>(p);
}

LS_DEVICE uint32_t bits_of(float x) {
    union {
        float from;
        uint32_t to;
    } u = {x};
    return u.to;
}
LS_DEVICE float of_bits(uint32_t bits) {
    union {
        uint32_t from;
        float to;
    } u = {bits};
    return u.to;
}

struct Float32 {
    using Bits = uint32_t;
    LS_METHOD float to_float(uint32_t bits) { return of_bits(bits); }
    LS_METHOD uint32_t from_float(float x) { return bits_of(x); }
};

struct BFloat16 {
    using Bits = uint16_t;
    LS_METHOD float to_float(uint32_t bits) { return of_bits(bits << 16); }
    LS_METHOD uint16_t from_float(float x) {  // to nearest, ties to even
        const uint32_t bits = bits_of(x);
        if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
        return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    }
};

struct Float16 {
    using Bits = uint16_t;
    LS_METHOD float to_float(uint32_t bits) { return half_to_float(static_cast<uint16_t>(bits)); }
    LS_METHOD uint16_t from_float(float x) { return half_from_float(x); }
};

LS_DEVICE float number_at(const void* numbers, Number type, int64_t i) {
    if (type == Number::kFloat) return static_cast<const float*>(numbers)[i];
    const uint16_t bits = static_cast<const uint16_t*>(numbers)[i];
    return type == Number::kFloat16 ? Float16::to_float(bits) : BFloat16::to_float(bits);
}

LS_DEVICE void store_number(void* numbers, Number type, int64_t i, float x) {
    if (type == Number::kFloat)
        static_cast<float*>(numbers)[i] = x;
    else
        static_cast<uint16_t*>(numbers)[i] =
            type == Number::kFloat16 ? Float16::from_float(x) : BFloat16::from_float(x);
}

}  // namespace lottery_sparse
