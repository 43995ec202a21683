#include "common/finite.h"
#include "common/simd.h"

namespace lottery_sparse {
namespace {

// A sum of products of neighbours is finite only if they all are: half an operation a vector.
bool floats(const float* numbers, int64_t count) {
    constexpr int kSums = 8;
    Vec sum[kSums];
    for (Vec& s : sum) s = zero();
    int64_t i = 0;
    for (; i + 2 * kSums * kWidth <= count; i += 2 * kSums * kWidth)
        for (int s = 0; s < kSums; ++s) {
            const float* p = numbers + i + 2 * s * kWidth;
            sum[s] = fma(load(p), load(p + kWidth), sum[s]);
        }
    alignas(64) float lanes[kWidth];
    for (int s = 1; s < kSums; ++s) sum[0] = add(sum[0], sum[s]);
    store(lanes, sum[0]);
    float total = 0.0f;
    for (float lane : lanes) total += lane;
    for (; i < count; ++i) total += 0.0f * numbers[i];
    return is_finite(total);
}

bool halves(const Bfloat16* numbers, int64_t count) {
    uint16_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint16_t bits;
        std::memcpy(&bits, numbers + i, sizeof bits);
        bits &= 0x7FFF;
        most = bits > most ? bits : most;
    }
    return most < 0x7F80;
}

}  // namespace

const FiniteKernels LS_KERNELS(finite) = {floats, halves};

}  // namespace lottery_sparse
