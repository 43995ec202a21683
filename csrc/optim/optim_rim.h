// What both rims of the optimizers share: bindings_optim.cpp on torch's stable ABI and
// eager_optim.cpp on its C++ interface, which hands over forty tensors 5 us sooner.
//
// A step writes nothing unless the kernels take every tensor; else it returns the position of the
// first Parameter that they do not take. Lists of unequal lengths are the rim's error, `misfit`.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "optim/masked_optim.h"
#include "rim/parallel_rim.h"

namespace lottery_sparse {
namespace {

constexpr int64_t kTaken = -1;
constexpr const char* kMisfit =
    "params, grads, states and targets of the optimizer do not fit each other.";

// Tensor is the rim's class, Tensors and Integers are its lists; misfit() throws.
template <class Tensor, bool (*is_strided)(const Tensor&), void (*misfit)(), class Tensors,
          class Integers>
class OptimRim {
  public:
    static int64_t sgd_step(Tensors params, Tensors grads, Tensors momenta, Tensors effective,
                            Tensors starts, Tensors columns, Integers owners, double lr,
                            double momentum, double dampening, double weight_decay, bool nesterov,
                            bool maximize, bool first) {
        Step step;
        const int64_t refused = collect({params, grads, momentum != 0 ? &momenta : nullptr, nullptr,
                                         effective, starts, columns, owners},
                                        step);
        if (refused != kTaken) return refused;
        lottery_sparse::sgd_step({static_cast<float>(-lr), static_cast<float>(momentum),
                                  static_cast<float>(1 - dampening),
                                  static_cast<float>(weight_decay), nesterov, maximize, first},
                                 step.parts, step.targets, kParallel);
        return kTaken;
    }

    static int64_t adam_step(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                             Tensors steps, Tensors effective, Tensors starts, Tensors columns,
                             Integers owners, double lr, double beta1, double beta2, double eps,
                             double weight_decay, bool decoupled, bool maximize) {
        if (steps.size() != params.size()) misfit();
        for (size_t i = 0; i < steps.size(); ++i)
            if (!takes(steps[i], Dtype::Float) || steps[i].numel() != 1)
                return static_cast<int64_t>(i);
        Step step;
        const int64_t refused = collect(
            {params, grads, &exp_avgs, &exp_avg_sqs, effective, starts, columns, owners}, step);
        if (refused != kTaken) return refused;
        // in double, as Python has it, and once for Parameters that have taken as many steps
        double known = -1;
        float step_size = 0, second_scale = 0;
        for (size_t i = 0; i < step.parts.size(); ++i) {
            const double t = *floats(steps[step.owners[i]]) + 1.0f;
            if (t != known) {
                known = t;
                step_size = static_cast<float>(-(lr / (1 - std::pow(beta1, t))));
                second_scale = static_cast<float>(std::sqrt(1 - std::pow(beta2, t)));
            }
            step.parts[i].step_size = step_size;
            step.parts[i].second_scale = second_scale;
        }
        lottery_sparse::adam_step(
            {static_cast<float>(1 - beta1), static_cast<float>(beta2),
             static_cast<float>(1 - beta2), static_cast<float>(eps),
             decoupled ? 0.0f : static_cast<float>(weight_decay),
             decoupled ? static_cast<float>(1 - lr * weight_decay) : 1.0f, maximize},
            step.parts, step.targets, kParallel);
        // last, so that a step for which there is no memory does not count
        for (const Tensor& taken : steps) *floats(taken) += 1;
        return kTaken;
    }

  private:
    struct Parameters {
        const Tensors &params, &grads;
        const Tensors *first, *second;  // states of the rule, or nullptr
        const Tensors &effective, &starts, &columns;
        const Integers& owners;  // positions of the targets' Parameters, ascending
    };
    using Dtype = decltype(std::declval<const Tensor&>().scalar_type());

    struct Step {
        std::vector<StepPart> parts;
        std::vector<ScatterTarget> targets;
        std::vector<int64_t> owners;  // the Parameter of each part
    };

    static float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

    static bool takes(const Tensor& t, Dtype dtype) {
        return is_strided(t) && t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous();
    }

    // Whether a target's tensors fit a compact Parameter of `networks` networks.
    static bool fits(const Tensor& parameter, int64_t networks, const Tensor& effective,
                     const Tensor& starts, const Tensor& columns) {
        const bool wide = columns.scalar_type() == Dtype::Int;
        if (!takes(effective, Dtype::Float) || !takes(starts, Dtype::Long) ||
            !takes(columns, wide ? Dtype::Int : Dtype::Short))
            return false;
        const int64_t bounds = networks ? starts.numel() / networks : 0;
        return same_shape(parameter, columns) && starts.numel() == bounds * networks &&
               (bounds > 1 ? effective.numel() % (networks * (bounds - 1)) == 0
                           : effective.numel() == 0);
    }

    // Fills `step` and returns kTaken, or returns the position of a Parameter that is not taken.
    static int64_t collect(const Parameters& from, Step& step) {
        const Tensors &params = from.params, &grads = from.grads;
        const Tensors *first = from.first, *second = from.second;
        const size_t count = params.size(), targets = from.owners.size();
        if (grads.size() != count || (first && first->size() != count) ||
            (second && second->size() != count) || from.effective.size() != targets ||
            from.starts.size() != targets || from.columns.size() != targets)
            misfit();
        step.parts.reserve(count);
        size_t t = 0;
        for (size_t i = 0; i < count; ++i) {
            const Tensor& parameter = params[i];
            const int64_t refused = static_cast<int64_t>(i), size = parameter.numel();
            for (const Tensor* tensor : {&parameter, &grads[i], first ? &(*first)[i] : nullptr,
                                         second ? &(*second)[i] : nullptr})
                if (tensor && (!takes(*tensor, Dtype::Float) || tensor->numel() != size))
                    return refused;
            float* const value = floats(parameter);
            float* const state[2] = {first ? floats((*first)[i]) : nullptr,
                                     second ? floats((*second)[i]) : nullptr};
            const size_t begin = t;
            while (t < targets && from.owners[t] == refused) ++t;
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
                    const bool wide = from.columns[j].scalar_type() == Dtype::Int;
                    const int64_t dense = from.effective[j].numel() / networks;
                    const char* columns =
                        static_cast<const char*>(from.columns[j].const_data_ptr());
                    const ScatterTarget target = {
                        floats(from.effective[j]) + e * dense,
                        static_cast<const int64_t*>(from.starts[j].const_data_ptr()) +
                            e * (rows + 1),
                        columns + e * capacity * (wide ? 4 : 2),
                        rows,
                        rows ? dense / rows : 0,
                        wide};
                    used = std::max(used, std::min(capacity, target.starts[rows]));
                    if (dense) step.targets.push_back(target);  // else it only says what is kept
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
        if (t != targets) misfit();
        return kTaken;
    }
};

}  // namespace
}  // namespace lottery_sparse
