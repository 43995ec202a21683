// The rim of packed inference.
#include <optional>

#include "common/bits.h"
#include "packed/packed_linear.h"
#include "packed/ternary_linear.h"
#include "rim/rim.h"

namespace lottery_sparse {
namespace {

// Bias as [N], or nullptr.
const float* checked_bias(std::optional<Tensor>& bias, int64_t n) {
    if (!bias) return nullptr;
    bias = checked("bias", *bias, ScalarType::Float);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == n, "bias has shape ", shape_text(*bias),
                    ", but there are ", n, " rows.");
    return floats(*bias);
}

// Checks codes [blocks, words, 16] against a weight [rows, columns].
const uint32_t* checked_codes(Tensor& codes, int64_t rows, int64_t columns) {
    codes = checked("codes", codes, ScalarType::Int);
    STD_TORCH_CHECK(rows >= 0 && columns >= 0 && codes.dim() == 3 &&
                        codes.size(0) == (rows + kTernaryRows - 1) / kTernaryRows &&
                        codes.size(1) == (columns + kTernaryColumns - 1) / kTernaryColumns &&
                        codes.size(2) == kTernaryRows,
                    "codes has shape ", shape_text(codes), ", which does not fit ", rows,
                    " rows of ", columns, " columns.");
    return static_cast<const uint32_t*>(codes.const_data_ptr());
}

// From this many rows of x on, products of bfloat16 pairs beat sums from tables.
constexpr int64_t kHalfBatch = 3;

Tensor ternary_linear_op(Tensor x, Tensor codes, Tensor scale, std::optional<Tensor> bias,
                         int64_t rows, bool int8) {
    const bool half = x.scalar_type() == ScalarType::BFloat16 && !int8 && ternary_half_runs() &&
                      x.dim() == 2 && x.size(0) >= kHalfBatch;
    if (!half && x.scalar_type() == ScalarType::BFloat16)
        x = torch::stable::to(x, ScalarType::Float);
    x = checked("x", x, half ? ScalarType::BFloat16 : ScalarType::Float);
    check_rank("x", x, 2, 2);
    const int64_t k = x.size(1);
    const uint32_t* words = checked_codes(codes, rows, k);
    scale = checked("scale", scale, ScalarType::Float);
    STD_TORCH_CHECK(scale.dim() == 1 && (scale.numel() == 1 || scale.numel() == rows),
                    "scale has shape ", shape_text(scale), ", but there are ", rows, " rows.");
    STD_TORCH_CHECK(!int8 || k <= kTernaryMostColumns, "int8 activations take up to ",
                    kTernaryMostColumns, " columns, got ", k, "; use exact ones.");
    Tensor y = empty({x.size(0), rows}, ScalarType::Float);
    const TernaryLinear problem = {x.size(0),
                                   k,
                                   rows,
                                   floats(x),
                                   words,
                                   floats(scale),
                                   scale.numel() != 1,
                                   checked_bias(bias, rows),
                                   output<float>(y)};
    if (half)
        ternary_linear_half(problem, static_cast<const uint16_t*>(x.const_data_ptr()), kParallel);
    else if (int8)
        ternary_linear_int8(problem, kParallel);
    else
        ternary_linear(problem, kParallel);
    return y;
}

// Makes x, values and starts contiguous, and says whether values are bfloat16.
bool checked_entries(Tensor& x, Tensor& values, Tensor& starts) {
    x = checked("x", x, ScalarType::Float);
    check_rank("x", x, 2, 2);
    const bool half = values.scalar_type() == ScalarType::BFloat16;
    values = checked("values", values, half ? ScalarType::BFloat16 : ScalarType::Float);
    starts = checked("starts", starts, ScalarType::Long);
    return half;
}

Tensor csr_linear_op(Tensor x, Tensor values, Tensor starts, Tensor columns,
                     std::optional<Tensor> bias) {
    const bool half = checked_entries(x, values, starts);
    const bool wide = columns.scalar_type() == ScalarType::Int;
    columns = checked("columns", columns, wide ? ScalarType::Int : ScalarType::Short);
    STD_TORCH_CHECK(
        values.dim() == 1 && same_shape(values, columns) && starts.dim() == 1 && starts.numel() > 0,
        "values ", shape_text(values), ", columns ", shape_text(columns), " and starts ",
        shape_text(starts), " do not fit each other.");
    check_ends("starts", starts, values.numel());
    const int64_t rows = starts.numel() - 1;
    Tensor y = empty({x.size(0), rows}, ScalarType::Float);
    packed_linear({x.size(0), x.size(1), rows, floats(x),
                   static_cast<const int64_t*>(starts.const_data_ptr()), columns.const_data_ptr(),
                   values.const_data_ptr(), values.numel(), wide, half, checked_bias(bias, rows),
                   output<float>(y)},
                  kParallel);
    return y;
}

Tensor bitmap_linear_op(Tensor x, Tensor values, Tensor starts, Tensor bits,
                        std::optional<Tensor> bias) {
    const bool half = checked_entries(x, values, starts);
    bits = checked("bits", bits, ScalarType::Int);
    STD_TORCH_CHECK(values.dim() == 1 && starts.dim() == 1 && bits.dim() == 2 &&
                        starts.numel() == bits.size(0) + 1 &&
                        bits.size(1) == packed_words(x.size(1)),
                    "values ", shape_text(values), ", starts ", shape_text(starts), " and bits ",
                    shape_text(bits), " do not fit x ", shape_text(x), ".");
    check_ends("starts", starts, values.numel());
    const int64_t rows = bits.size(0);
    Tensor y = empty({x.size(0), rows}, ScalarType::Float);
    bitmap_linear({x.size(0), x.size(1), rows, floats(x),
                   static_cast<const int64_t*>(starts.const_data_ptr()),
                   static_cast<const uint32_t*>(bits.const_data_ptr()), values.const_data_ptr(),
                   values.numel(), half, checked_bias(bias, rows), output<float>(y)},
                  kParallel);
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CPU, m) {
    m.impl("bitmap_linear", TORCH_BOX(&bitmap_linear_op));
    m.impl("csr_linear", TORCH_BOX(&csr_linear_op));
    m.impl("ternary_linear", TORCH_BOX(&ternary_linear_op));
}

}  // namespace lottery_sparse
