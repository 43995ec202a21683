// The products of a compact layer for _eager (eager.cpp), in torch's C++ interface: each by the
// sparse kernel or, where too much is kept, by the dense library.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include <array>
#include <optional>
#include <vector>

#include "linear/sparse_linear.h"
#include "rim/parallel_rim.h"

namespace lottery_sparse {
namespace {

using at::Tensor;
using variable_list = std::vector<Tensor>;

struct Kept {
    Tensor starts, columns, column_starts, rows, positions;
};

struct Options {
    bool zero;  // effective is 0 where nothing is kept
    // Kept entries per weight up to which kernels skip zeros: in y and dx, in these where they are
    // quick or dense is slow, and in dvalues.
    double most_product, most_quick, most_sampled;
};

// Tiles of so many features stay in the first-level cache, beside a product's sums and results.
constexpr int64_t kCachedFeatures = 320;
constexpr int64_t kSmallBatch = 64, kSmallFeatures = 1024;

// Whether kernels may read this tensor: on the CPU, of this type, and no subclass's, which may hold
// anything, nor one whose numbers are not what its memory says (negative views, zero tensors).
bool ordinary(const Tensor& t, at::ScalarType dtype) {
    static const auto keys = [](const Tensor& t) {
        return t.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
    };
    static const c10::DispatchKeySet wanted = keys(at::detail::empty_cpu({0}, at::kFloat));
    return t.defined() && keys(t) == wanted && t.scalar_type() == dtype;
}

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
        return options.zero && share <= (quick ? options.most_quick : options.most_product);
    }
    // Whether y, or dx, skips zeros. The dense y of a small batch reads the weight across its rows.
    bool skips_in_y(const Options& options) const {
        const bool small = shape.batch <= kSmallBatch && shape.in_features <= kSmallFeatures;
        return skips(options, shape.in_features <= kCachedFeatures || small);
    }
    bool skips_in_dx(const Options& options) const {
        return skips(options, shape.out_features <= kCachedFeatures);
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
        if (each) return empty({shape.replicates, rows, columns});
        return empty({rows, columns});
    }
    static std::array<int64_t, 4> tiles_sizes(const Tensor& x) {
        return {x.dim() == 2 ? 1 : x.size(0), (x.size(-2) + kTileBatch - 1) / kTileBatch,
                x.size(-1), kTileBatch};
    }
    static Tensor empty(at::IntArrayRef sizes) {  // at::empty without the dispatcher
        return at::detail::empty_cpu(sizes, at::kFloat);
    }
};

// Without gradients. `packed` gets the tiles of x where they were made.
Tensor forward(const Tensor& x, const Tensor& values, const Tensor& bias, const Tensor& effective,
               const Kept& kept, const Options& options, Tensor& packed) {
    const Tensor source = x.contiguous(), weights = values.contiguous();
    const Call call(source, weights, kept);
    if (call.skips_in_y(options)) {
        Tensor y = call.matrix(call.several, call.shape.batch, call.shape.out_features);
        packed = Call::empty(Call::tiles_sizes(source));
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

// What a backward needs, the gradients it must find among it.
struct Saved {
    Tensor x, values, packed, effective;
    Kept kept;
    Options options;
    bool need_dx, need_dv, need_db;

    // Of (x, values, bias); where dy is undefined, all are.
    variable_list gradients(const Tensor& dy) const {
        variable_list found(3);
        if (!dy.defined()) return found;
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
        const bool sampled = need_dv && call.share <= options.most_sampled;
        if (sparse_dx || sampled) {
            Tensor tiles = packed;
            if (sampled && !tiles.defined()) {
                const Tensor source = x.contiguous();
                tiles = Call::empty(Call::tiles_sizes(source));
                pack_tiles(source.const_data_ptr<float>(), tiles.size(0), call.shape.batch,
                           call.shape.in_features, tiles.mutable_data_ptr<float>(), kParallel);
            }
            if (sparse_dx)
                dx = call.matrix(call.several && !call.shape.shared_x, call.shape.batch,
                                 call.shape.in_features);
            if (sampled) dv = Call::empty(weights.sizes());
            if (need_db)
                db = call.several ? Call::empty({call.shape.replicates, call.shape.out_features})
                                  : Call::empty({call.shape.out_features});
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
                dv = Call::empty(weights.sizes());
                dense_gradient(call, dy, dv);
            }
        }
    }

    // dvalues from a dense dW, made in blocks of rows that stay in the cache until they are read.
    void dense_gradient(const Call& call, const Tensor& dy, const Tensor& dv) const {
        constexpr int64_t kBlockRows = 160;  // as quick as all rows, and small
        const int64_t n = call.shape.out_features;
        const at::AutoDispatchBelowADInplaceOrView guard;
        const Tensor scratch = Call::empty({std::min(kBlockRows, n), call.shape.in_features});
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

}  // namespace
}  // namespace lottery_sparse
