// The rim of the optimizers, see optim_rim.h.
#include "optim/optim_rim.h"
#include "rim/rim.h"

namespace lottery_sparse {
namespace {

bool is_strided(const Tensor& t) {
    int32_t layout;
    return aoti_torch_get_layout(t.get(), &layout) == 0 && layout == aoti_torch_layout_strided();
}

using Rim = OptimRim<Tensor, is_strided, std::vector<Tensor>, std::vector<int64_t>>;

int64_t checked(int64_t refused) {
    STD_TORCH_CHECK(refused != kMisfit,
                    "params, grads, states and targets of the optimizer do not fit each other.");
    return refused;
}

int64_t sgd_step_op(std::vector<Tensor> params, std::vector<Tensor> grads,
                    std::vector<Tensor> momenta, std::vector<Tensor> effective,
                    std::vector<Tensor> starts, std::vector<Tensor> columns,
                    std::vector<int64_t> owners, double lr, double momentum, double dampening,
                    double weight_decay, bool nesterov, bool maximize, bool first) {
    return checked(Rim::sgd({params, grads, momentum != 0 ? &momenta : nullptr, nullptr, effective,
                             starts, columns, owners},
                            lr, momentum, dampening, weight_decay, nesterov, maximize, first,
                            kParallel));
}

int64_t adam_step_op(std::vector<Tensor> params, std::vector<Tensor> grads,
                     std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                     std::vector<Tensor> steps, std::vector<Tensor> effective,
                     std::vector<Tensor> starts, std::vector<Tensor> columns,
                     std::vector<int64_t> owners, double lr, double beta1, double beta2, double eps,
                     double weight_decay, bool decoupled, bool maximize) {
    return checked(
        Rim::adam({params, grads, &exp_avgs, &exp_avg_sqs, effective, starts, columns, owners},
                  steps, lr, beta1, beta2, eps, weight_decay, decoupled, maximize, kParallel));
}

}  // namespace

// For every device, because these say themselves which tensors they take.
STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CompositeExplicitAutograd, m) {
    m.impl("sgd_step", TORCH_BOX(&sgd_step_op));
    m.impl("adam_step", TORCH_BOX(&adam_step_op));
}

}  // namespace lottery_sparse
