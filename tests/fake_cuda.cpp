// A CUDA device for a CPU build of torch: its memory can be reached by ATen's ops alone.
//
// What tensors on it hold lies in an arena that is mapped twice: `data_ptr` points into a mapping
// that nobody may read, so that host code that follows it dies as it would read garbage on a GPU;
// the fallback below runs ATen's CPU kernels on the other mapping, once it has checked devices.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <bit>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t ARENA = size_t(16) << 30;
const c10::Device DEVICE(c10::kCUDA, 0);

struct Arena {
    char* shown = nullptr;  // where data_ptr points
    char* host = nullptr;   // the same memory, for the fallback
    size_t used = 0;
    std::map<size_t, std::vector<char*>> free;
    std::mutex mutex;

    Arena() {
        int file = memfd_create("fake_cuda", 0);
        TORCH_CHECK(file >= 0 && ftruncate(file, ARENA) == 0, "fake_cuda: no memory");
        const auto map = [&](int may) {
            return static_cast<char*>(
                mmap(nullptr, ARENA, may, MAP_SHARED | MAP_NORESERVE, file, 0));
        };
        // Triton's interpreter follows pointers that lie in tensors
        const char* interpret = std::getenv("TRITON_INTERPRET");
        const bool seen = interpret && std::string(interpret) == "1";
        const int both = PROT_READ | PROT_WRITE;
        host = map(both), shown = map(seen ? both : PROT_NONE);
    }
};

Arena& arena() {
    static auto* a = new Arena;
    return *a;
}

void give_back(void* block) {
    auto* pair = static_cast<std::pair<size_t, char*>*>(block);
    const std::lock_guard lock(arena().mutex);
    arena().free[pair->first].push_back(pair->second);
    delete pair;
}

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        if (!bytes) return {nullptr, DEVICE};
        const size_t whole = std::bit_ceil(std::max<size_t>(bytes, 512));
        Arena& a = arena();
        const std::lock_guard lock(a.mutex);
        auto& blocks = a.free[whole];
        if (blocks.empty()) {
            TORCH_CHECK(a.used + whole <= ARENA, "fake_cuda: out of memory");
            blocks.push_back(a.shown + a.used), a.used += whole;
        }
        char* at = blocks.back();
        blocks.pop_back();
        std::memset(at - a.shown + a.host, 0xff, bytes);  // NaN
        return {at, new std::pair(whole, at), give_back, DEVICE};
    }
    void copy_data(void* to, const void* from, size_t bytes) const override {
        std::memcpy(to, from, bytes);
    }
};

Memory memory;

void* host_of(const void* shown) {
    return shown ? static_cast<const char*>(shown) - arena().shown + arena().host : nullptr;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::kCUDA; }
    c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
    c10::Device getDevice() const override { return DEVICE; }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::Stream getStream(c10::Device) const override {
        return c10::Stream(c10::Stream::DEFAULT, DEVICE);
    }
    c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
    c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
    void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream&) const override {}
    void synchronizeEvent(void*) const override {}
    void synchronizeDevice(c10::DeviceIndex) const override {}
};

struct Drawn final : c10::GeneratorImpl {
    at::Generator inner;  // of the CPU: other numbers than a GPU's

    explicit Drawn(at::Generator g)
        : GeneratorImpl(DEVICE, c10::DispatchKeySet(c10::DispatchKey::CUDA)), inner(std::move(g)) {}
    void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
    void set_offset(uint64_t offset) override { inner.set_offset(offset); }
    uint64_t get_offset() const override { return inner.get_offset(); }
    uint64_t current_seed() const override { return inner.current_seed(); }
    uint64_t seed() override { return inner.seed(); }
    void set_state(const c10::TensorImpl& state) override {
        inner.unsafeGetGeneratorImpl()->set_state(state);
    }
    c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
        return inner.unsafeGetGeneratorImpl()->get_state();
    }
    Drawn* clone_impl() const override { return new Drawn(inner.clone()); }
};

at::Generator new_generator() {
    return at::make_generator<Drawn>(at::make_generator<at::CPUGeneratorImpl>(0));
}

}  // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
    explicit CUDAHooks(CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex deviceCount() const override { return 1; }
    int getNumGPUs() const override { return 1; }
    DeviceIndex current_device() const override { return 0; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    void setCurrentDevice(DeviceIndex) const override {}
    DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
    DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
    Device getDeviceFromPtr(void*) const override { return DEVICE; }
    Allocator* getCUDADeviceAllocator() const override { return &memory; }
    Allocator* getPinnedMemoryAllocator() const override { return GetAllocator(kCPU); }
    void deviceSynchronize(DeviceIndex) const override {}
    const Generator& getDefaultGenerator(DeviceIndex) const override {
        static const Generator one = new_generator();
        return one;
    }
    Generator getNewGenerator(DeviceIndex) const override { return new_generator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

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
