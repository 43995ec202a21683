// A compact layer for _eager: each of its products by the sparse kernel or, where too much is kept,
// by the dense library.
#pragma once

#include <ATen/record_function.h>

#include <array>
#include <optional>

#include "linear/eager_node.h"
#include "linear/sparse_linear.h"
#include "rim/parallel_rim.h"

namespace lottery_sparse {
namespace {

struct Kept {
    Tensor starts, columns, column_starts, rows, positions;
};

// CompactLimits of ops/limits.py, in its order.
struct Limits {
    // Kept entries per weight up to which kernels skip zeros: in y and dx, in these where they are
    // quick or dense is slow, and in dvalues.
    double most_product, most_quick, most_sampled;
    double cached_features, small_batch, small_features;  // where they are quick, or dense is slow
};

struct Options {
    bool zero;  // effective is 0 where nothing is kept
    Limits limits;
};

// A call's tensors as the kernels take them, once they are known to fit. A layer holds tensors that
// do, but anybody may give them other data, so every call checks.
struct Call {
    SparseLinearShape shape;
    CompactLists lists;
    double share;  // kept entries per weight
    bool several;

    Call(const Tensor& x, const Tensor& values, const Kept& kept) : several(values.dim() == 2) {
        const int64_t rows = kept.starts.size(-1) - 1, columns = kept.column_starts.size(-1) - 1;
        shape = {several ? values.size(0) : 1, x.size(-2), columns, rows, several && x.dim() == 2};
        lists = {kept.starts.const_data_ptr<int64_t>(),        kept.columns.const_data_ptr(),
                 kept.column_starts.const_data_ptr<int64_t>(), kept.rows.const_data_ptr(),
                 kept.positions.const_data_ptr<int32_t>(),     values.size(-1),
                 kept.columns.scalar_type() == at::kInt};
        int64_t entries = 0;
        for (int64_t e = 0; e < shape.replicates; ++e)
            entries += lists.starts[e * (rows + 1) + rows];
        share = static_cast<double>(entries) /
                static_cast<double>(std::max<int64_t>(1, shape.replicates * rows * columns));
    }

    bool skips(const Options& options, bool longer) const {
        const bool quick = longer && shape.batch >= kTileBatch;
        return options.zero &&
               share <= (quick ? options.limits.most_quick : options.limits.most_product);
    }
    // Whether y, or dx, skips zeros. The dense y of a small batch reads the weight across its rows.
    bool skips_in_y(const Options& options) const {
        const Limits& most = options.limits;
        const bool small =
            shape.batch <= most.small_batch && shape.in_features <= most.small_features;
        return skips(options, shape.in_features <= most.cached_features || small);
    }
    bool skips_in_dx(const Options& options) const {
        return skips(options, shape.out_features <= options.limits.cached_features);
    }

    // Whether the shapes fit each other; x and values are read through contiguous().
    static bool fits(const Tensor& x, const Tensor& values, const Tensor& effective,
                     const Kept& kept) {
        const int64_t d = values.dim();
        if (d < 1 || d > 2 || x.dim() < 2 || x.dim() > d + 1 || effective.dim() != d + 1 ||
            kept.starts.dim() != d || kept.column_starts.dim() != d)
            return false;
        const int64_t rows = effective.size(d - 1), columns = effective.size(d);
        if (x.size(-1) != columns || kept.starts.size(-1) != rows + 1 ||
            kept.column_starts.size(-1) != columns + 1)
            return false;
        if (d == 2)
            for (const Tensor* t : {&effective, &kept.starts, &kept.column_starts})
                if (t->size(0) != values.size(0)) return false;
        return (x.dim() == 2 || x.size(0) == values.size(0)) &&
               kept.columns.sizes() == values.sizes() && kept.rows.sizes() == values.sizes() &&
               kept.positions.sizes() == values.sizes();
    }
    static bool fits_bias(const Tensor& bias, const Tensor& effective) {
        return bias.sizes() == effective.sizes().slice(0, effective.dim() - 1);
    }
    // Whether the lists are as kernels read them, and begin and end within their slots.
    static bool takes(const Kept& kept) {
        const auto list = [](const Tensor& t, at::ScalarType dtype) {
            return ordinary(t, dtype) && t.is_contiguous();
        };
        const auto numbers = kept.columns.scalar_type() == at::kInt ? at::kInt : at::kShort;
        if (!list(kept.starts, at::kLong) || !list(kept.columns, numbers) ||
            !list(kept.column_starts, at::kLong) || !list(kept.rows, numbers) ||
            !list(kept.positions, at::kInt))
            return false;
        for (const Tensor* t : {&kept.starts, &kept.column_starts}) {
            const int64_t* ends = t->const_data_ptr<int64_t>() - 1;
            for (int64_t i = t->size(-1); i <= t->numel(); i += t->size(-1))
                if (ends[i] < 0 || ends[i] > kept.columns.size(-1) || ends[i - t->size(-1) + 1])
                    return false;
        }
        return true;
    }

    Tensor matrix(bool each, int64_t rows, int64_t columns) const {
        if (each) return fresh({shape.replicates, rows, columns});
        return fresh({rows, columns});
    }
    static std::array<int64_t, 4> tiles_sizes(const Tensor& x) {
        return {x.dim() == 2 ? 1 : x.size(0), (x.size(-2) + kTileBatch - 1) / kTileBatch,
                x.size(-1), kTileBatch};
    }
};

// Without gradients. `packed` gets the tiles of x where they were made.
Tensor forward(const Tensor& x, const Tensor& values, const Tensor& bias, const Tensor& effective,
               const Kept& kept, const Options& options, Tensor& packed) {
    const Tensor source = x.contiguous(), weights = values.contiguous();
    const Call call(source, weights, kept);
    if (call.skips_in_y(options)) {
        Tensor y = call.matrix(call.several, call.shape.batch, call.shape.out_features);
        packed = fresh(Call::tiles_sizes(source));
        compact_linear_forward({call.shape, call.lists, source.const_data_ptr<float>(),
                                weights.const_data_ptr<float>(),
                                bias.defined() ? bias.const_data_ptr<float>() : nullptr,
                                y.mutable_data_ptr<float>(), packed.mutable_data_ptr<float>()},
                               kParallel);
        return y;
    }
    if (!call.several)
        return at::linear(x, effective,
                          bias.defined() ? std::optional<Tensor>(bias) : std::nullopt);
    Tensor y = at::matmul(x, effective.mT());
    return bias.defined() ? y.add_(bias.unsqueeze(1)) : y;
}

// The backward of a compact layer.
struct CompactBackward {
    Tensor x, values, packed, effective;
    Kept kept;
    Options options;
    bool need_dx, need_dv, need_db;

    // Of (x, values, bias).
    variable_list gradients(const Tensor& dy) const {
        variable_list found(3);
        if (at::GradMode::is_enabled()) {  // to be differentiated again: by the registered op
            if (need_dx || need_dv) differentiable(dy, found);
            if (need_db) found[2] = dy.sum(-2);
            return found;
        }
        // a hook or .data may have put other tensors in their place
        TORCH_CHECK(Call::fits(x, values, effective, kept), "x ", x.sizes(), ", the kept weights ",
                    values.sizes(), ", the effective weight ", effective.sizes(),
                    " or the lists of a compact layer have changed their shapes since its forward; "
                    "run it again.");
        const bool floats = ordinary(x, at::kFloat) && ordinary(values, at::kFloat) &&
                            ordinary(effective, at::kFloat) && ordinary(dy, at::kFloat);
        if (floats && Call::takes(kept) && takes_dy_and_packed(dy)) {
            products(dy, found);
        } else {
            if (need_dx || need_dv) differentiable(dy, found);
            if (need_db) found[2] = dy.sum(-2);
        }
        return found;
    }

  private:
    bool takes_dy_and_packed(const Tensor& dy) const {
        const int64_t rows = effective.size(-2), batch = x.size(-2);
        const bool several = values.dim() == 2;
        if (dy.dim() != (several ? 3 : 2) || dy.size(-2) != batch || dy.size(-1) != rows ||
            (several && dy.size(0) != values.size(0)))
            return false;
        return !packed.defined() || (ordinary(packed, at::kFloat) && packed.is_contiguous() &&
                                     packed.sizes() == Call::tiles_sizes(x));
    }
    void differentiable(const Tensor& dy, variable_list& found) const {
        static const auto op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("lottery_sparse::compact_linear_backward", "")
                                   .typed<std::tuple<Tensor, Tensor>(
                                       const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       const Tensor&, bool, bool, bool)>();
        auto [dx, dv] =
            op.call(dy, x, values, effective, kept.starts, kept.columns, kept.column_starts,
                    kept.rows, kept.positions, options.zero, need_dx, need_dv);
        if (need_dx) found[0] = dx;
        if (need_dv) found[1] = dv;
    }

    // Each gradient by the sparse kernel or, where too much is kept, by the dense library.
    void products(const Tensor& grad, variable_list& found) const {
        Tensor &dx = found[0], &dv = found[1], &db = found[2];
        const Tensor dy = grad.contiguous(), weights = values.contiguous();
        const Call call(x, weights, kept);
        const bool sparse_dx = need_dx && call.skips_in_dx(options);
        const bool sampled = need_dv && call.share <= options.limits.most_sampled;
        if (sparse_dx || sampled) {
            Tensor tiles = packed;
            if (sampled && !tiles.defined()) {
                const Tensor source = x.contiguous();
                tiles = fresh(Call::tiles_sizes(source));
                pack_tiles(source.const_data_ptr<float>(), tiles.size(0), call.shape.batch,
                           call.shape.in_features, tiles.mutable_data_ptr<float>(), kParallel);
            }
            if (sparse_dx)
                dx = call.matrix(call.several && !call.shape.shared_x, call.shape.batch,
                                 call.shape.in_features);
            if (sampled) dv = fresh(weights.sizes());
            if (need_db)
                db = call.several ? fresh({call.shape.replicates, call.shape.out_features})
                                  : fresh({call.shape.out_features});
            compact_linear_backward({call.shape, call.lists, dy.const_data_ptr<float>(),
                                     tiles.defined() ? tiles.const_data_ptr<float>() : nullptr,
                                     weights.const_data_ptr<float>(),
                                     sparse_dx ? dx.mutable_data_ptr<float>() : nullptr,
                                     sampled ? dv.mutable_data_ptr<float>() : nullptr,
                                     need_db ? db.mutable_data_ptr<float>() : nullptr},
                                    kParallel);
        } else if (need_db) {
            db = dy.sum(-2);
        }
        if (need_dx && !sparse_dx) {
            dx = at::matmul(dy, effective);
            if (call.shape.shared_x) dx = dx.sum(0);
        }
        if (need_dv && !sampled) {
            if (!call.several && call.share == 1.0 && weights.numel() == effective.numel()) {
                dv = at::mm(dy.t(), x).view(weights.sizes());  // all kept: the same order
            } else {
                dv = fresh(weights.sizes());
                dense_gradient(call, dy, dv);
            }
        }
    }

    // dvalues from a dense dW, made in blocks of rows that stay in the cache until they are read.
    void dense_gradient(const Call& call, const Tensor& dy, const Tensor& dv) const {
        constexpr int64_t kBlockRows = 160;  // as quick as all rows, and small
        const int64_t n = call.shape.out_features;
        const at::AutoDispatchBelowADInplaceOrView guard;
        const Tensor scratch = fresh({std::min(kBlockRows, n), call.shape.in_features});
        for (int64_t e = 0; e < call.shape.replicates; ++e) {
            const Tensor dy_t = (call.several ? dy.select(0, e) : dy).t();
            const Tensor source = x.dim() == 3 ? x.select(0, e) : x;
            int64_t first = 0;
            do {  // at least once, for spare slots
                const int64_t rows = std::min(kBlockRows, n - first);
                Tensor block = scratch.narrow(0, 0, rows);
                at::mm_out(block, dy_t.narrow(0, first, rows), source);
                gather_rows({call.shape, call.lists, block.mutable_data_ptr<float>(),
                             dv.mutable_data_ptr<float>()},
                            e, first, first + rows, kParallel);
                first += rows;
            } while (first < n);
        }
    }
};

struct CompactProduct {
    static constexpr const char* kName = "CompactLinearBackward";

    static variable_list gradients(const Saved& all, const Tensor& dy) {
        const auto& t = all.tensors;
        const auto& n = all.numbers;
        const CompactBackward backward = {t[0],
                                          t[1],
                                          t[2],
                                          t[3],
                                          {t[4], t[5], t[6], t[7], t[8]},
                                          {n[0] != 0, {n[1], n[2], n[3], n[4], n[5], n[6]}},
                                          all.need[0],
                                          all.need[1],
                                          all.need[2]};
        return backward.gradients(dy);
    }
};

Tensor compact_linear(const Tensor& x, const Tensor& values, const Tensor& bias,
                      const Tensor& effective, const Kept& kept, const Options& options) {
    RECORD_FUNCTION("lottery_sparse::compact_linear", c10::ArrayRef<const c10::IValue>{});
    Tensor y, packed;
    {
        const at::AutoDispatchBelowADInplaceOrView guard;
        y = forward(x, values, bias, effective, kept, options, packed);
    }
    if (asks_gradients(x, values, bias)) {
        const auto node = node_of<CompactProduct>(x, values, bias);
        node->save(x);
        node->save(values);
        node->save(packed);
        node->watched = {
            {"weight_effective of a compact layer", effective, /*lags=*/packed.defined()},
            {"kept.starts of a compact layer", kept.starts}};
        node->held = {kept.columns, kept.column_starts, kept.rows, kept.positions};
        const Limits& most = options.limits;
        node->numbers = {static_cast<double>(options.zero),
                         most.most_product,
                         most.most_quick,
                         most.most_sampled,
                         most.cached_features,
                         most.small_batch,
                         most.small_features};
        torch::autograd::set_history(y, node);
    }
    return y;
}

}  // namespace
}  // namespace lottery_sparse
