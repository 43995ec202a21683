// train_step: forward, loss, backward and optimizer step of a stack of linear layers, compact,
// plain or with a learned mask, for one network or many, in one call.
//
// A network is computed from end to end by one thread, and nothing in it depends on which others
// there are: same bits alone or in company, for any thread count. Between layers activations stay
// in tiles [features][kTileBatch].
//
// A product runs over the lists of kept weights or over the dense effective weight, as the share of
// weights that the network keeps in the layer says.
#pragma once

#include <cstdint>
#include <vector>

#include "common/philox.h"
#include "linear/sparse_linear.h"
#include "optim/masked_optim.h"

namespace lottery_sparse {

// What the optimizer does to one parameter.
struct StepRule {
    bool adam;  // else SGD
    SgdRates sgd;
    AdamRates rates;
    float step_size;     // of Adam, see StepPart
    float second_scale;  // the same
};

// A plain layer has no lists: its values are its effective weight, C = N K. Nor has one with a
// learned mask: its values are the scores, its effective weight is drawn from `frozen`.
struct StepLayer {
    int64_t in_features;
    int64_t out_features;
    CompactLists lists;   // of a plain layer, only the capacity
    const uint8_t* mask;  // [E, N, K], not 0 = kept; the lists say the same
    bool plain;
    bool zero;                    // pruned weights hold zero
    float* values;                // [E, C]
    float* bias;                  // [E, N], or nullptr
    float* effective;             // [E, N, K]
    bool keep_effective;          // write the new values into it even where no product reads it
    float* values_state[2];       // [E, C], as StepPart's
    float* bias_state[2];         // [E, N]
    const float* frozen;          // [E, N, K], or nullptr: no learned mask; its bias is frozen too
    std::vector<PhiloxKey> keys;  // [E], of this step's draws
    bool rescale;                 // multiply what is drawn by weights / ones
    StepRule values_rule;
    StepRule bias_rule;
};

// relu between layers; the last one gives logits, whose cross-entropy is averaged over the batch.
struct TrainStep {
    int64_t networks;  // E
    int64_t batch;     // B, at least 1
    const float* x;    // [E, B, K], or [B, K] for all
    bool shared_x;
    const int64_t* labels;  // [E, B] or [B], each in [0, classes)
    bool shared_labels;
    std::vector<StepLayer> layers;
    float* loss;  // [E]
    int64_t threads;
    // Kept shares above which forward and dx read the dense effective weight, and above which the
    // gradients of all weights are computed and those of kept ones picked.
    double dense_multiply;
    double dense_sample;
};

// Throws std::bad_alloc where there is no memory for the activations, before anything is changed.
void train_step(const TrainStep& p, const Parallel& parallel);

}  // namespace lottery_sparse
