// A step of SGD or Adam over many tensors of one dtype in one launch, see masked_optim.h. The
// tables that say where they lie are those of lottery_sparse/ops/steps/tables.py; what a mask keeps
// is read from the lists as the step runs, so that a captured step follows a changed mask.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace lottery_sparse {

constexpr int kStepChunk = 1024;  // elements of a block: CHUNK of tables.py
// Numbers of a row of a table, and their places: PART and TARGET.
constexpr int kPart = 9, kTarget = 6;

struct CudaStep {
    const int64_t* table;    // first chunks of the parts, and the number of chunks; then the parts
    const int64_t* targets;  // in the table
    int64_t parts;
    int64_t chunks;
    Number type;
    const float* lr;  // on the device, or nullptr
    float rate;       // else
};

struct CudaSgd {
    CudaStep step;
    float momentum;
    float undamped;  // 1 - dampening
    float weight_decay;
    bool states;  // momentum buffers
    bool first;   // which hold nothing yet
    bool nesterov;
    bool maximize;
};

struct CudaAdam {
    CudaStep step;
    const float* factors;  // by position of the Parameter, from CudaCount; or nullptr
    float step_size;       // else: -lr / (1 - beta1^t)
    float second_scale;    // sqrt(1 - beta2^t)
    float beta1_rest;      // 1 - beta1
    float beta2;
    float beta2_rest;  // 1 - beta2
    float eps;
    float weight_decay;
    bool decoupled;
    bool maximize;
};

// Counts steps on the device, and computes the factors of CudaAdam from them, in double.
struct CudaCount {
    const int64_t* steps;  // [count]: pointers of float
    int64_t count;
    const float* lr;
    double rate;
    double log_beta1, log_beta2;
    float* factors;  // [count, 2]
};

// Each returns nullptr, or the message of CUDA.
const char* cuda_sgd_step(const CudaSgd& p, const Device& device);
const char* cuda_adam_step(const CudaAdam& p, const Device& device);
const char* cuda_count_steps(const CudaCount& p, const Device& device);

}  // namespace lottery_sparse
