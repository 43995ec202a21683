// A CUDA device for a CPU build of torch: its memory can be reached by ATen's ops alone.
//
// What tensors on it hold lies in an arena that is mapped twice: `data_ptr` points into a mapping
// that nobody may read, so that host code that follows it dies as it would read garbage on a GPU;
// the fallback below runs ATen's CPU kernels on the other mapping, once it has checked devices.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cstring>
#include <unordered_map>

#include "fake_cuda_device.h"

namespace {

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
REGISTER_ALLOCATOR(c10::kCUDA, &memory)

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool> pinned,
                 std::optional<at::MemoryFormat> format) {
    TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory,
                                     c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                     dtype.value_or(at::kFloat), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(
        C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
        c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype.value_or(at::kFloat));
}

void grow(const at::Tensor& t, size_t bytes) {
    c10::StorageImpl* storage = t.storage().unsafeGetStorageImpl();
    if (storage->nbytes() >= bytes) return;
    c10::DataPtr larger = memory.allocate(bytes);
    if (storage->nbytes()) {
        std::memcpy(host_of(larger.get()), host_of(storage->data()), storage->nbytes());
    }
    storage->set_data_ptr_noswap(std::move(larger));
    storage->set_nbytes(bytes);
}

const at::Tensor& resize_(const at::Tensor& t, c10::SymIntArrayRef size,
                          std::optional<at::MemoryFormat>) {
    t.unsafeGetTensorImpl()->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
    grow(t, (t.storage_offset() + t.numel()) * t.itemsize());
    return t;
}

at::Tensor& set_(at::Tensor& t, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                 c10::SymIntArrayRef stride) {
    TORCH_CHECK(source.device() == DEVICE, "set_: storage is on ", source.device());
    auto* impl = t.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(std::move(source));
    impl->set_storage_offset(offset.expect_int());
    if (stride.empty()) {
        impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
    } else {
        impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
    }
    return t;
}

at::Tensor& set_whole(at::Tensor& t, c10::Storage source) {
    const c10::SymInt size[1] = {int64_t(source.nbytes() / t.itemsize())};
    return set_(t, std::move(source), 0, c10::SymIntArrayRef(size), {});
}

// One call: the CPU tensors that stand for those of the device.
struct Call {
    struct Pair {
        at::Tensor device, cpu;
    };
    std::vector<Pair> pairs;
    std::unordered_map<c10::StorageImpl*, c10::Storage> there, back;
    bool on_device = false;
    bool from_cpu = false;

    at::Tensor to_cpu(const at::Tensor& t) {
        if (!t.defined() || t.device().type() != c10::kCUDA) return t;
        on_device = true;
        for (const Pair& pair : pairs) {
            if (pair.device.is_same(t)) return pair.cpu;
        }
        const c10::Storage& storage = t.storage();
        auto& other = there[storage.unsafeGetStorageImpl()];
        if (!other) {
            other = c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(),
                                 c10::DataPtr(host_of(storage.data()), c10::kCPU),
                                 c10::GetAllocator(c10::kCPU), true);
            back[other.unsafeGetStorageImpl()] = storage;
        }
        auto impl = c10::make_intrusive<c10::TensorImpl>(
            c10::Storage(other), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
        copy_shape(t, *impl);
        at::Tensor cpu(std::move(impl));
        cpu._set_conj(t.is_conj()), cpu._set_neg(t.is_neg());
        pairs.push_back({t, cpu});
        return cpu;
    }

    static void copy_shape(const at::Tensor& from, c10::TensorImpl& to) {
        to.set_storage_offset(from.storage_offset());
        to.set_sizes_and_strides(from.sizes(), from.strides());
    }

    at::Tensor to_device(const at::Tensor& t) {
        if (!t.defined() || from_cpu) return t;
        for (const Pair& pair : pairs) {
            if (pair.cpu.is_same(t)) return pair.device;
        }
        if (!t.has_storage()) return t;
        const auto found = back.find(t.storage().unsafeGetStorageImpl());
        c10::Storage storage;
        if (found != back.end()) {
            storage = found->second;
        } else {
            const size_t bytes = t.storage().nbytes();
            storage = c10::Storage(c10::Storage::use_byte_size_t(), bytes, memory.allocate(bytes),
                                   &memory, true);
            if (bytes) std::memcpy(host_of(storage.data()), t.storage().data(), bytes);
        }
        auto impl = c10::make_intrusive<c10::TensorImpl>(
            std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), t.dtype());
        copy_shape(t, *impl);
        return at::Tensor(std::move(impl));
    }

    // Outputs that were handed in and have been resized.
    void resized() {
        for (const Pair& pair : pairs) {
            const auto &d = pair.device, &c = pair.cpu;
            const auto found = back.find(c.storage().unsafeGetStorageImpl());
            TORCH_CHECK(found != back.end(), "fake_cuda: an op has replaced a storage");
            const c10::Storage& storage = c.storage();
            if (storage.data() != host_of(d.storage().data())) {
                grow(d, storage.nbytes());
                std::memcpy(host_of(d.storage().data()), storage.data(), storage.nbytes());
            }
            if (d.sizes() != c.sizes() || d.strides() != c.strides()) {
                copy_shape(c, *d.unsafeGetTensorImpl());
            }
        }
    }
};

template <typename F>
c10::IValue each_tensor(const c10::IValue& value, F&& f) {
    if (value.isTensor()) return f(value.toTensor());
    if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& t : value.toTensorVector()) list.push_back(f(t));
        return list;
    }
    if (value.isList() && value.toListRef().size()) {
        const auto list = value.toList();
        if (list.elementType()->isSubtypeOf(*c10::OptionalType::ofTensor())) {
            c10::List<std::optional<at::Tensor>> out;
            for (const c10::IValue& v : value.toListRef()) {
                if (v.isNone()) {
                    out.push_back(std::nullopt);
                } else {
                    out.push_back(f(v.toTensor()));
                }
            }
            return out;
        }
    }
    return value;
}

// Ops of which CUDA takes tensors on the CPU, besides numbers.
bool takes_both(const std::string& name) {
    static const std::set<std::string> names = {
        "aten::copy_",         "aten::_copy_from",       "aten::index",
        "aten::index_put_",    "aten::_index_put_impl_", "aten::index_put",
        "aten::_unsafe_index",
    };
    return names.count(name);
}

void check_devices(const c10::FunctionSchema& schema, const std::vector<c10::IValue>& arguments) {
    const std::string& name = schema.name();
    for (size_t i = 0; i < arguments.size(); ++i) {
        const auto* alias = schema.arguments()[i].alias_info();
        const bool written = alias && alias->isWrite();
        each_tensor(arguments[i], [&](const at::Tensor& t) {
            if (!t.defined() || t.device() == DEVICE || (takes_both(name) && i != 2)) return t;
            TORCH_CHECK(
                t.dim() == 0 && !written && t.device() == c10::kCPU,
                "Expected all tensors to be on the same device, but found at least two devices, "
                "cuda:0 and ",
                t.device(), "! (argument ", schema.arguments()[i].name(), " of ", name, ")");
            return t;
        });
    }
}

std::atomic<int64_t> synchronised{0};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    const size_t count = schema.arguments().size();
    TORCH_CHECK_NOT_IMPLEMENTED(
        schema.name().starts_with("aten::") || schema.name().starts_with("prims::"),
        "Could not run '", schema.name(), "' with arguments from the 'CUDA' backend.");
    std::vector<c10::IValue> arguments(stack->end() - count, stack->end());
    stack->erase(stack->end() - count, stack->end());
    check_devices(schema, arguments);
    Call call;
    bool index = schema.name() == "aten::index" || schema.name() == "aten::nonzero";
    bool reads = index || schema.name() == "aten::_local_scalar_dense" ||
                 schema.name() == "aten::equal" || schema.name() == "aten::masked_select";
    if (index && schema.name() == "aten::index") {  // waits for a mask only
        reads = false;
        each_tensor(arguments[1], [&](const at::Tensor& t) {
            reads |= t.defined() && t.scalar_type() == at::kBool;
            return t;
        });
    }
    if (schema.name() == "aten::copy_") {
        reads = arguments[0].toTensor().is_cpu() || arguments[1].toTensor().is_cpu();
        call.from_cpu = arguments[0].toTensor().is_cpu();
    }
    synchronised += reads;
    for (c10::IValue& value : arguments) {
        value = each_tensor(value, [&](const at::Tensor& t) { return call.to_cpu(t); });
        if (value.isDevice()) value = c10::Device(c10::kCPU);
        if (value.isGenerator()) {
            const at::Generator generator = value.toGenerator();
            TORCH_CHECK(generator.device().type() == c10::kCUDA,
                        "Expected a 'cuda' device type for generator but found 'cpu'");
            value = static_cast<Drawn*>(generator.unsafeGetGeneratorImpl())->inner;
        }
        stack->push_back(value);
    }
    {
        const at::AutoDispatchBelowADInplaceOrView guard;
        op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    }
    if (!call.from_cpu) call.resized();
    for (c10::IValue& value : *stack) {
        value = each_tensor(value, [&](const at::Tensor& t) { return call.to_device(t); });
    }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
    m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("resize_", resize_);
    m.impl("set_.source_Storage_storage_offset", set_);
    m.impl("set_.source_Storage", set_whole);
    for (const char* name :
         {"copy_", "convolution",
          "convolution_backward"}) {  // composites that want kernels of the device
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
    }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int64_t fake_cuda_synchronised() {
    return synchronised.load();
}

extern "C" __attribute__((visibility("default"))) int64_t fake_cuda_offset() {
    return arena().host - arena().shown;  // from what data_ptr says to where it can be read
}
