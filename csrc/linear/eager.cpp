// _eager: the forward and backward of compact, masked and supermask layers as C++ autograd nodes,
// called from Python without a schema. A Python autograd.Function costs 70 us more a layer, as much
// as the products of a small one; torch's C++ Function and a registered op 20 us.
//
// The module that uses torch's C++ interface, which is no stable ABI: its name holds the torch
// version it was built with, no other loads it, and everything works without it.
#include <torch/csrc/python_headers.h>
//
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <array>
#include <cstdlib>

#include "linear/eager_compact.h"
#include "linear/eager_masked.h"
#include "linear/eager_supermask.h"

namespace lottery_sparse {
namespace {

// A tensor that kernels may read, and whose tangent nobody would lose.
bool plain(const Tensor& t) {
    return ordinary(t) && !t._fw_grad(0).defined();
}

// Whether somebody changes or watches what ops do: modes, transforms, tracing.
bool watched() {
    const auto included = c10::impl::tls_local_dispatch_key_set().included_;
    const char* forced = std::getenv("LS_BACKEND");  // dispatch.forced() knows the rest
    return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
           included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
           c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
           at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing() ||
           (forced && *forced);
}

// compact_linear(x, values, bias, effective, starts, columns, column_starts, rows, positions, zero,
// *limits) -> y, or None: a call for the registered op.
PyObject* compact_linear_py(PyObject*, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK(count == 16, "compact_linear takes 16 arguments, got ", count, ".");
    if (watched() || at::autocast::is_autocast_enabled(at::kCPU)) Py_RETURN_NONE;
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
    for (const Tensor* t : {&x, &values, &effective})
        if (!plain(*t) || t->scalar_type() != at::kFloat) Py_RETURN_NONE;
    if (!Call::fits(x, values, effective, kept) || !Call::takes(kept)) Py_RETURN_NONE;
    if (bias.defined() && !(plain(bias) && bias.scalar_type() == at::kFloat &&
                            bias.is_contiguous() && Call::fits_bias(bias, effective)))
        Py_RETURN_NONE;
    const auto limit = [&](int i) { return PyFloat_AsDouble(args[10 + i]); };
    const Options options = {args[9] == Py_True,
                             {limit(0), limit(1), limit(2), limit(3), limit(4), limit(5)}};
    if (PyErr_Occurred()) return nullptr;
    Tensor y;
    {
        const pybind11::gil_scoped_release released;
        y = compact_linear(x, values, bias, effective, kept, options);
    }
    return THPVariable_Wrap(std::move(y));
    END_HANDLE_TH_ERRORS
}

// What layers that are `Masked` share: (x, rest, parameters, buffers), of which rest is a `Rest`
// and the others the dicts of the module. Whether x may take the short way; `layer` is then at
// rest, but for its looks.
bool takes_masked(PyObject* const* args, Py_ssize_t count, AtRest& layer) {
    TORCH_CHECK(count == 4, "masked layers call with 4 arguments, got ", count, ".");
    if (watched() || !THPVariable_CheckExact(args[0]) || !PyTuple_Check(args[1]) ||
        !PyDict_CheckExact(args[2]) || !PyDict_CheckExact(args[3]))
        return false;
    return plain(THPVariable_Unpack(args[0])) && is_at_rest(args[1], args[2], args[3], layer) &&
           plain(layer.weight);
}

// masked_linear(x, rest, parameters, buffers) -> y, or None: a call for the registered op.
PyObject* masked_linear_py(PyObject*, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    static PyObject* const bias_name = PyUnicode_InternFromString("bias");
    AtRest layer;
    if (!takes_masked(args, count, layer)) {
        if (PyErr_Occurred()) return nullptr;
        Py_RETURN_NONE;
    }
    PyObject* own_bias = PyDict_GetItemWithError(args[2], bias_name);
    if (own_bias == nullptr) Py_RETURN_NONE;
    Tensor bias;
    if (own_bias != Py_None) {
        if (!THPVariable_CheckExact(own_bias)) Py_RETURN_NONE;
        bias = THPVariable_Unpack(own_bias);
        if (!plain(bias)) Py_RETURN_NONE;
    }
    const Tensor x = THPVariable_Unpack(args[0]);
    const bool looks = looks_at_rest(args[1], layer.weight);
    Tensor y;
    {
        const pybind11::gil_scoped_release released;
        y = masked_linear(x, layer, bias, looks);
    }
    if (!y.defined()) Py_RETURN_NONE;
    return THPVariable_Wrap(std::move(y));
    END_HANDLE_TH_ERRORS
}

// kept_weight(x, rest, parameters, buffers) -> the weight for a dense product with x, no gradient
// flowing to pruned entries; or None: a call for the registered op.
PyObject* kept_weight_py(PyObject*, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    AtRest layer;
    if (!takes_masked(args, count, layer) || !looks_at_rest(args[1], layer.weight) ||
        (THPVariable_Unpack(args[0]).scalar_type() != layer.weight.scalar_type() &&
         !at::autocast::is_autocast_enabled(at::kCPU))) {
        if (PyErr_Occurred()) return nullptr;
        Py_RETURN_NONE;
    }
    return THPVariable_Wrap(with_kept_gradient(layer));
    END_HANDLE_TH_ERRORS
}

// supermask_linear(x, score, weight, bias, key, mask, rescale) -> y, or None: a call for the
// registered op, whose errors say what does not fit. One of key and mask is None.
PyObject* supermask_linear_py(PyObject*, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK(count == 7, "supermask_linear takes 7 arguments, got ", count, ".");
    if (watched()) Py_RETURN_NONE;
    std::array<Tensor, 6> tensors;
    for (int i = 0; i < 6; ++i) {
        if (i >= 3 && args[i] == Py_None) continue;
        if (!THPVariable_CheckExact(args[i])) Py_RETURN_NONE;
        tensors[i] = THPVariable_Unpack(args[i]);
    }
    const auto& [x, score, weight, bias, key, mask] = tensors;
    if (!plain(x) || !plain(score) || !plain(weight) || (bias.defined() && !plain(bias)) ||
        key.defined() == mask.defined())
        Py_RETURN_NONE;
    const int rescale = PyObject_IsTrue(args[6]);
    if (rescale < 0) return nullptr;
    const auto drawn = key.defined() ? key_of(key) : std::nullopt;
    if (key.defined() && !drawn) Py_RETURN_NONE;
    Tensor y;
    {
        const pybind11::gil_scoped_release released;
        y = supermask_linear(x, score, weight, bias, drawn, mask, rescale == 1);
    }
    if (!y.defined()) Py_RETURN_NONE;
    return THPVariable_Wrap(std::move(y));
    END_HANDLE_TH_ERRORS
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef kMethods[] = {{"compact_linear", fast(&compact_linear_py), METH_FASTCALL, nullptr},
                          {"masked_linear", fast(&masked_linear_py), METH_FASTCALL, nullptr},
                          {"kept_weight", fast(&kept_weight_py), METH_FASTCALL, nullptr},
                          {"supermask_linear", fast(&supermask_linear_py), METH_FASTCALL, nullptr},
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
