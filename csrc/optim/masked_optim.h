// masked_optim: a step of SGD or Adam over many tensors in one call. The new values of compact
// Parameters go straight into the dense effective weights that hold them.
//
// Each element is updated by itself, by the same operations in whole vectors and in tails: same
// bits for any thread count and any place of an element in its tensor.
#pragma once

#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "common/variants.h"

namespace lottery_sparse {

// The kept weights of one network in a dense matrix [N, K]: slots [starts[r], starts[r + 1]) of the
// values belong to row r.
struct ScatterTarget {
    float* dense;           // [N, K]
    const int64_t* starts;  // [N + 1]
    const void* columns;    // uint16_t or uint32_t (`wide`), by slot
    int64_t rows;           // N
    int64_t columns_count;  // K
    bool wide;
};

// A Parameter, or one network of a compact Parameter without its spare slots: those hold 0 and are
// never touched.
struct StepPart {
    float* value;       // [size]
    const float* grad;  // [size]
    float* state[2];    // [size]: SGD has the momentum buffer or nullptr, Adam both averages
    int64_t size;
    float step_size;                    // Adam: -lr / (1 - beta1^t)
    float second_scale;                 // Adam: sqrt(1 - beta2^t)
    int64_t first_target, last_target;  // in the list of targets
};

struct SgdRates {
    float lr;  // negated: what a gradient is multiplied with
    float momentum;
    float undamped;  // 1 - dampening
    float weight_decay;
    bool nesterov;
    bool maximize;
    bool first;  // the momentum buffers hold nothing yet
};

struct AdamRates {
    float first_weight;  // 1 - beta1
    float beta2;
    float second_weight;  // 1 - beta2
    float eps;
    float weight_decay;  // added to the gradient, or 0
    float shrink;        // factor of the weights, 1 - lr weight_decay of AdamW, or 1
    bool maximize;
};

void sgd_step(const SgdRates& rates, const std::vector<StepPart>& parts,
              const std::vector<ScatterTarget>& targets, const Parallel& parallel);
void adam_step(const AdamRates& rates, const std::vector<StepPart>& parts,
               const std::vector<ScatterTarget>& targets, const Parallel& parallel);

// Elements [begin, end) of a part.
struct MaskedOptimKernels {
    void (*sgd)(const SgdRates& rates, const StepPart& part, int64_t begin, int64_t end);
    void (*adam)(const AdamRates& rates, const StepPart& part, int64_t begin, int64_t end);
};

LS_DECLARE_KERNELS(MaskedOptimKernels, masked_optim);

}  // namespace lottery_sparse
