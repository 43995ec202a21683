#include "common/philox_lanes.h"
#include "masks/random_fill.h"

namespace lottery_sparse {
namespace {

// Draws the words of elements [begin, end), `PerWord` elements a word, and hands each group of
// kLaneWords words to store(words, first element, number of elements).
template <int PerWord, class Store>
inline void for_lanes(const PhiloxKey& key, int64_t begin, int64_t end, const Store& store) {
    constexpr int64_t kStep = PerWord * kLaneWords;
    alignas(64) uint32_t words[kLaneWords];
    for (int64_t i = begin; i < end; i += kStep) {
        philox_lanes(key, static_cast<uint64_t>(i / (4 * PerWord)), words);
        store(words, i, end - i < kStep ? end - i : kStep);
    }
}

void words(const PhiloxKey& key, int64_t begin, int64_t end, uint32_t* out) {
    for_lanes<1>(key, begin, end, [=](const uint32_t* w, int64_t first, int64_t n) {
        for (int64_t i = 0; i < n; ++i) out[first + i] = w[i];
    });
}

void signs(const PhiloxKey& key, int64_t begin, int64_t end, float* out) {
    for_lanes<32>(key, begin, end, [=](const uint32_t* w, int64_t first, int64_t n) {
        for (int64_t i = 0; i < n; ++i) out[first + i] = random_sign(w[i / 32] >> (i % 32) & 1u);
    });
}

void uniform(const PhiloxKey& key, int64_t begin, int64_t end, float* out) {
    for_lanes<1>(key, begin, end, [=](const uint32_t* w, int64_t first, int64_t n) {
        for (int64_t i = 0; i < n; ++i) out[first + i] = random_uniform(w[i]);
    });
}

void normal(const PhiloxKey& key, int64_t begin, int64_t end, const int32_t* table, float* out) {
    for_lanes<2>(key, begin, end, [=](const uint32_t* w, int64_t first, int64_t n) {
        for (int64_t i = 0; i < n; ++i)
            out[first + i] = random_normal(w[i / 2] >> (16 * (i % 2)), table);
    });
}

}  // namespace

const RandomFillKernels LS_KERNELS(random_fill) = {words, signs, uniform, normal};

}  // namespace lottery_sparse
