// What the tests call of the kernels of masks as bits; see emulate_cuda.h.
#include "masks/cuda_bits.h"

using namespace lottery_sparse;

extern "C" const char* ls_emulate_mask_bits(const CudaBits* p, bool pack) {
    return pack ? cuda_pack_mask(*p, {}) : cuda_unpack_mask(*p, {});
}
