// The rim of _C_cuda for masks as bits, see cuda_bits.h.
#include "common/bits.h"
#include "masks/cuda_bits.h"
#include "rim/cuda_rim.h"

namespace lottery_sparse {
namespace {

void check_matrix(const char* name, const Tensor& t, ScalarType dtype) {
    STD_TORCH_CHECK(t.is_cuda() && t.dim() == 2 && t.scalar_type() == dtype, name,
                    " must be a CUDA tensor [rows, columns] of ", toString(dtype), ", got ",
                    toString(t.scalar_type()), " ", shape_text(t), ".");
}

// A pack writes every element of `bits`, an unpack every element of `mask`.
CudaBits problem(const Tensor& mask, const Tensor& bits) {
    CudaBits p = {bits.size(0), mask.size(1), bits.size(1), nullptr, nullptr};
    if (mask.numel()) p.mask = output<uint8_t>(mask);
    if (bits.numel()) p.bits = output<uint32_t>(bits);
    return p;
}

Tensor pack_mask_op(Tensor mask) {
    check_matrix("mask", mask, ScalarType::Bool);
    const torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
    mask = torch::stable::contiguous(mask);
    const Tensor bits =
        torch::stable::new_empty(mask, {mask.size(0), packed_words(mask.size(1))}, ScalarType::Int);
    check_launch(cuda_pack_mask(problem(mask, bits), device_of(mask)));
    return bits;
}

Tensor unpack_mask_op(Tensor bits, int64_t columns) {
    check_matrix("bits", bits, ScalarType::Int);
    STD_TORCH_CHECK(columns >= 0 && bits.size(1) == packed_words(columns), "bits has ",
                    bits.size(1), " words a row, but ", columns, " columns need ",
                    packed_words(columns < 0 ? 0 : columns), ".");
    const torch::stable::accelerator::DeviceGuard guard(bits.get_device_index());
    bits = torch::stable::contiguous(bits);
    const Tensor mask = torch::stable::new_empty(bits, {bits.size(0), columns}, ScalarType::Bool);
    check_launch(cuda_unpack_mask(problem(mask, bits), device_of(bits)));
    return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lottery_sparse_cuda, m) {
    m.def("pack_mask(Tensor mask) -> Tensor");
    m.def("unpack_mask(Tensor bits, int columns) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_cuda, CUDA, m) {
    m.impl("pack_mask", TORCH_BOX(&pack_mask_op));
    m.impl("unpack_mask", TORCH_BOX(&unpack_mask_op));
}

}  // namespace lottery_sparse
