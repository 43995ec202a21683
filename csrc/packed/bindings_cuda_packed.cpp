// The rim of _C_cuda for packed inference, on the device of x and its current stream.
#include <optional>

#include "packed/cuda_linear.h"
#include "rim/cuda_rim.h"

namespace lottery_sparse {
namespace {

constexpr int64_t kAlignment = 16;  // of what is read 16 bytes at a time

// Words of 32 bits that are read 16 bytes at a time.
const uint32_t* checked_words(const char* name, Tensor& t, const Tensor& x) {
    t = checked_on(name, t, x);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, name, " must be int32, got ",
                    toString(t.scalar_type()), ".");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment == 0, name,
                    " must start at a multiple of ", kAlignment, " bytes; clone it.");
    return static_cast<const uint32_t*>(t.const_data_ptr());
}

CudaScale checked_scale(Tensor& scale, int64_t rows, const Tensor& x) {
    scale = checked_on("scale", scale, x);
    STD_TORCH_CHECK(scale.dim() == 1 && (scale.numel() == 1 || scale.numel() == rows),
                    "scale has shape ", shape_text(scale), ", but there are ", rows, " rows.");
    return {scale.const_data_ptr(), number_of("scale", scale), scale.numel() != 1, 1.0f};
}

// A product of x [B, K] with a weight of `rows` rows, and the tensors that its pointers point to.
struct Product {
    CudaLinear linear;
    Tensor x, y;
    std::optional<Tensor> bias, partial, rows, x_scale;

    Product(const Tensor& given, std::optional<Tensor> given_bias, int64_t rows)
        : x(torch::stable::contiguous(given)),
          y(torch::stable::new_empty(x, {given.size(0), rows})),
          bias(given_bias) {
        const Number type = number_of("x", x);
        linear = {x.size(0), x.size(1), rows,   x.const_data_ptr(), nullptr,
                  nullptr,   nullptr,   type,   Number::kFloat,     1,
                  type,      1,         nullptr};
        if (y.numel()) linear.y = y.mutable_data_ptr();
        if (bias) {
            bias = checked_on("bias", *bias, x);
            STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == rows, "bias has shape ",
                            shape_text(*bias), ", but there are ", rows, " rows.");
            linear.bias = bias->const_data_ptr();
            linear.bias_type = number_of("bias", *bias);
        }
    }

    // Makes rows of 16 bits: three parts of a float32 x, or for int8 the whole numbers of any x.
    // y must have elements.
    void prepare(bool int8, const Device& device) {
        if (linear.type != Number::kFloat && !int8) return;
        linear.parts = int8 ? 1 : 3;
        STD_TORCH_CHECK(linear.batch * linear.parts <= kCudaBatch, "x has ", linear.batch,
                        " rows of float32, but the kernel takes ", kCudaBatch / 3, " at most.");
        rows = torch::stable::new_empty(x, {linear.parts * linear.batch, linear.in_features},
                                        ScalarType::BFloat16);
        CudaRows made = {linear.x, linear.type, linear.batch, linear.in_features, nullptr, nullptr};
        if (rows->numel()) made.rows = static_cast<uint16_t*>(rows->mutable_data_ptr());
        if (int8) {
            x_scale = torch::stable::new_empty(x, {linear.batch}, ScalarType::Float);
            made.scale = output<float>(*x_scale);
        }
        check_launch(cuda_rows(made, device));
        linear.x = made.rows;
        linear.x_scale = made.scale;
        linear.type = Number::kBFloat16;
    }

    int64_t x_rows() const { return linear.batch * linear.parts; }

    void split(int64_t splits) {
        linear.splits = splits;
        if (splits == 1) return;
        partial = torch::stable::new_empty(x, {splits, linear.batch, linear.out_features},
                                           ScalarType::Float);
        linear.partial = output<float>(*partial);
    }
};

void check_x(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda() && x.dim() == 2, "x must be a CUDA tensor [B, K], got shape ",
                    shape_text(x), ".");
    STD_TORCH_CHECK(x.size(0) <= kCudaBatch, "x has ", x.size(0), " rows, but the kernel takes ",
                    kCudaBatch, " at most.");
}

Tensor ternary_linear_op(Tensor x, Tensor codes, Tensor scale, std::optional<Tensor> bias,
                         int64_t rows, bool int8) {
    check_x(x);
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const uint32_t* words = checked_words("codes", codes, x);
    STD_TORCH_CHECK(rows >= 0 && codes.dim() == 3 && codes.size(0) == (rows + 15) / 16 &&
                        codes.size(1) == (x.size(1) + 15) / 16 && codes.size(2) == 16,
                    "codes has shape ", shape_text(codes), ", which does not fit ", rows,
                    " rows of ", x.size(1), " columns.");
    const CudaScale by = checked_scale(scale, rows, x);
    Product product(x, bias, rows);
    if (!product.y.numel()) return product.y;
    const Device device = device_of(x);
    product.prepare(int8, device);
    product.split(cuda_ternary_splits(product.x_rows(), product.linear.in_features, device));
    check_launch(cuda_ternary_linear({product.linear, by, words, 0}, device));
    return product.y;
}

// The packing keeps `starts` right, which count units of `data`: 64 bytes, or 16 of a bitmap. The
// values in it have the dtype of x.
Tensor tiles_linear_op(Tensor x, Tensor starts, Tensor data, std::optional<Tensor> bias,
                       int64_t rows, bool bitmap) {
    check_x(x);
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    constexpr int64_t kSide = 64;
    const int64_t tiles = (rows + kSide - 1) / kSide * ((x.size(1) + kSide - 1) / kSide);
    starts = checked_on("starts", starts, x);
    data = checked_on("data", data, x);
    STD_TORCH_CHECK(rows >= 0 && starts.scalar_type() == ScalarType::Int && starts.dim() == 1 &&
                        starts.numel() == tiles + 1,
                    "starts must be int32 (", tiles + 1, ") for ", rows, " rows of ", x.size(1),
                    " columns, got shape ", shape_text(starts), ".");
    STD_TORCH_CHECK(data.scalar_type() == ScalarType::Long && data.dim() == 2 &&
                        data.size(1) == (bitmap ? 2 : 8),
                    "data must be int64 [units, ", bitmap ? 2 : 8, "], got shape ",
                    shape_text(data), ".");
    const uint8_t* packed = nullptr;
    if (data.numel()) {
        packed = bytes(data);
        STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(packed) % kAlignment == 0,
                        "data must start at a multiple of ", kAlignment, " bytes; clone it.");
    }
    Product product(x, bias, rows);
    if (!product.y.numel()) return product.y;
    const Device device = device_of(x);
    product.prepare(false, device);
    const auto splits = bitmap ? cuda_bitmap_splits : cuda_tiles_splits;
    product.split(splits(product.x_rows(), product.linear.in_features, device));
    const CudaTiles problem = {product.linear,
                               static_cast<const uint32_t*>(starts.const_data_ptr()), packed, 0};
    check_launch(bitmap ? cuda_bitmap_linear(problem, device) : cuda_tiles_linear(problem, device));
    return product.y;
}

// The caller keeps columns below K and starts ascending. The kernel of the CPU checks that, this
// one does not.
Tensor csr_linear_op(Tensor x, Tensor values, Tensor starts, Tensor columns,
                     std::optional<Tensor> bias) {
    check_x(x);
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    values = checked_on("values", values, x);
    starts = checked_on("starts", starts, x);
    columns = checked_on("columns", columns, x);
    STD_TORCH_CHECK(values.scalar_type() == x.scalar_type() &&
                        columns.scalar_type() == ScalarType::Short &&
                        starts.scalar_type() == ScalarType::Long,
                    "values must have the dtype of x, columns int16 and starts int64, got ",
                    toString(values.scalar_type()), ", ", toString(columns.scalar_type()), " and ",
                    toString(starts.scalar_type()), ".");
    STD_TORCH_CHECK(
        values.dim() == 1 && same_shape(values, columns) && starts.dim() == 1 && starts.numel() > 0,
        "values ", shape_text(values), ", columns ", shape_text(columns), " and starts ",
        shape_text(starts), " do not fit each other.");
    Product product(x, bias, starts.numel() - 1);
    if (!product.y.numel()) return product.y;
    const Device device = device_of(x);
    STD_TORCH_CHECK(cuda_csr_fits(x.size(0), x.size(1), device), "x ", shape_text(x),
                    " does not fit in shared memory; use tiles.");
    CudaCsr problem = {product.linear, static_cast<const int64_t*>(starts.const_data_ptr()),
                       nullptr, nullptr};
    if (values.numel()) {
        problem.columns = static_cast<const uint16_t*>(columns.const_data_ptr());
        problem.values = static_cast<const uint16_t*>(values.const_data_ptr());
        STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(columns.const_data_ptr()) % kAlignment == 0 &&
                            reinterpret_cast<uintptr_t>(problem.values) % kAlignment == 0,
                        "values and columns must start at a multiple of ", kAlignment,
                        " bytes; clone them.");
    }
    check_launch(cuda_csr_linear(problem, device));
    return product.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lottery_sparse_cuda, m) {
    m.def(
        "csr_linear(Tensor x, Tensor values, Tensor starts, Tensor columns, Tensor? bias) "
        "-> Tensor");
    m.def(
        "tiles_linear(Tensor x, Tensor starts, Tensor data, Tensor? bias, int rows, bool bitmap) "
        "-> Tensor");
    m.def(
        "ternary_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int rows, bool int8) "
        "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_cuda, CUDA, m) {
    m.impl("csr_linear", TORCH_BOX(&csr_linear_op));
    m.impl("ternary_linear", TORCH_BOX(&ternary_linear_op));
    m.impl("tiles_linear", TORCH_BOX(&tiles_linear_op));
}

}  // namespace lottery_sparse
