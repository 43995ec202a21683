// The rim of masks, selection and randomness.
#include <algorithm>
#include <limits>
#include <vector>

#include "common/bits.h"
#include "common/philox.h"
#include "common/variants.h"
#include "masks/keep_top.h"
#include "masks/mask_bits.h"
#include "masks/random_fill.h"
#include "masks/sample_mask.h"
#include "rim/rim.h"

namespace lottery_sparse {
namespace {

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

template <auto kFill, class T>
Tensor filled(ScalarType dtype, int64_t count, int64_t seed, int64_t stream, int64_t step) {
    const PhiloxKey key = checked_key(count, seed, stream, step);
    const auto fill = LS_CHOSEN_KERNELS(random_fill).*kFill;
    return random_tensor<T>(
        count, dtype, [&](int64_t begin, int64_t end, T* out) { fill(key, begin, end, out); });
}

Tensor random_words_op(int64_t count, int64_t seed, int64_t stream, int64_t step) {
    return filled<&RandomFillKernels::words, uint32_t>(ScalarType::Int, count, seed, stream, step);
}
Tensor random_signs_op(int64_t count, int64_t seed, int64_t stream, int64_t step) {
    return filled<&RandomFillKernels::signs, float>(ScalarType::Float, count, seed, stream, step);
}
Tensor random_uniform_op(int64_t count, int64_t seed, int64_t stream, int64_t step) {
    return filled<&RandomFillKernels::uniform, float>(ScalarType::Float, count, seed, stream, step);
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

Tensor sample_mask_op(Tensor score, int64_t seed, int64_t stream, int64_t step) {
    score = checked("score", score, ScalarType::Float);
    const int64_t size = score.numel(), parts = (size + kSampleGrain - 1) / kSampleGrain;
    const PhiloxKey key = checked_key(size, seed, stream, step);
    Tensor mask = torch::stable::empty(score.sizes(), ScalarType::Bool);
    const auto sample = LS_CHOSEN_KERNELS(sample_mask).sample;
    kParallel(parts, 1, [&](int64_t begin, int64_t end) {
        sample(key, begin * kSampleGrain, std::min(end * kSampleGrain, size), floats(score),
               output<uint8_t>(mask));
    });
    return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CPU, m) {
    m.impl("keep_top", TORCH_BOX(&keep_top_op));
    m.impl("count_kept", TORCH_BOX(&count_kept_op));
    m.impl("pack_mask", TORCH_BOX(&pack_mask_op));
    m.impl("unpack_mask", TORCH_BOX(&unpack_mask_op));
    m.impl("random_normal", TORCH_BOX(&random_normal_op));
    m.impl("sample_mask", TORCH_BOX(&sample_mask_op));
}

// These take no tensor, so no device chooses the kernel.
STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CompositeExplicitAutograd, m) {
    m.impl("random_words", TORCH_BOX(&random_words_op));
    m.impl("random_signs", TORCH_BOX(&random_signs_op));
    m.impl("random_uniform", TORCH_BOX(&random_uniform_op));
}

}  // namespace lottery_sparse
