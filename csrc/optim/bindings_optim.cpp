// The rim of the optimizers, see optim_rim.h.
#include "optim/optim_rim.h"
#include "rim/rim.h"

namespace lottery_sparse {
namespace {

bool is_strided(const Tensor& t) {
    int32_t layout;
    return aoti_torch_get_layout(t.get(), &layout) == 0 && layout == aoti_torch_layout_strided();
}

void misfit() {
    STD_TORCH_CHECK(false, kMisfit);
}

using Rim = OptimRim<Tensor, is_strided, misfit, std::vector<Tensor>, std::vector<int64_t>>;

}  // namespace

// For every device, because these say themselves which tensors they take.
STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CompositeExplicitAutograd, m) {
    m.impl("sgd_step", TORCH_BOX(&Rim::sgd_step));
    m.impl("adam_step", TORCH_BOX(&Rim::adam_step));
}

}  // namespace lottery_sparse
