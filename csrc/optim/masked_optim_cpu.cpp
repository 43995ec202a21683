#include "common/simd.h"
#include "optim/masked_optim.h"

namespace lottery_sparse {
namespace {

// Calls update(value, grad, state) on kWidth elements at a time; the rest goes through padded
// copies, so that every element gets the same operations.
template <int kStates, class Update>
inline void for_vectors(const StepPart& part, int64_t begin, int64_t end, const Update& update) {
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) {
        float* state[2];
        for (int s = 0; s < kStates; ++s) state[s] = part.state[s] + i;
        update(part.value + i, part.grad + i, state);
    }
    if (i == end) return;
    const int64_t bytes = (end - i) * sizeof(float);
    float value[kWidth] = {}, grad[kWidth] = {}, copies[2][kWidth] = {};
    float* state[2] = {copies[0], copies[1]};
    std::memcpy(value, part.value + i, bytes);
    std::memcpy(grad, part.grad + i, bytes);
    for (int s = 0; s < kStates; ++s) std::memcpy(copies[s], part.state[s] + i, bytes);
    update(value, grad, state);
    std::memcpy(part.value + i, value, bytes);
    for (int s = 0; s < kStates; ++s) std::memcpy(part.state[s] + i, copies[s], bytes);
}

// The gradient to descend, with L2 decay.
inline Vec descent(const float* grad, Vec value, bool maximize, float weight_decay) {
    Vec g = load(grad);
    if (maximize) g = mul(broadcast(-1.0f), g);
    if (weight_decay != 0.0f) g = fma(broadcast(weight_decay), value, g);
    return g;
}

// The order of operations is that of torch.optim, as far as torch itself has one.
template <int kStates>
void sgd_part(const SgdRates& r, const StepPart& part, int64_t begin, int64_t end) {
    for_vectors<kStates>(
        part, begin, end, [&](float* value, const float* grad, float* const* state) {
            const Vec old = load(value);
            Vec g = descent(grad, old, r.maximize, r.weight_decay);
            if (kStates > 0) {
                Vec buffer = g;
                if (!r.first)
                    buffer =
                        fma(broadcast(r.undamped), g, mul(load(state[0]), broadcast(r.momentum)));
                store(state[0], buffer);
                g = r.nesterov ? fma(broadcast(r.momentum), buffer, g) : buffer;
            }
            store(value, fma(broadcast(r.lr), g, old));
        });
}

void sgd(const SgdRates& r, const StepPart& part, int64_t begin, int64_t end) {
    part.state[0] ? sgd_part<1>(r, part, begin, end) : sgd_part<0>(r, part, begin, end);
}

void adam(const AdamRates& r, const StepPart& part, int64_t begin, int64_t end) {
    const Vec beta2 = broadcast(r.beta2), second_weight = broadcast(r.second_weight);
    const Vec eps = broadcast(r.eps), step_size = broadcast(part.step_size);
    const Vec second_scale = broadcast(part.second_scale);
    // lerp from the nearer end, as torch's does
    const bool near = r.first_weight < 0.5f;
    const Vec weight = broadcast(near ? r.first_weight : r.first_weight - 1.0f);
    for_vectors<2>(part, begin, end, [&](float* value, const float* grad, float* const* state) {
        const Vec old = load(value);
        const Vec g = descent(grad, old, r.maximize, r.weight_decay);
        const Vec m = load(state[0]);
        const Vec first = fma(weight, sub(g, m), near ? m : g);
        const Vec second = fma(mul(second_weight, g), g, mul(load(state[1]), beta2));
        store(state[0], first);
        store(state[1], second);
        const Vec denominator = add(div(sqrt(second), second_scale), eps);
        const Vec shrunk = r.shrink == 1.0f ? old : mul(old, broadcast(r.shrink));
        store(value, add(shrunk, div(mul(step_size, first), denominator)));
    });
}

}  // namespace

const MaskedOptimKernels LS_KERNELS(masked_optim) = {sgd, adam};

}  // namespace lottery_sparse
