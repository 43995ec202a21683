#include <cmath>
#include <cstring>

#include "common/philox_lanes.h"
#include "common/simd.h"
#include "masks/sample_mask.h"

namespace lottery_sparse {
namespace {

constexpr float kRange = 1 << 24;  // of a draw
// Where a draw is as near to `limit` as this, `exact_limit` decides.
constexpr int32_t kDoubt = 8;

// 2^n exp(f), where n is in the low bits of shifted = n + 1.5 2^23, and |f| is at most log(2) / 2.
inline float exponential(float shifted, float f) {
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
    return e * power;
}

// sigmoid(score) 2^24, wrong by less than 3. A score counts as at most 88 in size, NaN as -88.
// Compilers make vectors of a loop over it.
inline int32_t limit(float score) {
    float t = -score;
    t = t < 88.0f ? t : 88.0f;
    t = t > -88.0f ? t : -88.0f;
    const float z = t * 1.44269504f;        // exp(t) = 2^z = 2^n 2^f
    const float shifted = z + 12582912.0f;  // 1.5 2^23: its low bits are n
    const float f = (z - (shifted - 12582912.0f)) * 0.69314718f;
    return static_cast<int32_t>(kRange / (1.0f + exponential(shifted, f)));
}

int32_t exact_limit(float score) {
    if (!(score == score)) return 0;
    return static_cast<int32_t>(kRange / (1.0 + std::exp(-static_cast<double>(score))));
}

// Calls keep(first, n, below) on up to kLaneWords elements at a time: below[i] is negative where
// element first + i is kept.
template <class Keep>
inline void for_draws(const PhiloxKey& key, int64_t begin, int64_t end, const float* score,
                      const Keep& keep) {
    alignas(64) uint32_t words[kLaneWords];
    alignas(64) int32_t below[kLaneWords];
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
            below[i] = static_cast<int32_t>(words[i] >> 8) - limit(s[i]);
            doubt |= static_cast<uint32_t>(below[i] + kDoubt) <= 2 * kDoubt;
        }
        if (doubt)  // one group in fifteen thousand
            for (int i = 0; i < kLaneWords; ++i)
                below[i] = static_cast<int32_t>(words[i] >> 8) - exact_limit(s[i]);
        keep(first, n, below);
    }
}

void sample(const PhiloxKey& key, int64_t begin, int64_t end, const float* score, uint8_t* mask) {
    for_draws(key, begin, end, score, [&](int64_t first, int64_t n, const int32_t* below) {
        for (int64_t i = 0; i < n; ++i) mask[first + i] = static_cast<uint32_t>(below[i]) >> 31;
    });
}

// Selected by bits, so that what a dropped weight holds stays out, NaN included.
inline uint32_t select(const float* weight, const int32_t* below, int64_t n, float* out) {
    uint32_t ones = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t kept = static_cast<uint32_t>(below[i] >> 31);
        uint32_t bits;
        std::memcpy(&bits, weight + i, sizeof(bits));
        bits &= kept;
        std::memcpy(out + i, &bits, sizeof(bits));
        ones -= kept;
    }
    return ones;
}

int64_t draw(const PhiloxKey& key, int64_t size, const float* score, const float* weight,
             float* out) {
    int64_t ones = 0;
    for_draws(key, 0, size, score, [&](int64_t first, int64_t n, const int32_t* below) {
        // a count that the compiler knows
        ones += n == kLaneWords ? select(weight + first, below, kLaneWords, out + first)
                                : select(weight + first, below, n, out + first);
    });
    return ones;
}

void scale(float factor, int64_t size, float* values) {
    for (int64_t i = 0; i < size; ++i) values[i] *= factor;
}

double dot(const float* a, const float* b, int64_t size) {
    constexpr int64_t kBlock = 1024;  // summed in floats
    double total = 0.0;
    for (int64_t first = 0; first < size; first += kBlock) {
        const int64_t end = first + kBlock < size ? first + kBlock : size;
        Vec sums[4 * kSumVecs];
        for (Vec& sum : sums) sum = zero();
        int64_t i = first;
        for (; i + 4 * kSumLanes <= end; i += 4 * kSumLanes)
            for (int v = 0; v < 4 * kSumVecs; ++v)
                sums[v] = fma(load(a + i + v * kWidth), load(b + i + v * kWidth), sums[v]);
        alignas(64) float lanes[kSumLanes];
        for (int s = 0; s < kSumVecs; ++s)
            store(lanes + s * kWidth, add(add(sums[s], sums[kSumVecs + s]),
                                          add(sums[2 * kSumVecs + s], sums[3 * kSumVecs + s])));
        for (const float lane : lanes) total += lane;
        for (; i < end; ++i) total += static_cast<double>(a[i]) * b[i];
    }
    return total;
}

// p (1 - p) = e / (1 + e)^2 with e = exp(-|score|); 0 for |score| from 88 on, and for a NaN.
inline float variance(float score) {
    float t = score < 0.0f ? score : -score;
    t = t > -88.0f ? t : -88.0f;
    const float shifted = t * 1.44269504f + 12582912.0f;  // 1.5 2^23: its low bits are n
    const float n = shifted - 12582912.0f;
    const float f = t - n * 0.693359375f + n * 2.12194440e-4f;  // t - n log(2), in two parts
    const float e = exponential(shifted, f);
    return e / ((1.0f + e) * (1.0f + e));
}

void score_gradient(float factor, float offset, const float* weight, const float* score,
                    int64_t size, float* grad) {
    for (int64_t i = 0; i < size; ++i)
        grad[i] = (factor * grad[i] * weight[i] + offset) * variance(score[i]);
}

}  // namespace

const SampleMaskKernels LS_KERNELS(sample_mask) = {sample, draw, scale, dot, score_gradient};

}  // namespace lottery_sparse
