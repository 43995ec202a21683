// The emulated device of fake_cuda.cpp: its memory, which is mapped twice, its streams, its
// generator.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cstring>
#include <map>
#include <mutex>

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
