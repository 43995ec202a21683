// What the tests call of the optimizer's kernels; see emulate_cuda.h.
#include "optim/cuda_optim.h"

using namespace lottery_sparse;

extern "C" const char* ls_emulate_sgd_step(const CudaSgd* p) {
    return cuda_sgd_step(*p, {});
}

extern "C" const char* ls_emulate_adam_step(const CudaAdam* p) {
    return cuda_adam_step(*p, {});
}

extern "C" const char* ls_emulate_count_steps(const CudaCount* p) {
    return cuda_count_steps(*p, {});
}
