#include <cmath>
#include <cstring>

#include "philox_lanes.h"
#include "sample_mask.h"

namespace lottery_sparse {
namespace {

constexpr float kRange = 1 << 24;  // of a draw
// `limit` errs by less than 3; where a draw is as near as this, `exact_limit` decides.
constexpr int32_t kDoubt = 8;

// exp(-score) 2^-24's share of a limit: |score| up to 88, a NaN as -88. Written so that the
// compiler turns a loop over it into vectors.
inline int32_t limit(float score) {
    float t = -score;
    t = t < 88.0f ? t : 88.0f;
    t = t > -88.0f ? t : -88.0f;
    const float z = t * 1.44269504f;        // exp(t) = 2^z = 2^n 2^f
    const float shifted = z + 12582912.0f;  // 1.5 2^23: its low bits are n
    const float f = (z - (shifted - 12582912.0f)) * 0.69314718f;
    float e = 1.0f / 720;
    e = e * f + 1.0f / 120;
    e = e * f + 1.0f / 24;
    e = e * f + 1.0f / 6;
    e = e * f + 0.5f;
    e = e * f + 1.0f;
    e = e * f + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits - 0x4B400000 + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return static_cast<int32_t>(kRange / (1.0f + e * power));
}

int32_t exact_limit(float score) {
    if (!(score == score)) return 0;
    return static_cast<int32_t>(kRange / (1.0 + std::exp(-static_cast<double>(score))));
}

void sample(const PhiloxKey& key, int64_t begin, int64_t end, const float* score, uint8_t* mask) {
    alignas(64) uint32_t words[kLaneWords];
    alignas(64) int32_t above[kLaneWords];
    alignas(64) float padded[kLaneWords] = {};
    for (int64_t first = begin; first < end; first += kLaneWords) {
        const int64_t n = end - first < kLaneWords ? end - first : kLaneWords;
        const float* s = score + first;
        if (n < kLaneWords) {
            std::memcpy(padded, s, n * sizeof(float));
            s = padded;
        }
        philox_lanes(key, static_cast<uint64_t>(first / 4), words);
        uint32_t doubt = 0;
        for (int i = 0; i < kLaneWords; ++i) {
            above[i] = static_cast<int32_t>(words[i] >> 8) - limit(s[i]);
            doubt |= static_cast<uint32_t>(above[i] + kDoubt) <= 2 * kDoubt;
        }
        if (doubt)  // one group in fifteen thousand
            for (int i = 0; i < kLaneWords; ++i)
                above[i] = static_cast<int32_t>(words[i] >> 8) - exact_limit(s[i]);
        for (int64_t i = 0; i < n; ++i) mask[first + i] = static_cast<uint32_t>(above[i]) >> 31;
    }
}

}  // namespace

const SampleMaskKernels LS_KERNELS(sample_mask) = {sample};

}  // namespace lottery_sparse
