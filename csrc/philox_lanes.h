// Sixteen Philox blocks at a time, written so that the compiler turns each loop into vectors.
// Internal linkage: see LS_HOST_DEVICE in bits.h.
#pragma once

#include <cstdint>

#include "philox.h"

namespace lottery_sparse {
namespace {

constexpr int kLanes = 16;
constexpr int kLaneWords = 4 * kLanes;

// out[0..kLaneWords): the words of blocks first_block ... first_block + kLanes - 1.
inline void philox_lanes(const PhiloxKey& key, uint64_t first_block, uint32_t* out) {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        c0[i] = static_cast<uint32_t>(first_block + i);
        c1[i] = static_cast<uint32_t>((first_block + i) >> 32);
        c2[i] = key.stream;
        c3[i] = key.step;
    }
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        for (int i = 0; i < kLanes; ++i) {
            const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0[i];
            const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2[i];
            c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
            c1[i] = static_cast<uint32_t>(p1);
            c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
            c3[i] = static_cast<uint32_t>(p0);
        }
        k0 += kPhiloxWeyl0;
        k1 += kPhiloxWeyl1;
    }
    for (int i = 0; i < kLanes; ++i) {
        out[4 * i] = c0[i];
        out[4 * i + 1] = c1[i];
        out[4 * i + 2] = c2[i];
        out[4 * i + 3] = c3[i];
    }
}

}  // namespace
}  // namespace lottery_sparse
