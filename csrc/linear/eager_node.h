// An autograd node of _eager: what a layer's backward reads, and how it reaches it.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <vector>

#include "linear/eager_tensors.h"

namespace lottery_sparse {
namespace {

using torch::autograd::SavedVariable;

// A tensor that saved_tensors_hooks need not see, for it outlives the call; it must not change,
// unless it lags behind the values, unread.
struct Watched {
    const char* name = "";
    Tensor tensor;
    uint32_t version = 0;
    bool lags = false;

    Watched(const char* name, const Tensor& t, bool lags = false)
        : name(name), tensor(t), version(t._version()), lags(lags) {}
    void check() const {
        TORCH_CHECK(lags || tensor._version() == version,
                    "one of the variables needed for gradient computation has been modified by an "
                    "inplace operation: ",
                    name, " is at version ", tensor._version(), "; expected version ", version,
                    " instead.");
    }
};

// What a backward reads: the tensors in the order in which the node got them, and numbers.
struct Saved {
    std::vector<Tensor> tensors;
    std::vector<double> numbers;
    std::vector<bool> need;  // by input of the node
};

// The node of a `Product`, which has
//     kName                                   the node's name
//     static variable_list gradients(const Saved&, const Tensor& dy)
// where dy is defined; the gradients are those of the tensors given to `follow`.
template <class Product>
struct ProductNode : torch::autograd::Node {
    std::vector<SavedVariable> saved;  // first in Saved::tensors; an undefined one stays one
    std::vector<Watched> watched;      // then these
    std::vector<Tensor> held;          // and these, which nobody writes to
    std::vector<double> numbers;

    void save(const Tensor& t) {
        saved.push_back(t.defined() ? SavedVariable(t, /*is_output=*/false) : SavedVariable());
    }

    std::string name() const override { return Product::kName; }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (SavedVariable& variable : saved) variable.reset_data();
    }

    variable_list apply(variable_list&& grads) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        Saved all = {tensors(), numbers, need()};
        for (const Watched& one : watched) one.check();
        return found(all, grads[0]);
    }

    // For compiled autograd: a call that stays as it is.
    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
        for (const SavedVariable& variable : saved) args.collect(variable, /*is_output=*/false);
        for (const Watched& one : watched) args.collect(one.tensor);
        for (const Tensor& tensor : held) args.collect(tensor);
        for (const double number : numbers) args.collect(number);
    }

    variable_list apply_with_saved(const variable_list& grads,
                                   torch::dynamo::autograd::SwapSavedVariables& swap) override {
        const auto members = [&](auto&& f) {
            for (SavedVariable& variable : saved) f(variable);
            for (Watched& one : watched) f(one.tensor);
            for (Tensor& tensor : held) f(tensor);
        };
        members([&](auto& member) { swap.before(member); });
        torch::dynamo::autograd::PackedArgs packer;
        const std::vector<Tensor> all = tensors();
        packer.pack(static_cast<int64_t>(all.size()));
        for (const Tensor& tensor : all) packer.pack(tensor);
        packer.pack(static_cast<int64_t>(numbers.size()));
        for (const double number : numbers) packer.pack(number);
        packer.pack(static_cast<int64_t>(num_outputs()));
        for (const bool needed : need()) packer.pack(needed);
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
        auto gradients = compiler->call_function(swap.get_py_compiler(), "apply_functional", bound,
                                                 grads, args, metadata);
        members([&](auto& member) { swap.after(member); });
        return gradients;
    }

  private:
    std::vector<Tensor> tensors() const {
        std::vector<Tensor> all;
        all.reserve(saved.size() + watched.size() + held.size());
        for (const SavedVariable& variable : saved) all.push_back(variable.unpack());
        for (const Watched& one : watched) all.push_back(one.tensor);
        all.insert(all.end(), held.begin(), held.end());
        return all;
    }
    std::vector<bool> need() const {
        std::vector<bool> needed(num_outputs());
        for (size_t i = 0; i < needed.size(); ++i) needed[i] = task_should_compute_output(i);
        return needed;
    }
    static variable_list found(const Saved& all, const Tensor& dy) {
        return dy.defined() ? Product::gradients(all, dy) : variable_list(all.need.size());
    }
    static variable_list call(const variable_list& grads, const std::vector<c10::IValue>& packed) {
        torch::dynamo::autograd::PackedArgs args(packed);
        Saved all;
        for (auto left = args.unpack<int64_t>(); left > 0; --left)
            all.tensors.push_back(args.unpack<Tensor>());
        for (auto left = args.unpack<int64_t>(); left > 0; --left)
            all.numbers.push_back(args.unpack<double>());
        for (auto left = args.unpack<int64_t>(); left > 0; --left)
            all.need.push_back(args.unpack<bool>());
        return found(all, grads[0]);
    }
};

// Whether a gradient may be asked of what is computed from these tensors.
template <class... Tensors>
bool asks_gradients(const Tensors&... tensors) {
    return at::GradMode::is_enabled() && ((tensors.defined() && tensors.requires_grad()) || ...);
}

// A node whose gradients are those of these tensors; an undefined one has none.
template <class Product, class... Tensors>
c10::intrusive_ptr<ProductNode<Product>> node_of(const Tensors&... tensors) {
    auto node = c10::make_intrusive<ProductNode<Product>>();
    node->set_next_edges(torch::autograd::collect_next_edges(tensors...));
    return node;
}

}  // namespace
}  // namespace lottery_sparse
