// The rim of learned masks: sample_mask.
#include <algorithm>
#include <limits>

#include "masks/sample_mask.h"
#include "rim/rim.h"

namespace lottery_sparse {
namespace {

Tensor sample_mask_op(Tensor score, int64_t seed, int64_t stream, int64_t step) {
    constexpr int64_t kMax = std::numeric_limits<uint32_t>::max();
    score = checked("score", score, ScalarType::Float);
    STD_TORCH_CHECK(0 <= stream && stream <= kMax, "stream must fit 32 bits, got ", stream, ".");
    STD_TORCH_CHECK(0 <= step && step <= kMax, "step must fit 32 bits, got ", step, ".");
    const PhiloxKey key = {static_cast<uint64_t>(seed), static_cast<uint32_t>(stream),
                           static_cast<uint32_t>(step)};
    Tensor mask = torch::stable::empty(score.sizes(), ScalarType::Bool);
    const int64_t size = score.numel(), parts = (size + kSampleGrain - 1) / kSampleGrain;
    const auto sample = LS_CHOSEN_KERNELS(sample_mask).sample;
    kParallel(parts, 1, [&](int64_t begin, int64_t end) {
        sample(key, begin * kSampleGrain, std::min(end * kSampleGrain, size), floats(score),
               output<uint8_t>(mask));
    });
    return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CPU, m) {
    m.impl("sample_mask", TORCH_BOX(&sample_mask_op));
}

}  // namespace lottery_sparse
