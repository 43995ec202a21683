// A layer with a learned mask for _eager: the mask, drawn or given, and the product of the dense
// library. The arithmetic, and with it every bit, is that of ops/supermask/dense.py.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>

#include "common/bits.h"
#include "linear/eager_masked.h"
#include "masks/mask_bits.h"
#include "masks/sample_mask.h"

namespace lottery_sparse {
namespace {

int64_t number(const Tensor& t) {
    return *t.const_data_ptr<int64_t>();
}

// What masks are drawn from: int64 [3] (seed, stream, step); none: it is not that.
std::optional<PhiloxKey> key_of(const Tensor& key) {
    constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();
    if (!ordinary(key, at::kLong) || key.dim() != 1 || key.size(0) != 3 || !key.is_contiguous())
        return std::nullopt;
    const auto* parts = key.const_data_ptr<int64_t>();
    if (parts[1] < 0 || parts[1] > kMost || parts[2] < 0 || parts[2] > kMost) return std::nullopt;
    return PhiloxKey{static_cast<uint64_t>(parts[0]), static_cast<uint32_t>(parts[1]),
                     static_cast<uint32_t>(parts[2])};
}

Tensor drawn_mask(const Tensor& score, const PhiloxKey& key) {
    const Tensor source = score.to(at::kFloat).contiguous();
    Tensor mask = fresh(score.sizes(), at::kBool);
    const auto* scores = source.const_data_ptr<float>();
    auto* bytes = static_cast<uint8_t*>(mask.mutable_data_ptr());
    const int64_t size = score.numel(), parts = (size + kSampleGrain - 1) / kSampleGrain;
    const auto sample = LS_CHOSEN_KERNELS(sample_mask).sample;
    kParallel(parts, 1, [&](int64_t begin, int64_t end) {
        sample(key, begin * kSampleGrain, std::min(end * kSampleGrain, size), scores, bytes);
    });
    return mask;
}

// A bool mask as bits, and back.
constexpr int64_t kMaskRows = 64;
Tensor packed_mask(const Tensor& mask) {
    Tensor bits = fresh({mask.size(0), packed_words(mask.size(1))}, at::kInt);
    const auto* bytes = static_cast<const uint8_t*>(mask.const_data_ptr());
    auto* words = static_cast<uint32_t*>(bits.mutable_data_ptr());
    const auto pack = LS_CHOSEN_KERNELS(mask_bits).pack_rows;
    kParallel(mask.size(0), kMaskRows,
              [&](int64_t begin, int64_t end) { pack(bytes, mask.size(1), words, begin, end); });
    return bits;
}
Tensor unpacked_mask(const Tensor& bits, int64_t columns) {
    Tensor mask = fresh({bits.size(0), columns}, at::kBool);
    const auto* words = static_cast<const uint32_t*>(bits.const_data_ptr());
    auto* bytes = static_cast<uint8_t*>(mask.mutable_data_ptr());
    const auto unpack = LS_CHOSEN_KERNELS(mask_bits).unpack_rows;
    kParallel(bits.size(0), kMaskRows,
              [&](int64_t begin, int64_t end) { unpack(words, columns, bytes, begin, end); });
    return mask;
}

// The weight under the mask. In float32 its rows are as long as those of packed bits, as they are
// in dense.py: the library takes other ways, to other bits, for rows of other lengths.
Tensor masked_weight(const Tensor& mask, const Tensor& weight) {
    const Tensor source = weight.contiguous();
    if (source.scalar_type() != at::kFloat) return where_kept(mask, source);
    const int64_t rows = mask.size(0), columns = mask.size(1);
    const int64_t length = packed_words(columns) * kWordBits;
    Tensor kept = fresh({rows, length});
    const auto* bytes = static_cast<const uint8_t*>(mask.const_data_ptr());
    const auto* from = source.const_data_ptr<float>();
    auto* to = kept.mutable_data_ptr<float>();
    const auto select = LS_CHOSEN_KERNELS(select_kept).select;
    kParallel(rows, kMaskRows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            select(bytes + row * columns, from + row * columns, nullptr, to + row * length, columns,
                   sizeof(float));
    });
    return kept.narrow(1, 0, columns);
}

// A float32 or float64, as no sum is rounded to less.
at::ScalarType precise(at::ScalarType dtype) {
    return at::promote_types(dtype, at::kFloat);
}

// The number of weights over the number of ones, in the precision of the score.
double rescaling(const Tensor& score, int64_t kept) {
    const auto ones = std::max<int64_t>(kept, 1);
    if (score.scalar_type() == at::kDouble)
        return 1.0 / static_cast<double>(ones) * static_cast<double>(score.numel());
    return 1.0f / static_cast<float>(ones) * static_cast<float>(score.numel());
}

struct SupermaskProduct {
    static constexpr const char* kName = "SupermaskLinearBackward";

    // Whether the tensors are matrices that fit each other.
    static bool fits(const Tensor& x, const Tensor& score, const Tensor& weight) {
        return ordinary(x) && ordinary(score) && ordinary(weight, x.scalar_type()) &&
               x.is_floating_point() && score.is_floating_point() && x.element_size() > 1 &&
               x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) &&
               score.sizes() == weight.sizes();
    }

    static Tensor forward(const Tensor& x, const Tensor& score, const Tensor& masked,
                          const Tensor& bias, const Tensor& kept) {
        const auto addend = bias.defined() ? std::optional<Tensor>(bias) : std::nullopt;
        if (!kept.defined()) return at::linear(x, masked, addend);
        const auto dtype = x.scalar_type();
        Tensor y = at::linear(x, masked).to(precise(dtype)).mul_(rescaling(score, number(kept)));
        if (addend) y.add_(*addend);
        return y.to(dtype);
    }

    // Of (x, score, weight, bias).
    static variable_list gradients(const Saved& all, const Tensor& dy) {
        const auto& t = all.tensors;
        const Tensor &x = t[0], &score = t[1], &weight = t[2], &bits = t[3], &kept = t[4];
        const bool need_dx = all.need[0], need_ds = all.need[1], need_dw = all.need[2];
        variable_list found(4);
        if (all.need[3]) found[3] = dy.sum(-2);
        if (!need_dx && !need_ds && !need_dw) return found;
        const bool plainly = !at::GradMode::is_enabled() && fits(x, score, weight) &&
                             ordinary(dy, x.scalar_type()) && dy.dim() == 2 &&
                             dy.size(0) == x.size(0) && dy.size(1) == weight.size(0) &&
                             fits_bits(bits, weight) && fits_kept(kept);
        if (plainly) {
            products(t, dy, need_dx, need_ds, need_dw, found);
            return found;
        }
        // to be differentiated again, which the op refuses, or what hooks made of the tensors
        static const auto op =
            c10::Dispatcher::singleton()
                .findSchemaOrThrow("lottery_sparse::supermask_linear_backward", "")
                .typed<std::tuple<Tensor, Tensor, Tensor>(
                    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                    const std::optional<Tensor>&, const std::optional<Tensor>&, bool, bool,
                    bool)>();
        const auto ones = kept.defined() ? std::optional<Tensor>(kept) : std::nullopt;
        auto [dx, dw, ds] =
            op.call(dy, x, score, weight, bits, ones, std::nullopt, need_dx, need_dw, need_ds);
        if (need_dx) found[0] = dx;
        if (need_ds) found[1] = ds;
        if (need_dw) found[2] = dw;
        return found;
    }

  private:
    static bool fits_bits(const Tensor& bits, const Tensor& weight) {
        return ordinary(bits, at::kInt) && bits.is_contiguous() && bits.dim() == 2 &&
               bits.size(0) == weight.size(0) && bits.size(1) == packed_words(weight.size(1));
    }
    static bool fits_kept(const Tensor& kept) {
        return !kept.defined() || (ordinary(kept, at::kLong) && kept.dim() == 0);
    }

    static void products(const std::vector<Tensor>& t, const Tensor& dy, bool need_dx, bool need_ds,
                         bool need_dw, variable_list& found) {
        const Tensor &x = t[0], &score = t[1], &weight = t[2], &bits = t[3], &kept = t[4];
        const auto dtype = dy.scalar_type();
        const bool rescales = kept.defined();
        Tensor grad = dy, mask, masked;
        if (rescales) grad = dy.to(precise(dtype)).mul(rescaling(score, number(kept))).to(dtype);
        if (need_dx || need_dw || rescales) mask = unpacked_mask(bits, weight.size(1));
        if (need_dx || rescales) masked = masked_weight(mask, weight);
        if (need_dx) found[0] = at::matmul(grad, masked);
        if (!need_ds && !need_dw) return;
        const Tensor d = at::matmul(grad.mT(), x);
        if (need_dw) found[2] = where_kept(mask, d.contiguous());
        if (!need_ds) return;
        const auto sums = precise(score.scalar_type());
        const Tensor wide = d.to(sums), source = weight.to(sums);
        Tensor dm;
        if (rescales) {
            Tensor through = wide.mul(masked.to(sums)).sum({-2, -1}, /*keepdim=*/true);
            through.div_(static_cast<double>(std::max<int64_t>(1, number(kept))));
            dm = at::addcmul(through.neg_(), wide, source);
        } else {
            dm = wide.mul(source);
        }
        const Tensor p = at::sigmoid(score.to(sums));
        at::sigmoid_backward_out(dm, dm, p);
        found[1] = dm.to(score.scalar_type()).contiguous();
    }
};

// y = x (w m r)ᵀ + b with m drawn from `key`, or `given`; undefined: a call for the registered op.
Tensor supermask_linear(const Tensor& x, const Tensor& score, const Tensor& weight,
                        const Tensor& bias, const std::optional<PhiloxKey>& key,
                        const Tensor& given, bool rescale) {
    if (x.dim() == 0) return {};
    Tensor rows = x.dim() == 2 ? x : x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2);
    Tensor source = weight, addend = bias;
    const bool casts = at::autocast::is_autocast_enabled(at::kCPU);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (casts) {  // all but the score
        const auto cast = [to = at::autocast::get_autocast_dtype(at::kCPU)](const Tensor& t) {
            return t.defined() ? at::autocast::cached_cast(to, t, c10::DeviceType::CPU) : t;
        };
        rows = cast(rows), source = cast(source), addend = cast(addend);
    }
    if (!SupermaskProduct::fits(rows, score, source)) return {};
    if (!key && !(ordinary(given, at::kBool) && given.sizes() == score.sizes())) return {};
    if (addend.defined() && !(ordinary(addend, rows.scalar_type()) && addend.dim() == 1 &&
                              addend.size(0) == score.size(0)))
        return {};
    RECORD_FUNCTION("lottery_sparse::supermask_linear", c10::ArrayRef<const c10::IValue>{});
    const bool asks = asks_gradients(rows, score, source, addend);
    Tensor y, bits, kept;
    {
        const at::AutoDispatchBelowADInplaceOrView guard;
        const Tensor mask = key ? drawn_mask(score, *key) : given.contiguous();
        if (rescale) {
            kept = fresh({}, at::kLong);
            *kept.mutable_data_ptr<int64_t>() = LS_CHOSEN_KERNELS(mask_bits).count_kept(
                static_cast<const uint8_t*>(mask.const_data_ptr()), mask.numel());
        }
        if (asks) bits = packed_mask(mask);
        y = SupermaskProduct::forward(rows, score, masked_weight(mask, source), addend, kept);
    }
    if (asks) {
        const auto node = node_of<SupermaskProduct>(rows, score, source, addend);
        for (const Tensor& t : {rows, score, source, bits, kept}) node->save(t);
        torch::autograd::set_history(y, node);
    }
    if (x.dim() == 2) return y;
    auto sizes = x.sizes().vec();
    sizes.back() = score.size(0);
    return y.view(sizes);
}

}  // namespace
}  // namespace lottery_sparse
