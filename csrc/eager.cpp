// _eager: a compact layer's forward and backward as one C++ autograd node. A Python
// autograd.Function costs 70 us more a layer, as much as the products of a small one.
//
// The one file that uses torch's C++ interface, which is no stable ABI: the module's name holds the
// torch version it was built with, no other loads it, and everything works without it.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <Python.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>

#include "sparse_linear.h"

namespace lottery_sparse {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const Parallel kParallel([](int64_t begin, int64_t end, int64_t grain, Parallel::Body body,
                            void* context) {
    at::parallel_for(begin, end, grain,
                     [&](int64_t first, int64_t last) { body(first, last, context); });
});

struct Kept {
    Tensor starts, columns, column_starts, rows, positions;
};

// A call's tensors as the kernels take them. Layers hold float32 CPU tensors that fit together, as
// ops/compact.py has made sure; what can change between calls is checked: x and the values.
struct Call {
    SparseLinearShape shape;
    CompactLists lists;
    double share;  // kept entries per weight

    Call(const Tensor& x, const Tensor& values, const Kept& kept) {
        const bool several = values.dim() == 2;
        const int64_t rows = kept.starts.size(-1) - 1, columns = kept.column_starts.size(-1) - 1;
        TORCH_CHECK(x.dim() >= 2 && x.dim() <= values.dim() + 1 && x.size(-1) == columns &&
                        (x.dim() == 2 || x.size(0) == values.size(0)),
                    "x has shape ", x.sizes(), ", but the layer has ", columns, " inputs.");
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

    std::vector<int64_t> sizes(bool several, int64_t features) const {
        if (several) return {shape.replicates, shape.batch, features};
        return {shape.batch, features};
    }
};

class CompactLinear : public torch::autograd::Function<CompactLinear> {
  public:
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& values,
                          const std::optional<Tensor>& bias, const Tensor& effective,
                          const Kept& kept, bool zero, double most_product, double most_sampled) {
        at::AutoDispatchBelowADInplaceOrView guard;
        const Tensor source = x.contiguous(), weights = values.contiguous();
        const Call call(source, weights, kept);
        Tensor y, packed;
        if (zero && call.share <= most_product) {
            y = at::empty(call.sizes(values.dim() == 2, call.shape.out_features), source.options());
            packed = at::empty({call.shape.shared_x ? 1 : call.shape.replicates,
                                (call.shape.batch + kTileBatch - 1) / kTileBatch,
                                call.shape.in_features, kTileBatch},
                               source.options());
            compact_linear_forward(
                {call.shape, call.lists, source.const_data_ptr<float>(),
                 weights.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr,
                 y.mutable_data_ptr<float>(), packed.mutable_data_ptr<float>()},
                kParallel);
        } else if (effective.dim() == 2) {
            y = at::linear(x, effective, bias);
        } else {
            y = at::matmul(x, effective.mT());
            if (bias) y = y.add_(bias->unsqueeze(1));
        }
        ctx->save_for_backward({x, values, effective, kept.starts, kept.columns, kept.column_starts,
                                kept.rows, kept.positions, packed});
        ctx->saved_data["zero"] = zero;
        ctx->saved_data["most_product"] = most_product;
        ctx->saved_data["most_sampled"] = most_sampled;
        return y;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &values = saved[1], &effective = saved[2];
        const Kept kept = {saved[3], saved[4], saved[5], saved[6], saved[7]};
        const bool need_dx = ctx->needs_input_grad(0), need_dv = ctx->needs_input_grad(1);
        const bool need_db = ctx->needs_input_grad(2), zero = ctx->saved_data["zero"].toBool();
        Tensor dx, dv, db;
        if (at::GradMode::is_enabled()) {  // to be differentiated again: by the registered op
            if (need_dx || need_dv)
                std::tie(dx, dv) =
                    differentiable(grads[0], x, values, effective, kept, zero, need_dx, need_dv);
            if (need_db) db = grads[0].sum(-2);
        } else {
            products(ctx, grads[0], x, values, effective, kept, saved[8], zero, need_dx, need_dv,
                     need_db, dx, dv, db);
        }
        return {need_dx ? dx : Tensor(),
                need_dv ? dv : Tensor(),
                db,
                Tensor(),
                Tensor(),
                Tensor(),
                Tensor(),
                Tensor()};
    }

  private:
    static std::tuple<Tensor, Tensor> differentiable(const Tensor& dy, const Tensor& x,
                                                     const Tensor& values, const Tensor& effective,
                                                     const Kept& kept, bool zero, bool need_dx,
                                                     bool need_dv) {
        static const auto op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("lottery_sparse::compact_linear_backward", "")
                                   .typed<std::tuple<Tensor, Tensor>(
                                       const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       const Tensor&, bool, bool, bool)>();
        return op.call(dy, x, values, effective, kept.starts, kept.columns, kept.column_starts,
                       kept.rows, kept.positions, zero, need_dx, need_dv);
    }

    // Each gradient by the sparse kernel or, where too much is kept, by the dense library.
    static void products(AutogradContext* ctx, const Tensor& grad, const Tensor& x,
                         const Tensor& values, const Tensor& effective, const Kept& kept,
                         const Tensor& carried, bool zero, bool need_dx, bool need_dv, bool need_db,
                         Tensor& dx, Tensor& dv, Tensor& db) {
        const Tensor dy = grad.contiguous(), weights = values.contiguous();
        const Call call(x, weights, kept);
        const bool several = values.dim() == 2, shared = x.dim() < dy.dim();
        const bool sparse_dx =
            need_dx && zero && call.share <= ctx->saved_data["most_product"].toDouble();
        const bool sampled = need_dv && call.share <= ctx->saved_data["most_sampled"].toDouble();
        if (sparse_dx || sampled) {
            Tensor packed = carried;
            if (sampled && !packed.defined()) {
                const Tensor source = x.contiguous();
                const int64_t count = call.shape.shared_x ? 1 : call.shape.replicates;
                packed = at::empty({count, (call.shape.batch + kTileBatch - 1) / kTileBatch,
                                    call.shape.in_features, kTileBatch},
                                   source.options());
                pack_tiles(source.const_data_ptr<float>(), count, call.shape.batch,
                           call.shape.in_features, packed.mutable_data_ptr<float>(), kParallel);
            }
            if (sparse_dx)
                dx =
                    at::empty(call.sizes(several && !shared, call.shape.in_features), dy.options());
            if (sampled) dv = at::empty(weights.sizes(), dy.options());
            if (need_db) {
                db = several
                         ? at::empty({call.shape.replicates, call.shape.out_features}, dy.options())
                         : at::empty({call.shape.out_features}, dy.options());
            }
            compact_linear_backward({call.shape, call.lists, dy.const_data_ptr<float>(),
                                     packed.defined() ? packed.const_data_ptr<float>() : nullptr,
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
            if (shared) dx = dx.sum(0);
        }
        if (need_dv && !sampled) {
            const Tensor dw = at::matmul(dy.mT(), x).contiguous();
            if (dw.numel() == weights.numel() && call.share == 1.0) {  // all kept: the same order
                dv = dw.view(weights.sizes());
            } else {
                dv = at::empty(weights.sizes(), dy.options());
                gather_kept({call.shape, call.lists, const_cast<float*>(dw.const_data_ptr<float>()),
                             dv.mutable_data_ptr<float>()},
                            kParallel);
            }
        }
    }
};

Tensor compact_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                      const Tensor& effective, const Tensor& starts, const Tensor& columns,
                      const Tensor& column_starts, const Tensor& rows, const Tensor& positions,
                      bool zero, double most_product, double most_sampled) {
    return CompactLinear::apply(x, values, bias, effective,
                                Kept{starts, columns, column_starts, rows, positions}, zero,
                                most_product, most_sampled);
}

}  // namespace

TORCH_LIBRARY(lottery_sparse_eager, m) {
    m.def(
        "compact_linear(Tensor x, Tensor values, Tensor? bias, Tensor effective, Tensor starts, "
        "Tensor columns, Tensor column_starts, Tensor rows, Tensor positions, bool zero, "
        "float most_product, float most_sampled) -> Tensor",
        &compact_linear);
}

}  // namespace lottery_sparse

#define LS_JOINED(a, b) a##b
#define LS_INIT(name) LS_JOINED(PyInit_, name)
#define LS_QUOTED(name) #name
#define LS_TEXT(name) LS_QUOTED(name)

// LS_EAGER is _eager_ and the torch version, as setup.py has it.
extern "C" __attribute__((visibility("default"))) PyObject* LS_INIT(LS_EAGER)(void) {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                                 LS_TEXT(LS_EAGER),
                                 nullptr,
                                 -1,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr};
    return PyModule_Create(&module);
}
