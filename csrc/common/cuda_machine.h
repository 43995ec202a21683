// What a kernel asks of an NVIDIA GPU; nvcc compiles it. Kernels include common/cuda_kernel.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/device.h"

#define LS_DEVICE __device__ __forceinline__
#define LS_METHOD static __device__ __forceinline__
#define LS_MEMBER __device__ __forceinline__
#define LS_GLOBAL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define LS_UNROLL _Pragma("unroll")
#define LS_ROLLED _Pragma("unroll 1")  // fewer values in registers at a time

namespace lottery_sparse {

struct BFloat16;
struct Float16;

LS_DEVICE int thread_index() {
    return threadIdx.x;
}
LS_DEVICE int block_x() {
    return blockIdx.x;
}
LS_DEVICE int block_y() {
    return blockIdx.y;
}
LS_DEVICE int grid_x() {
    return gridDim.x;
}
LS_DEVICE void sync_block() {
    __syncthreads();
}
LS_DEVICE void sync_warp() {
    __syncwarp();
}
LS_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

// Reads of a weight, which is used once: past the L1 cache, and first to leave the L2 cache.
LS_DEVICE uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
LS_DEVICE Words4 stream(const Words4* p, uint64_t policy) {
    Words4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(p), "l"(policy));
    return v;
}
LS_DEVICE uint32_t stream(const uint32_t* p, uint64_t policy) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;"
                 : "=r"(v)
                 : "l"(p), "l"(policy));
    return v;
}
LS_DEVICE uint32_t stream(const uint16_t* p, uint64_t policy) {
    uint16_t v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.u16 %0, [%1], %2;"
                 : "=h"(v)
                 : "l"(p), "l"(policy));
    return v;
}

// The value that a lane of the warp has. All lanes call it together.
LS_DEVICE uint32_t from_lane(uint32_t value, int lane) {
    return __shfl_sync(0xFFFFFFFFu, value, lane);
}

LS_DEVICE float float_from_lane(float value, int lane) {
    return __shfl_sync(0xFFFFFFFFu, value, lane);
}

// The lanes of the warp for which `holds` is true, as bits. All lanes call it together.
LS_DEVICE uint32_t ballot(bool holds) {
    return __ballot_sync(0xFFFFFFFFu, holds);
}

// The value of the lane whose number differs in `bits`.
LS_DEVICE float float_across(float value, int bits) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, bits);
}

LS_DEVICE int count_ones(uint32_t word) {
    return __popc(word);
}

// 16 bytes of global memory -> shared memory, while the thread goes on. The copies since the last
// commit are a group; wait_copies<n> waits for all groups of this thread but the last n.
LS_DEVICE void copy_async(void* shared, const void* global) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
LS_DEVICE void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kLast>
LS_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLast) : "memory");
}

LS_DEVICE float fused(float a, float b, float c) {
    return __fmaf_rn(a, b, c);
}

LS_DEVICE float square_root(float x) {
    return __fsqrt_rn(x);
}

// c += a b^T for a of 16 x 16 and b of 8 x 16 (PTX: mma.m16n8k16). Lane 4 g + q holds rows g and
// g + 8 of a, row g of b, and columns 2 q, 2 q + 1 of c.
template <class T>
LS_DEVICE void mma(float c[4], const uint32_t a[4], const uint32_t b[2]);
#define LS_MMA(T, name)                                                            \
    template <>                                                                    \
    LS_DEVICE void mma<T>(float c[4], const uint32_t a[4], const uint32_t b[2]) {  \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                 \
            ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));   \
    }
LS_MMA(BFloat16, "bf16")
LS_MMA(Float16, "f16")
#undef LS_MMA

// Byte i of the result is one of the 8 bytes of b : a; digit i of the selector says which.
LS_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

LS_DEVICE float nearest_even(float x) {  // the nearest whole number
    return rintf(x);
}

LS_DEVICE float half_to_float(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
LS_DEVICE uint16_t half_from_float(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Returns nullptr, or the message of CUDA.
template <class Problem>
const char* launch(void (*kernel)(Problem), int64_t grid_x, int64_t grid_y, int threads, int shared,
                   const Device& device, const Problem& problem) {
    constexpr int kUnasked = 48 << 10;  // bytes of shared memory that need no permission
    if (shared > kUnasked) {
        const cudaError_t error =
            cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
    kernel<<<grid, threads, shared, static_cast<cudaStream_t>(device.stream)>>>(problem);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lottery_sparse
