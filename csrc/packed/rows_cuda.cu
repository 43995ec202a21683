// x as the rows of 16 bits that the kernels of cuda_linear.h take. They read a weight once whatever
// x is, and have rows to spare, so a number of more bits is several numbers:
//
//   parts  a float32 is the sum of three bfloat16, each the upper 8 bits of what is left: exactly,
//          down to 2^-126; rows m, B + m and 2 B + m
//   int8   q of x ~ q max|x| / 127, a whole number of up to 7 bits, which bfloat16 holds exactly
#include "common/cuda_kernel.h"
#include "packed/cuda_linear.h"

namespace lottery_sparse {
namespace {

constexpr int kThreads = 256;

LS_GLOBAL(kThreads, 1)
parts_kernel(CudaRows p) {
    const int64_t size = p.batch * p.in_features;
    const int64_t i = static_cast<int64_t>(block_x()) * kThreads + thread_index();
    if (i >= size) return;
    float left = static_cast<const float*>(p.x)[i];
    LS_UNROLL
    for (int part = 0; part < 3; ++part) {
        const uint32_t bits = bits_of(left), magnitude = bits & 0x7FFFFFFFu;
        const bool number = magnitude < 0x7F800000u;
        p.rows[part * size + i] =
            static_cast<uint16_t>(magnitude > 0x7F800000u ? 0x7FC0u : bits >> 16);
        left = number ? left - of_bits(bits & 0xFFFF0000u) : 0.0f;
    }
}

// A block has a row.
LS_GLOBAL(kThreads, 1)
round_kernel(CudaRows p) {
    const int lane = thread_index() % kLanes, warp = thread_index() / kLanes;
    const int64_t first = block_x() * p.in_features;
    uint32_t* const found = reinterpret_cast<uint32_t*>(shared_memory());
    uint32_t most = 0;  // bits of the largest magnitude; those of NaN are more
    for (int64_t k = thread_index(); k < p.in_features; k += kThreads) {
        const uint32_t bits = bits_of(number_at(p.x, p.type, first + k)) & 0x7FFFFFFFu;
        most = bits > most ? bits : most;
    }
    LS_UNROLL
    for (int other = 16; other; other /= 2) {
        const uint32_t bits = from_lane(most, lane ^ other);
        most = bits > most ? bits : most;
    }
    if (lane == 0) found[warp] = most;
    sync_block();
    LS_UNROLL
    for (int i = 0; i < kThreads / kLanes; ++i) most = found[i] > most ? found[i] : most;
    const float largest = of_bits(most), factor = largest > 1e-36f ? 127.0f / largest : 0.0f;
    for (int64_t k = thread_index(); k < p.in_features; k += kThreads)
        p.rows[first + k] =
            BFloat16::from_float(nearest_even(number_at(p.x, p.type, first + k) * factor));
    if (thread_index() == 0) p.scale[block_x()] = largest / 127.0f;
}

}  // namespace

const char* cuda_rows(const CudaRows& p, const Device& device) {
    if (p.scale)
        return launch(round_kernel, p.batch, 1, kThreads, kThreads / kLanes * 4, device, p);
    const int64_t blocks = (p.batch * p.in_features + kThreads - 1) / kThreads;
    return launch(parts_kernel, blocks ? blocks : 1, 1, kThreads, 0, device, p);
}

}  // namespace lottery_sparse
