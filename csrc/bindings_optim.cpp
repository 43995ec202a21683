// The rim of the optimizers. Nothing is written unless every tensor is one that the kernels take;
// else the op returns the position of the first Parameter that they do not.
#include <algorithm>
#include <cmath>

#include "masked_optim.h"
#include "rim.h"

namespace lottery_sparse {
namespace {

bool takes(const Tensor& t, ScalarType dtype) {
    int32_t layout;
    STD_TORCH_CHECK(aoti_torch_get_layout(t.get(), &layout) == 0, "a tensor has no layout");
    return layout == aoti_torch_layout_strided() && t.is_cpu() && t.scalar_type() == dtype &&
           t.is_contiguous();
}

struct Targets {
    const std::vector<Tensor>&effective, &starts, &columns;
    const std::vector<int64_t>& owners;  // positions of their Parameters, ascending
};

struct Step {
    std::vector<StepPart> parts;
    std::vector<ScatterTarget> targets;
    std::vector<int64_t> owners;  // the Parameter of each part
};

// Whether a target's tensors fit a compact Parameter of `networks` networks.
bool fits(const Tensor& parameter, int64_t networks, const Tensor& effective, const Tensor& starts,
          const Tensor& columns) {
    const bool wide = columns.scalar_type() == ScalarType::Int;
    if (!takes(effective, ScalarType::Float) || !takes(starts, ScalarType::Long) ||
        !takes(columns, wide ? ScalarType::Int : ScalarType::Short))
        return false;
    const int64_t bounds = networks ? starts.numel() / networks : 0;
    return same_shape(parameter, columns) && starts.numel() == bounds * networks &&
           (bounds > 1 ? effective.numel() % (networks * (bounds - 1)) == 0
                       : effective.numel() == 0);
}

// Fills `step` and returns -1, or returns the position of a Parameter that cannot be taken.
int64_t collect(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                const std::vector<Tensor>* first, const std::vector<Tensor>* second,
                const Targets& from, Step& step) {
    STD_TORCH_CHECK(params.size() == grads.size() && (!first || first->size() == params.size()) &&
                        (!second || second->size() == params.size()),
                    "every Parameter needs one gradient and one tensor of each state.");
    STD_TORCH_CHECK(from.owners.size() == from.effective.size() &&
                        from.owners.size() == from.starts.size() &&
                        from.owners.size() == from.columns.size(),
                    "every target needs its lists and its Parameter.");
    step.parts.reserve(params.size());
    size_t t = 0;
    for (size_t i = 0; i < params.size(); ++i) {
        const Tensor& parameter = params[i];
        const int64_t refused = static_cast<int64_t>(i), size = parameter.numel();
        for (const Tensor* tensor : {&parameter, &grads[i], first ? &(*first)[i] : nullptr,
                                     second ? &(*second)[i] : nullptr})
            if (tensor && (!takes(*tensor, ScalarType::Float) || tensor->numel() != size))
                return refused;
        float* const value = output<float>(parameter);
        float* const state[2] = {first ? output<float>((*first)[i]) : nullptr,
                                 second ? output<float>((*second)[i]) : nullptr};
        const size_t begin = t;
        while (t < from.owners.size() && from.owners[t] == refused) ++t;
        const bool compact = t > begin;
        const int64_t networks = compact && parameter.dim() == 2 ? parameter.size(0) : 1;
        const int64_t capacity = networks ? size / networks : 0;
        for (size_t j = begin; j < t; ++j)
            if (!fits(parameter, networks, from.effective[j], from.starts[j], from.columns[j]))
                return refused;
        for (int64_t e = 0; e < networks; ++e) {
            const int64_t first_target = static_cast<int64_t>(step.targets.size());
            int64_t used = compact ? 0 : size;
            for (size_t j = begin; j < t; ++j) {
                const int64_t rows = from.starts[j].numel() / networks - 1;
                const bool wide = from.columns[j].scalar_type() == ScalarType::Int;
                const int64_t dense = from.effective[j].numel() / networks;
                const char* columns = static_cast<const char*>(from.columns[j].const_data_ptr());
                const ScatterTarget target = {
                    output<float>(from.effective[j]) + e * dense,
                    static_cast<const int64_t*>(from.starts[j].const_data_ptr()) + e * (rows + 1),
                    columns + e * capacity * (wide ? 4 : 2),
                    rows,
                    rows ? dense / rows : 0,
                    wide};
                used = std::max(used, std::min(capacity, target.starts[rows]));
                step.targets.push_back(target);
            }
            const int64_t at = e * capacity;
            step.parts.push_back(
                {value + at,
                 floats(grads[i]) + at,
                 {state[0] ? state[0] + at : nullptr, state[1] ? state[1] + at : nullptr},
                 used,
                 0.0f,
                 0.0f,
                 first_target,
                 static_cast<int64_t>(step.targets.size())});
            step.owners.push_back(refused);
        }
    }
    STD_TORCH_CHECK(t == from.owners.size(), "owners must ascend and name Parameters.");
    return -1;
}

int64_t sgd_step_op(std::vector<Tensor> params, std::vector<Tensor> grads,
                    std::vector<Tensor> momenta, std::vector<Tensor> effective,
                    std::vector<Tensor> starts, std::vector<Tensor> columns,
                    std::vector<int64_t> owners, double lr, double momentum, double dampening,
                    double weight_decay, bool nesterov, bool maximize, bool first) {
    Step step;
    const int64_t refused = collect(params, grads, momentum != 0 ? &momenta : nullptr, nullptr,
                                    {effective, starts, columns, owners}, step);
    if (refused >= 0) return refused;
    sgd_step(
        {static_cast<float>(-lr), static_cast<float>(momentum), static_cast<float>(1 - dampening),
         static_cast<float>(weight_decay), nesterov, maximize, first},
        step.parts, step.targets, kParallel);
    return -1;
}

int64_t adam_step_op(std::vector<Tensor> params, std::vector<Tensor> grads,
                     std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                     std::vector<Tensor> steps, std::vector<Tensor> effective,
                     std::vector<Tensor> starts, std::vector<Tensor> columns,
                     std::vector<int64_t> owners, double lr, double beta1, double beta2, double eps,
                     double weight_decay, bool decoupled, bool maximize) {
    Step step;
    STD_TORCH_CHECK(steps.size() == params.size(), "every Parameter needs one step.");
    for (size_t i = 0; i < steps.size(); ++i)
        if (!takes(steps[i], ScalarType::Float) || steps[i].numel() != 1)
            return static_cast<int64_t>(i);
    const int64_t refused =
        collect(params, grads, &exp_avgs, &exp_avg_sqs, {effective, starts, columns, owners}, step);
    if (refused >= 0) return refused;
    for (const Tensor& t : steps) *output<float>(t) += 1;
    // in double, as Python has it, and once for Parameters that have taken as many steps
    double known = -1;
    float step_size = 0, second_scale = 0;
    for (size_t i = 0; i < step.parts.size(); ++i) {
        const double t = *floats(steps[step.owners[i]]);
        if (t != known) {
            known = t;
            step_size = static_cast<float>(-(lr / (1 - std::pow(beta1, t))));
            second_scale = static_cast<float>(std::sqrt(1 - std::pow(beta2, t)));
        }
        step.parts[i].step_size = step_size;
        step.parts[i].second_scale = second_scale;
    }
    adam_step(
        {static_cast<float>(1 - beta1), static_cast<float>(beta2), static_cast<float>(1 - beta2),
         static_cast<float>(eps), decoupled ? 0.0f : static_cast<float>(weight_decay),
         decoupled ? static_cast<float>(1 - lr * weight_decay) : 1.0f, maximize},
        step.parts, step.targets, kParallel);
    return -1;
}

}  // namespace

// For every device, because these say themselves which tensors they take.
STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CompositeExplicitAutograd, m) {
    m.impl("sgd_step", TORCH_BOX(&sgd_step_op));
    m.impl("adam_step", TORCH_BOX(&adam_step_op));
}

}  // namespace lottery_sparse
