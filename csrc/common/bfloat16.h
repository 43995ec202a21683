// bfloat16 is storage: the upper half of a float. Sums run in float and are rounded once.
#pragma once

#include <bit>
#include <cstdint>

namespace lottery_sparse {

struct Bfloat16 {
    uint16_t bits;
};

// Internal linkage: see LS_HOST_DEVICE in bits.h.
namespace {

inline float number(float v) {
    return v;
}
inline float number(Bfloat16 v) {
    return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}

// The nearest bfloat16, of two the even one. NaN stays NaN; what is too large becomes infinity.
inline Bfloat16 rounded(float v) {
    const uint32_t bits = std::bit_cast<uint32_t>(v);
    const uint32_t even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    return {static_cast<uint16_t>(nan ? 0x7FC0 : even)};
}

inline void assign(float& target, float v) {
    target = v;
}
inline void assign(Bfloat16& target, float v) {
    target = rounded(v);
}

}  // namespace
}  // namespace lottery_sparse
