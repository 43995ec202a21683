// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the laws
// drawn from its words. Integer arithmetic only, so every device and compiler gives the same bits.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace lottery_sparse {

// One draw is keyed by these three; the fourth part of the counter is the block number.
struct PhiloxKey {
    uint64_t seed;
    uint32_t stream;
    uint32_t step;
};

struct PhiloxBlock {
    uint32_t word[4];
};

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

// Block `block` of the sequence: counter = (lo32(block), hi32(block), stream, step).
LS_HOST_DEVICE PhiloxBlock philox(const PhiloxKey& key, uint64_t block) {
    uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
    uint32_t c2 = key.stream, c3 = key.step;
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
        const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(p0);
        k0 += kPhiloxWeyl0;
        k1 += kPhiloxWeyl1;
    }
    return {{c0, c1, c2, c3}};
}

// Word of element `index`: word index % 4 of block index / 4.
LS_HOST_DEVICE uint32_t philox_word(const PhiloxKey& key, uint64_t index) {
    return philox(key, index / 4).word[index % 4];
}

// Bit -> +1 or -1.
LS_HOST_DEVICE float random_sign(uint32_t bit) {
    return bit ? 1.0f : -1.0f;
}

// Word -> [0, 1): its upper 24 bits, which a float holds exactly.
LS_HOST_DEVICE float random_uniform(uint32_t word) {
    return static_cast<float>(word >> 8) * (1.0f / (1 << 24));
}

constexpr int64_t kNormalTableSize = 1 << 15;

// 16 bits -> normal: sign bit and a table of |quantiles| in units of 2^-20 [kNormalTableSize].
LS_HOST_DEVICE float random_normal(uint32_t half, const int32_t* table) {
    const float magnitude = static_cast<float>(table[half & 0x7FFF]) * (1.0f / (1 << 20));
    return half & 0x8000 ? -magnitude : magnitude;
}

}  // namespace lottery_sparse
