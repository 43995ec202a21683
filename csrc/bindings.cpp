// The rim of _C: tensors in, pointers out, through torch's stable ABI. Everything is checked here,
// before any parallel region, because an exception inside one loses its message.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bits.h"
#include "keep_top.h"
#include "mask_bits.h"
#include "parallel.h"
#include "philox.h"
#include "random_fill.h"
#include "schemas.h"
#include "sparse_linear.h"

namespace lottery_sparse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Parallel kParallel([](int64_t begin, int64_t end, int64_t grain, Parallel::Body body,
                            void* context) {
    STD_TORCH_CHECK(torch_parallel_for(begin, end, grain, body, context) == 0,
                    "a parallel region failed");
});

std::string shape_text(const Tensor& t) {
    std::string text = "(";
    for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
    return text + ")";
}

bool same_shape(const Tensor& a, const Tensor& b) {
    if (a.dim() != b.dim()) return false;
    for (int64_t d = 0; d < a.dim(); ++d)
        if (a.size(d) != b.size(d)) return false;
    return true;
}

// `t`, contiguous, after checking that it is a CPU tensor of this dtype.
Tensor checked(const char* name, const Tensor& t, ScalarType dtype) {
    STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor for the native kernels.");
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", toString(dtype),
                    " for the native kernels, got ", toString(t.scalar_type()), ".");
    return torch::stable::contiguous(t);
}

void check_rank(const char* name, const Tensor& t, int64_t least, int64_t most) {
    STD_TORCH_CHECK(least <= t.dim() && t.dim() <= most, name, " has shape ", shape_text(t),
                    ", but the native kernels take ", least, " to ", most, " dimensions.");
}

Tensor empty(std::vector<int64_t> size, ScalarType dtype) {
    return torch::stable::empty(size, dtype);
}

const float* floats(const Tensor& t) {
    return static_cast<const float*>(t.const_data_ptr());
}
const uint8_t* bytes(const Tensor& t) {
    return static_cast<const uint8_t*>(t.const_data_ptr());
}
template <class T>
T* output(const Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
}

std::vector<Tensor> keep_top_op(std::vector<Tensor> scores, std::vector<Tensor> masks,
                                int64_t count, int64_t seed, std::vector<int64_t> streams) {
    STD_TORCH_CHECK(scores.size() == masks.size() && scores.size() == streams.size(),
                    "keep_top got ", scores.size(), " scores, ", masks.size(), " masks and ",
                    streams.size(), " streams; there must be one of each per tensor.");
    STD_TORCH_CHECK(count >= 0, "count must be 0 or more, got ", count, ".");
    std::vector<Tensor> out;
    std::vector<KeepTopTensor> parts;
    for (size_t i = 0; i < scores.size(); ++i) {
        scores[i] = checked("scores", scores[i], ScalarType::Float);
        masks[i] = checked("mask", masks[i], ScalarType::Bool);
        STD_TORCH_CHECK(same_shape(scores[i], masks[i]), "at list position ", i,
                        ", scores have shape ", shape_text(scores[i]), " but mask has ",
                        shape_text(masks[i]), "; they must be equal.");
        out.push_back(torch::stable::empty(masks[i].sizes(), ScalarType::Bool));
        parts.push_back({floats(scores[i]),
                         bytes(masks[i]),
                         output<uint8_t>(out[i]),
                         scores[i].numel(),
                         {static_cast<uint64_t>(seed), static_cast<uint32_t>(streams[i]), 0}});
    }
    const KeepTopResult result = keep_top(parts, count, kParallel);
    STD_TORCH_CHECK(count <= result.kept, "count is ", count, ", but only ", result.kept,
                    " entries are kept by the masks.");
    STD_TORCH_CHECK(result.nan_tensor < 0, "scores at list position ", result.nan_tensor,
                    " hold NaN at a kept entry; NaN has no rank.");
    return out;
}

int64_t count_kept_op(Tensor mask) {
    mask = checked("mask", mask, ScalarType::Bool);
    constexpr int64_t kGrain = 1 << 18;
    const int64_t size = mask.numel(), parts = (size + kGrain - 1) / kGrain;
    const auto count = LS_CHOSEN_KERNELS(mask_bits).count_kept;
    std::vector<int64_t> kept(parts);
    kParallel(parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            kept[i] = count(bytes(mask) + i * kGrain, std::min(kGrain, size - i * kGrain));
    });
    int64_t total = 0;
    for (int64_t k : kept) total += k;
    return total;
}

constexpr int64_t kPackGrainRows = 64;

Tensor pack_mask_op(Tensor mask) {
    check_rank("mask", mask, 2, 2);
    mask = checked("mask", mask, ScalarType::Bool);
    const int64_t rows = mask.size(0), columns = mask.size(1);
    Tensor bits = empty({rows, packed_words(columns)}, ScalarType::Int);
    const auto pack = LS_CHOSEN_KERNELS(mask_bits).pack_rows;
    kParallel(rows, kPackGrainRows, [&](int64_t begin, int64_t end) {
        pack(bytes(mask), columns, output<uint32_t>(bits), begin, end);
    });
    return bits;
}

Tensor unpack_mask_op(Tensor bits, int64_t columns) {
    check_rank("bits", bits, 2, 2);
    bits = checked("bits", bits, ScalarType::Int);
    STD_TORCH_CHECK(columns >= 0 && bits.size(1) == packed_words(columns), "bits has shape ",
                    shape_text(bits), ", but ", columns, " columns take ", packed_words(columns),
                    " words a row.");
    Tensor mask = empty({bits.size(0), columns}, ScalarType::Bool);
    const auto unpack = LS_CHOSEN_KERNELS(mask_bits).unpack_rows;
    kParallel(bits.size(0), kPackGrainRows, [&](int64_t begin, int64_t end) {
        unpack(static_cast<const uint32_t*>(bits.const_data_ptr()), columns, output<uint8_t>(mask),
               begin, end);
    });
    return mask;
}

PhiloxKey checked_key(int64_t count, int64_t seed, int64_t stream, int64_t step) {
    constexpr int64_t kMax = std::numeric_limits<uint32_t>::max();
    STD_TORCH_CHECK(count >= 0, "count must be 0 or more, got ", count, ".");
    STD_TORCH_CHECK(0 <= stream && stream <= kMax, "stream must fit 32 bits, got ", stream, ".");
    STD_TORCH_CHECK(0 <= step && step <= kMax, "step must fit 32 bits, got ", step, ".");
    return {static_cast<uint64_t>(seed), static_cast<uint32_t>(stream),
            static_cast<uint32_t>(step)};
}

// Calls fill(begin, end, out) on parts of a new tensor of `count` elements.
template <class T, class Fill>
Tensor random_tensor(int64_t count, ScalarType dtype, const Fill& fill) {
    Tensor out = empty({count}, dtype);
    T* data = output<T>(out);
    kParallel((count + kRandomGrain - 1) / kRandomGrain, 1, [&](int64_t begin, int64_t end) {
        fill(begin * kRandomGrain, std::min(end * kRandomGrain, count), data);
    });
    return out;
}

Tensor random_words_op(int64_t count, int64_t seed, int64_t stream, int64_t step) {
    const PhiloxKey key = checked_key(count, seed, stream, step);
    const auto words = LS_CHOSEN_KERNELS(random_fill).words;
    return random_tensor<uint32_t>(
        count, ScalarType::Int,
        [&](int64_t begin, int64_t end, uint32_t* out) { words(key, begin, end, out); });
}

Tensor random_signs_op(int64_t count, int64_t seed, int64_t stream, int64_t step) {
    const PhiloxKey key = checked_key(count, seed, stream, step);
    const auto signs = LS_CHOSEN_KERNELS(random_fill).signs;
    return random_tensor<float>(
        count, ScalarType::Float,
        [&](int64_t begin, int64_t end, float* out) { signs(key, begin, end, out); });
}

Tensor random_uniform_op(int64_t count, int64_t seed, int64_t stream, int64_t step) {
    const PhiloxKey key = checked_key(count, seed, stream, step);
    const auto uniform = LS_CHOSEN_KERNELS(random_fill).uniform;
    return random_tensor<float>(
        count, ScalarType::Float,
        [&](int64_t begin, int64_t end, float* out) { uniform(key, begin, end, out); });
}

Tensor random_normal_op(int64_t count, int64_t seed, int64_t stream, int64_t step, Tensor table) {
    const PhiloxKey key = checked_key(count, seed, stream, step);
    table = checked("table", table, ScalarType::Int);
    STD_TORCH_CHECK(table.numel() == kNormalTableSize, "table must have ", kNormalTableSize,
                    " entries, got ", table.numel(), ".");
    const int32_t* quantiles = static_cast<const int32_t*>(table.const_data_ptr());
    const auto normal = LS_CHOSEN_KERNELS(random_fill).normal;
    return random_tensor<float>(
        count, ScalarType::Float,
        [&](int64_t begin, int64_t end, float* out) { normal(key, begin, end, quantiles, out); });
}

// Checks x, weight and mask of masked_linear, makes them contiguous, and returns their sizes.
SparseLinearShape checked_shape(Tensor& x, Tensor& weight, Tensor& mask) {
    x = checked("x", x, ScalarType::Float);
    weight = checked("weight", weight, ScalarType::Float);
    mask = checked("mask", mask, ScalarType::Bool);
    check_rank("weight", weight, 2, 3);
    check_rank("x", x, 2, weight.dim());
    STD_TORCH_CHECK(same_shape(weight, mask), "mask has shape ", shape_text(mask),
                    ", but weight has ", shape_text(weight), "; they must be equal.");
    const int64_t d = weight.dim();
    const SparseLinearShape shape = {d == 3 ? weight.size(0) : 1, x.size(x.dim() - 2),
                                     weight.size(d - 1), weight.size(d - 2),
                                     d == 3 && x.dim() == 2};
    STD_TORCH_CHECK(
        x.size(x.dim() - 1) == shape.in_features && (x.dim() == 2 || x.size(0) == shape.replicates),
        "x has shape ", shape_text(x), ", which does not fit weight ", shape_text(weight), ".");
    STD_TORCH_CHECK(
        std::max(shape.in_features, shape.out_features) <= std::numeric_limits<uint32_t>::max(),
        "weight has shape ", shape_text(weight), "; the native kernels take up to 2^32 - 1.");
    return shape;
}

std::vector<int64_t> output_size(const SparseLinearShape& shape, const Tensor& weight) {
    if (weight.dim() == 3) return {shape.replicates, shape.batch, shape.out_features};
    return {shape.batch, shape.out_features};
}

Tensor masked_linear_op(Tensor x, Tensor weight, Tensor mask, std::optional<Tensor> bias) {
    const SparseLinearShape shape = checked_shape(x, weight, mask);
    if (bias) {
        bias = checked("bias", *bias, ScalarType::Float);
        STD_TORCH_CHECK(bias->numel() == shape.replicates * shape.out_features, "bias has shape ",
                        shape_text(*bias), ", which does not fit weight ", shape_text(weight), ".");
    }
    Tensor y = empty(output_size(shape, weight), ScalarType::Float);
    sparse_linear_forward({shape, floats(x), floats(weight), bytes(mask),
                           bias ? floats(*bias) : nullptr, output<float>(y)},
                          kParallel);
    return y;
}

std::tuple<Tensor, Tensor> masked_linear_backward_op(Tensor dy, Tensor x, Tensor weight,
                                                     Tensor mask, bool need_dx, bool need_dw) {
    const SparseLinearShape shape = checked_shape(x, weight, mask);
    dy = checked("dy", dy, ScalarType::Float);
    STD_TORCH_CHECK(dy.dim() == weight.dim() &&
                        dy.numel() == shape.replicates * shape.batch * shape.out_features &&
                        dy.size(dy.dim() - 1) == shape.out_features,
                    "dy has shape ", shape_text(dy), ", which does not fit x ", shape_text(x),
                    " and weight ", shape_text(weight), ".");
    const auto like = [](bool needed, const Tensor& t) {
        return needed ? torch::stable::empty(t.sizes(), ScalarType::Float)
                      : empty({0}, ScalarType::Float);
    };
    Tensor dx = like(need_dx, x), dw = like(need_dw, weight);
    sparse_linear_backward(
        {shape, floats(dy), floats(x), floats(weight), bytes(mask),
         need_dx ? output<float>(dx) : nullptr, need_dw ? output<float>(dw) : nullptr},
        kParallel);
    return {dx, dw};
}

// Sizes and lists of a compact layer; tensors stay alive in the caller.
struct CompactArguments {
    SparseLinearShape shape;
    CompactLists lists;
};

// Checks what both ops take. values [C] or [E, C]; starts [N + 1] or [E, N + 1].
CompactArguments checked_compact(Tensor& values, Tensor& starts, Tensor& columns, int64_t batch,
                                 int64_t in_features, bool shared_x) {
    values = checked("values", values, ScalarType::Float);
    check_rank("values", values, 1, 2);
    starts = checked("starts", starts, ScalarType::Long);
    const bool wide = columns.scalar_type() == ScalarType::Int;
    columns = checked("columns", columns, wide ? ScalarType::Int : ScalarType::Short);
    const int64_t d = values.dim();
    STD_TORCH_CHECK(same_shape(values, columns) && starts.dim() == d &&
                        (d == 1 || starts.size(0) == values.size(0)) && starts.size(d - 1) > 0,
                    "values ", shape_text(values), ", columns ", shape_text(columns),
                    " and starts ", shape_text(starts), " do not fit each other.");
    const int64_t replicates = d == 2 ? values.size(0) : 1;
    return {{replicates, batch, in_features, starts.size(d - 1) - 1, d == 2 && shared_x},
            {static_cast<const int64_t*>(starts.const_data_ptr()), columns.const_data_ptr(),
             nullptr, nullptr, nullptr, values.size(d - 1), wide}};
}

std::tuple<Tensor, Tensor> compact_linear_op(Tensor x, Tensor values, Tensor starts, Tensor columns,
                                             std::optional<Tensor> bias) {
    x = checked("x", x, ScalarType::Float);
    check_rank("x", x, 2, values.dim() + 1);
    const int64_t batch = x.size(x.dim() - 2), k = x.size(x.dim() - 1);
    const auto [shape, lists] =
        checked_compact(values, starts, columns, batch, k, /*shared_x=*/x.dim() == 2);
    STD_TORCH_CHECK(x.dim() == 2 || x.size(0) == shape.replicates, "x has shape ", shape_text(x),
                    ", but there are ", shape.replicates, " networks.");
    if (bias) {
        bias = checked("bias", *bias, ScalarType::Float);
        STD_TORCH_CHECK(bias->numel() == shape.replicates * shape.out_features, "bias has shape ",
                        shape_text(*bias), ", which does not fit starts ", shape_text(starts), ".");
    }
    const int64_t tiles = (batch + kTileBatch - 1) / kTileBatch;
    Tensor y = values.dim() == 2
                   ? empty({shape.replicates, batch, shape.out_features}, ScalarType::Float)
                   : empty({batch, shape.out_features}, ScalarType::Float);
    Tensor packed =
        empty({x.dim() == 2 ? 1 : shape.replicates, tiles, k, kTileBatch}, ScalarType::Float);
    compact_linear_forward({shape, lists, floats(x), floats(values), bias ? floats(*bias) : nullptr,
                            output<float>(y), output<float>(packed)},
                           kParallel);
    return {y, packed};
}

std::tuple<Tensor, Tensor, Tensor> compact_linear_backward_op(Tensor dy, Tensor packed_x,
                                                              Tensor values, Tensor starts,
                                                              Tensor columns, Tensor column_starts,
                                                              Tensor rows, Tensor positions,
                                                              bool shared_x, bool need_dx,
                                                              bool need_dvalues, bool need_dbias) {
    dy = checked("dy", dy, ScalarType::Float);
    check_rank("dy", dy, values.dim() + 1, values.dim() + 1);
    packed_x = checked("packed_x", packed_x, ScalarType::Float);
    check_rank("packed_x", packed_x, 4, 4);
    const int64_t batch = dy.size(dy.dim() - 2), k = packed_x.size(2);
    auto [shape, lists] = checked_compact(values, starts, columns, batch, k, shared_x);
    column_starts = checked("column_starts", column_starts, ScalarType::Long);
    rows = checked("rows", rows, lists.wide ? ScalarType::Int : ScalarType::Short);
    positions = checked("positions", positions, ScalarType::Int);
    STD_TORCH_CHECK(dy.size(dy.dim() - 1) == shape.out_features && same_shape(rows, values) &&
                        same_shape(positions, values) &&
                        column_starts.numel() == shape.replicates * (k + 1),
                    "dy ", shape_text(dy), ", rows ", shape_text(rows), ", positions ",
                    shape_text(positions), " and column_starts ", shape_text(column_starts),
                    " do not fit values ", shape_text(values), ".");
    lists.column_starts = static_cast<const int64_t*>(column_starts.const_data_ptr());
    lists.rows = rows.const_data_ptr();
    lists.positions = static_cast<const int32_t*>(positions.const_data_ptr());
    const bool separate_x = values.dim() == 2 && !shared_x;
    Tensor dx = empty({0}, ScalarType::Float), dvalues = dx, dbias = dx;
    if (need_dx)
        dx = separate_x ? empty({shape.replicates, batch, k}, ScalarType::Float)
                        : empty({batch, k}, ScalarType::Float);
    if (need_dvalues) dvalues = torch::stable::empty(values.sizes(), ScalarType::Float);
    if (need_dbias)
        dbias = values.dim() == 2 ? empty({shape.replicates, shape.out_features}, ScalarType::Float)
                                  : empty({shape.out_features}, ScalarType::Float);
    compact_linear_backward(
        {shape, lists, floats(dy), floats(packed_x), floats(values),
         need_dx ? output<float>(dx) : nullptr, need_dvalues ? output<float>(dvalues) : nullptr,
         need_dbias ? output<float>(dbias) : nullptr},
        kParallel);
    return {dx, dvalues, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY(lottery_sparse_native, m) {
    for (const char* schema : kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CPU, m) {
    m.impl("keep_top", TORCH_BOX(&keep_top_op));
    m.impl("count_kept", TORCH_BOX(&count_kept_op));
    m.impl("pack_mask", TORCH_BOX(&pack_mask_op));
    m.impl("unpack_mask", TORCH_BOX(&unpack_mask_op));
    m.impl("random_normal", TORCH_BOX(&random_normal_op));
    m.impl("masked_linear", TORCH_BOX(&masked_linear_op));
    m.impl("masked_linear_backward", TORCH_BOX(&masked_linear_backward_op));
    m.impl("compact_linear", TORCH_BOX(&compact_linear_op));
    m.impl("compact_linear_backward", TORCH_BOX(&compact_linear_backward_op));
}

// These take no tensor, so no device chooses the kernel.
STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CompositeExplicitAutograd, m) {
    m.impl("random_words", TORCH_BOX(&random_words_op));
    m.impl("random_signs", TORCH_BOX(&random_signs_op));
    m.impl("random_uniform", TORCH_BOX(&random_uniform_op));
}

}  // namespace lottery_sparse

// Importing the module loads the library, which registers the ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
