// The optimizers' ops again, as a part of _eager (eager.cpp), see optim_rim.h.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "optim/optim_rim.h"
#include "rim/parallel_rim.h"
#include "rim/schemas.h"

namespace lottery_sparse {
namespace {

bool is_strided(const at::Tensor& t) {
    return t.layout() == at::kStrided;
}

void misfit() {
    TORCH_CHECK(false, kMisfit);
}

using Rim = OptimRim<at::Tensor, is_strided, misfit, at::TensorList, at::IntArrayRef>;

}  // namespace

TORCH_LIBRARY_FRAGMENT(lottery_sparse_eager, m) {
    m.def(kSgdStep, &Rim::sgd_step);
    m.def(kAdamStep, &Rim::adam_step);
    m.def(kThreadsUsed, &threads_used);
}

}  // namespace lottery_sparse
