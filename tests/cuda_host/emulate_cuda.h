// The machine of csrc/common/cuda_kernel.h on a host, for tests: the threads of a block take turns
// (a fiber each), collectives wait for all of their warp or block, reads of global memory are
// checked against the ranges that the test has registered, and a barrier that cannot be reached is
// an error. See emulate_cuda.cpp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#include "common/device.h"

#define LS_DEVICE static inline
#define LS_METHOD static inline
#define LS_MEMBER inline
#define LS_GLOBAL(threads, blocks) static void
#define LS_UNROLL
#define LS_ROLLED

namespace lottery_sparse {

struct BFloat16;
struct Float16;

int thread_index();
int block_x();
int block_y();
int grid_x();
void sync_block();
void sync_warp();
unsigned char* shared_memory();

inline uint64_t evict_first() {
    return 0;
}
Words4 stream(const Words4* p, uint64_t policy);
uint32_t stream(const uint32_t* p, uint64_t policy);
uint32_t stream(const uint16_t* p, uint64_t policy);

uint32_t from_lane(uint32_t value, int lane);
float float_from_lane(float value, int lane);
inline float float_across(float value, int bits) {
    return float_from_lane(value, thread_index() % 32 ^ bits);
}
inline float fused(float a, float b, float c) {
    return std::fma(a, b, c);
}
uint32_t ballot(bool holds);
// Done only when they are waited for.
void copy_async(void* shared, const void* global);
void commit_copies();
void finish_copies(int last);
template <int kLast>
void wait_copies() {
    finish_copies(kLast);
}
inline float square_root(float x) {
    return std::sqrt(x);
}
inline int count_ones(uint32_t word) {
    return __builtin_popcount(word);
}

template <class T>
void mma(float c[4], const uint32_t a[4], const uint32_t b[2]);
uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector);

inline float nearest_even(float x) {
    return std::nearbyint(x);
}
float half_to_float(uint16_t bits);
uint16_t half_from_float(float x);

// Runs every block of a grid; the message of the first fault, or nullptr.
const char* emulate_grid(const std::function<void()>& thread, int64_t grid_x, int64_t grid_y,
                         int threads, int shared);

template <class Problem>
const char* launch(void (*kernel)(Problem), int64_t grid_x, int64_t grid_y, int threads, int shared,
                   const Device&, const Problem& problem) {
    return emulate_grid([&] { kernel(problem); }, grid_x, grid_y, threads, shared);
}

}  // namespace lottery_sparse
