// The rim of _C_cuda for optimizers, see cuda_optim.h: the tables, and what they point to, are made
// and kept right by lottery_sparse/ops/steps/tables.py.
#include <optional>

#include "optim/cuda_optim.h"
#include "rim/cuda_rim.h"

namespace lottery_sparse {
namespace {

const int64_t* checked_table(Tensor& table, int64_t numbers) {
    STD_TORCH_CHECK(table.is_cuda() && table.scalar_type() == ScalarType::Long &&
                        table.dim() == 1 && table.is_contiguous() && table.numel() >= numbers,
                    "table must be a contiguous CUDA tensor of ", numbers, " int64, got ",
                    toString(table.scalar_type()), " ", shape_text(table), ".");
    return static_cast<const int64_t*>(table.const_data_ptr());
}

const float* one_float(const char* name, const std::optional<Tensor>& t, const Tensor& table) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->numel() > 0, name,
                    " must be float32, got ", toString(t->scalar_type()), ".");
    return floats(checked_on(name, *t, table));
}

CudaStep step_of(Tensor& table, const Tensor& like, int64_t parts, int64_t targets, int64_t chunks,
                 const std::optional<Tensor>& lr, double rate) {
    const int64_t* numbers = checked_table(table, targets);
    STD_TORCH_CHECK(targets == parts * (kPart + 1) + 1 && chunks > 0, "a table of ", parts,
                    " parts has its targets at ", parts * (kPart + 1) + 1, ", got ", targets, ".");
    return {numbers,
            numbers + targets,
            parts,
            chunks,
            number_of("params", like),
            one_float("lr", lr, table),
            static_cast<float>(rate)};
}

void sgd_step_op(Tensor table, Tensor like, int64_t parts, int64_t targets, int64_t chunks,
                 std::optional<Tensor> lr, double rate, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, bool states, bool first) {
    const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
    const CudaStep step = step_of(table, like, parts, targets, chunks, lr, rate);
    check_launch(
        cuda_sgd_step({step, static_cast<float>(momentum), static_cast<float>(1 - dampening),
                       static_cast<float>(weight_decay), states, first, nesterov, maximize},
                      device_of(table)));
}

void adam_step_op(Tensor table, Tensor like, int64_t parts, int64_t targets, int64_t chunks,
                  std::optional<Tensor> lr, double rate, std::optional<Tensor> factors,
                  double step_size, double second_scale, double beta1, double beta2, double eps,
                  double weight_decay, bool decoupled, bool maximize) {
    const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
    const CudaStep step = step_of(table, like, parts, targets, chunks, lr, rate);
    check_launch(cuda_adam_step(
        {step, one_float("factors", factors, table), static_cast<float>(step_size),
         static_cast<float>(second_scale), static_cast<float>(1 - beta1), static_cast<float>(beta2),
         static_cast<float>(1 - beta2), static_cast<float>(eps), static_cast<float>(weight_decay),
         decoupled, maximize},
        device_of(table)));
}

Tensor count_steps_op(Tensor table, int64_t begin, int64_t count, std::optional<Tensor> lr,
                      double rate, double log_beta1, double log_beta2) {
    const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
    const int64_t* numbers = checked_table(table, begin + count);
    const Tensor factors = torch::stable::new_empty(table, {count, 2}, ScalarType::Float);
    check_launch(cuda_count_steps({numbers + begin, count, one_float("lr", lr, table), rate,
                                   log_beta1, log_beta2, output<float>(factors)},
                                  device_of(table)));
    return factors;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lottery_sparse_cuda, m) {
    m.def(
        "sgd_step(Tensor table, Tensor like, int parts, int targets, int chunks, Tensor? lr, "
        "float rate, float momentum, float dampening, float weight_decay, bool nesterov, "
        "bool maximize, bool states, bool first) -> ()");
    m.def(
        "adam_step(Tensor table, Tensor like, int parts, int targets, int chunks, Tensor? lr, "
        "float rate, Tensor? factors, float step_size, float second_scale, float beta1, "
        "float beta2, float eps, float weight_decay, bool decoupled, bool maximize) -> ()");
    m.def(
        "count_steps(Tensor table, int begin, int count, Tensor? lr, float rate, float log_beta1, "
        "float log_beta2) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_cuda, CUDA, m) {
    m.impl("sgd_step", TORCH_BOX(&sgd_step_op));
    m.impl("adam_step", TORCH_BOX(&adam_step_op));
    m.impl("count_steps", TORCH_BOX(&count_steps_op));
}

}  // namespace lottery_sparse
