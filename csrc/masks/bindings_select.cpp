// The ops that select kept entries: of a gradient, and of a weight in place.
#include <algorithm>
#include <atomic>
#include <optional>

#include "masks/select_kept.h"
#include "rim/rim.h"

namespace lottery_sparse {
namespace {

int width_of(const char* name, const Tensor& t) {
    const ScalarType dtype = t.scalar_type();
    if (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) return 2;
    if (dtype == ScalarType::Float) return 4;
    STD_TORCH_CHECK(dtype == ScalarType::Double, name,
                    " must be a floating tensor of 16, 32 or 64 bits for the native kernels, got ",
                    toString(dtype), ".");
    return 8;
}

constexpr int64_t kGrain = 1 << 16;

// The operands of both ops, checked, and a loop over parts of them.
struct Operands {
    Tensor mask;
    std::optional<Tensor> others;
    int64_t count;
    int width;

    Operands(const Tensor& values, const Tensor& kept, const std::optional<Tensor>& rest)
        : mask(checked("mask", kept, ScalarType::Bool)),
          count(values.numel()),
          width(width_of("values", values)) {
        check_shape("mask", mask, values);
        if (!rest.has_value()) return;
        others = checked("others", *rest, values.scalar_type());
        check_shape("others", *others, values);
    }

    static void check_shape(const char* name, const Tensor& t, const Tensor& values) {
        STD_TORCH_CHECK(same_shape(values, t), name, " has shape ", shape_text(t),
                        ", but the values have ", shape_text(values), "; they must be equal.");
    }

    // part(mask, others, byte offset, count)
    template <class Part>
    void each(const Part& part) const {
        const char* rest = others ? static_cast<const char*>(others->const_data_ptr()) : nullptr;
        kParallel((count + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * kGrain, offset = first * width;
            part(bytes(mask) + first, rest ? rest + offset : nullptr, offset,
                 std::min(end * kGrain, count) - first);
        });
    }
};

Tensor select_kept_op(Tensor values, Tensor mask, std::optional<Tensor> others) {
    values = checked("values", values, values.scalar_type());
    const Operands operands(values, mask, others);
    Tensor out = torch::stable::empty(values.sizes(), values.scalar_type());
    const auto select = LS_CHOSEN_KERNELS(select_kept).select;
    const char* from = static_cast<const char*>(values.const_data_ptr());
    char* to = output<char>(out);
    operands.each([&](const uint8_t* kept, const char* rest, int64_t offset, int64_t count) {
        select(kept, from + offset, rest, to + offset, count, operands.width);
    });
    return out;
}

bool put_back_op(Tensor weight, Tensor mask, std::optional<Tensor> frozen) {
    STD_TORCH_CHECK(weight.is_cpu() && weight.is_contiguous(),
                    "weight must be a contiguous CPU tensor for the native kernels.");
    const Operands operands(weight, mask, frozen);
    const auto put_back = LS_CHOSEN_KERNELS(select_kept).put_back;
    char* values = output<char>(weight);
    std::atomic<bool> wrote{false};
    operands.each([&](const uint8_t* kept, const char* rest, int64_t offset, int64_t count) {
        if (put_back(kept, values + offset, rest, count, operands.width)) wrote = true;
    });
    return wrote;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CPU, m) {
    m.impl("select_kept", TORCH_BOX(&select_kept_op));
    m.impl("put_back_", TORCH_BOX(&put_back_op));
}

}  // namespace lottery_sparse
