// What the tests call of the kernels of compact layers; see emulate_cuda.h.
#include "linear/cuda_compact.h"

using namespace lottery_sparse;

extern "C" const char* ls_emulate_compact_pack(const CudaPack* p) {
    return cuda_compact_pack(*p, {});
}

extern "C" const char* ls_emulate_compact_linear(const CudaCompact* p, int processors, int shared) {
    return cuda_compact_linear(*p, {processors, shared, nullptr});
}

extern "C" const char* ls_emulate_compact_dvalues(const CudaDvalues* p, int processors,
                                                  int shared) {
    return cuda_compact_dvalues(*p, {processors, shared, nullptr});
}

extern "C" const char* ls_emulate_scatter_kept(const CudaScatter* p) {
    return cuda_scatter_kept(*p, {});
}
