// _eager: a compact layer's forward and backward as one C++ autograd node, called from Python
// without a schema. A Python autograd.Function costs 70 us more a layer, as much as the products of
// a small one; torch's C++ Function and a registered op 20 us.
//
// The one file that uses torch's C++ interface, which is no stable ABI: the module's name holds the
// torch version it was built with, no other loads it, and everything works without it.
#include <torch/csrc/python_headers.h>
//
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <array>
#include <cstdlib>

#include "linear/eager_linear.h"

namespace lottery_sparse {
namespace {

using torch::autograd::SavedVariable;

// A tensor that saved_tensors_hooks need not see, for it outlives the call; it must not change,
// unless it lags behind the values, unread.
struct Watched {
    Tensor tensor;
    uint32_t version = 0;
    bool lags = false;

    Watched() = default;
    explicit Watched(const Tensor& t, bool lags = false)
        : tensor(t), version(t._version()), lags(lags) {}
    void check(const char* name) const {
        TORCH_CHECK(lags || tensor._version() == version,
                    "one of the variables needed for gradient computation has been modified by an "
                    "inplace operation: ",
                    name, " of a compact layer is at version ", tensor._version(),
                    "; expected version ", version, " instead.");
    }
};

// Gradients of (x, values, bias).
struct CompactLinearNode : torch::autograd::Node {
    SavedVariable x, values, packed;
    Watched effective, starts;
    Kept kept;
    Options options;

    std::string name() const override { return "CompactLinearBackward"; }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        x.reset_data();
        values.reset_data();
        packed.reset_data();
    }

    Saved unpack() const {
        Saved saved = {x.unpack(),
                       values.unpack(),
                       packed.unpack(),
                       effective.tensor,
                       kept,
                       options,
                       task_should_compute_output(0),
                       task_should_compute_output(1),
                       task_should_compute_output(2)};
        effective.check("weight_effective");
        starts.check("kept.starts");
        return saved;
    }

    variable_list apply(variable_list&& grads) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        return unpack().gradients(grads[0]);
    }

    // For compiled autograd: a call that stays as it is.
    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
        for (const SavedVariable* variable : {&x, &values, &packed})
            args.collect(*variable, /*is_output=*/false);
        for (const Tensor* tensor : {&effective.tensor, &kept.starts, &kept.columns,
                                     &kept.column_starts, &kept.rows, &kept.positions})
            args.collect(*tensor);
        args.collect(options.zero);
        args.collect(options.most_product);
        args.collect(options.most_quick);
        args.collect(options.most_sampled);
    }

    variable_list apply_with_saved(const variable_list& grads,
                                   torch::dynamo::autograd::SwapSavedVariables& swap) override {
        const auto members = [&](auto&& f) {
            f(x), f(values), f(packed), f(effective.tensor), f(kept.starts), f(kept.columns);
            f(kept.column_starts), f(kept.rows), f(kept.positions);
        };
        members([&](auto& member) { swap.before(member); });
        torch::dynamo::autograd::PackedArgs packer;
        for (const Tensor& tensor :
             {x.unpack(), values.unpack(), packed.unpack(), effective.tensor, kept.starts,
              kept.columns, kept.column_starts, kept.rows, kept.positions})
            packer.pack(tensor);
        packer.pack(options.zero);
        packer.pack(options.most_product);
        packer.pack(options.most_quick);
        packer.pack(options.most_sampled);
        for (int i = 0; i < 3; ++i) packer.pack(task_should_compute_output(i));
        const auto args = std::move(packer).vec();
        std::vector<at::TypePtr> schema;
        for (const c10::IValue& arg : args)
            schema.push_back(arg.isTensor() ? at::TensorType::get() : arg.type());
        const auto metadata = torch::dynamo::autograd::
            IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
                torch::dynamo::autograd::get_input_metadata(next_edges()));
        const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
        const std::string bound =
            compiler->bind_function(swap.get_py_compiler(), name(), call, schema,
                                    /*is_custom_function=*/true, /*is_traceable=*/false);
        auto found = compiler->call_function(swap.get_py_compiler(), "apply_functional", bound,
                                             grads, args, metadata);
        members([&](auto& member) { swap.after(member); });
        return found;
    }

  private:
    static variable_list call(const variable_list& grads, const std::vector<c10::IValue>& packed) {
        torch::dynamo::autograd::PackedArgs args(packed);
        Saved saved;
        for (Tensor* tensor : {&saved.x, &saved.values, &saved.packed, &saved.effective,
                               &saved.kept.starts, &saved.kept.columns, &saved.kept.column_starts,
                               &saved.kept.rows, &saved.kept.positions})
            *tensor = args.unpack<Tensor>();
        saved.options.zero = args.unpack<bool>();
        saved.options.most_product = args.unpack<double>();
        saved.options.most_quick = args.unpack<double>();
        saved.options.most_sampled = args.unpack<double>();
        for (bool* need : {&saved.need_dx, &saved.need_dv, &saved.need_db})
            *need = args.unpack<bool>();
        return saved.gradients(grads[0]);
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
    if (at::GradMode::is_enabled() &&
        (x.requires_grad() || values.requires_grad() || (bias.defined() && bias.requires_grad()))) {
        const auto node = c10::make_intrusive<CompactLinearNode>();
        node->set_next_edges(torch::autograd::collect_next_edges(x, values, bias));
        node->x = SavedVariable(x, /*is_output=*/false);
        node->values = SavedVariable(values, /*is_output=*/false);
        if (packed.defined()) node->packed = SavedVariable(packed, /*is_output=*/false);
        node->effective = Watched(effective, /*lags=*/packed.defined());
        node->starts = Watched(kept.starts);
        node->kept = kept;
        node->options = options;
        torch::autograd::set_history(y, node);
    }
    return y;
}

// ---- from Python -----------------------------------------------------------------------------

// A float32 tensor that kernels may read, and whose tangent nobody would lose.
bool plain(const Tensor& t) {
    return ordinary(t, at::kFloat) && !t._fw_grad(0).defined();
}

// Whether somebody changes or watches what ops do: modes, transforms, tracing, autocast.
bool watched() {
    const auto included = c10::impl::tls_local_dispatch_key_set().included_;
    const char* forced = std::getenv("LS_BACKEND");  // backends.forced() knows the rest
    return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
           included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
           c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
           at::impl::torch_function_mode_enabled() || at::autocast::is_autocast_enabled(at::kCPU) ||
           torch::jit::tracer::isTracing() || (forced && *forced);
}

// compact_linear(x, values, bias, effective, starts, columns, column_starts, rows, positions, zero,
// most_product, most_quick, most_sampled) -> y, or None: a call for the registered op.
PyObject* compact_linear_py(PyObject*, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK(count == 13, "compact_linear takes 13 arguments, got ", count, ".");
    if (watched()) Py_RETURN_NONE;
    std::array<Tensor, 9> tensors;
    for (int i = 0; i < 9; ++i) {
        if (i == 2 && args[i] == Py_None) continue;
        if (!THPVariable_CheckExact(args[i])) Py_RETURN_NONE;
        tensors[i] = THPVariable_Unpack(args[i]);
    }
    const auto& [x, values, bias, effective, starts, columns, column_starts, rows, positions] =
        tensors;
    const Kept kept = {starts, columns, column_starts, rows, positions};
    // what does not fit goes the way of all ops, whose errors say why
    if (!plain(x) || !plain(values) || !plain(effective) ||
        !Call::fits(x, values, effective, kept) || !Call::takes(kept))
        Py_RETURN_NONE;
    if (bias.defined() &&
        !(plain(bias) && bias.is_contiguous() && Call::fits_bias(bias, effective)))
        Py_RETURN_NONE;
    const Options options = {args[9] == Py_True, PyFloat_AsDouble(args[10]),
                             PyFloat_AsDouble(args[11]), PyFloat_AsDouble(args[12])};
    if (PyErr_Occurred()) return nullptr;
    Tensor y;
    {
        const pybind11::gil_scoped_release released;
        y = compact_linear(x, values, bias, effective, kept, options);
    }
    return THPVariable_Wrap(std::move(y));
    END_HANDLE_TH_ERRORS
}

PyMethodDef kMethods[] = {
    {"compact_linear",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&compact_linear_py)), METH_FASTCALL,
     nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace
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
                                 lottery_sparse::kMethods,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr};
    return PyModule_Create(&module);
}
