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

using Rim = OptimRim<at::Tensor, is_strided, at::TensorList, at::IntArrayRef>;

int64_t checked(int64_t refused) {
    TORCH_CHECK(refused != kMisfit,
                "params, grads, states and targets of the optimizer do not fit each other.");
    return refused;
}

int64_t sgd_step_op(at::TensorList params, at::TensorList grads, at::TensorList momenta,
                    at::TensorList effective, at::TensorList starts, at::TensorList columns,
                    at::IntArrayRef owners, double lr, double momentum, double dampening,
                    double weight_decay, bool nesterov, bool maximize, bool first) {
    return checked(Rim::sgd({params, grads, momentum != 0 ? &momenta : nullptr, nullptr, effective,
                             starts, columns, owners},
                            lr, momentum, dampening, weight_decay, nesterov, maximize, first,
                            kParallel));
}

int64_t adam_step_op(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                     at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList effective,
                     at::TensorList starts, at::TensorList columns, at::IntArrayRef owners,
                     double lr, double beta1, double beta2, double eps, double weight_decay,
                     bool decoupled, bool maximize) {
    return checked(
        Rim::adam({params, grads, &exp_avgs, &exp_avg_sqs, effective, starts, columns, owners},
                  steps, lr, beta1, beta2, eps, weight_decay, decoupled, maximize, kParallel));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lottery_sparse_eager, m) {
    m.def(kSgdStep, &sgd_step_op);
    m.def(kAdamStep, &adam_step_op);
    m.def(kThreadsUsed, &threads_used);
}

}  // namespace lottery_sparse
