// See cuda_bits.h. A warp has 32 words of bits. Where rows of the mask begin on 16 bytes, a lane
// reads or writes those of its word; elsewhere the lanes go through the words together, a byte
// each.
#include "common/cuda_kernel.h"
#include "masks/cuda_bits.h"

namespace lottery_sparse {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 8;  // of a multiprocessor

struct Place {
    int64_t row, word;
};

LS_DEVICE Place place_of(const CudaBits& p, int64_t index) {
    if (index <= INT32_MAX &&
        p.words <= INT32_MAX) {  // a division of 64 bits takes 100 instructions
        const uint32_t i = static_cast<uint32_t>(index), words = static_cast<uint32_t>(p.words);
        return {i / words, i % words};
    }
    return {index / p.words, index % p.words};
}

// The bytes that are not zero, as four bits.
LS_DEVICE uint32_t kept_of(uint32_t bytes) {
    const uint32_t ones = ((((bytes & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | bytes) >> 7) & 0x01010101u;
    return ones * 0x01020408u >> 24;
}

LS_DEVICE uint32_t bytes_of(uint32_t bits) {
    return (bits & 15u) * 0x00204081u & 0x01010101u;
}

template <bool kAligned>
LS_GLOBAL(kThreads, kBlocks)
pack_bits_kernel(CudaBits p) {
    const int lane = thread_index() % kLanes;
    const int64_t index = int64_t{block_x()} * kThreads + thread_index(), total = p.rows * p.words;
    uint32_t bits = 0;
    if (kAligned) {
        if (index >= total) return;
        const Place at = place_of(p, index);
        LS_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int64_t column = at.word * 32 + half * 16;
            if (column >= p.columns) continue;
            const Words4 bytes = words_at(p.mask + at.row * p.columns + column);
            LS_UNROLL
            for (int i = 0; i < 4; ++i) bits |= kept_of(bytes.word[i]) << (half * 16 + i * 4);
        }
    } else {
        Place at = place_of(p, index - lane);
        LS_UNROLL
        for (int i = 0; i < kLanes; ++i) {
            const int64_t column = at.word * 32 + lane;
            const bool inside = at.row < p.rows && column < p.columns;
            const uint32_t word = ballot(inside && p.mask[at.row * p.columns + column] != 0);
            if (lane == i) bits = word;
            if (++at.word == p.words) at = {at.row + 1, 0};
        }
        if (index >= total) return;
    }
    p.bits[index] = bits;
}

template <bool kAligned>
LS_GLOBAL(kThreads, kBlocks)
unpack_bits_kernel(CudaBits p) {
    const int lane = thread_index() % kLanes;
    const int64_t index = int64_t{block_x()} * kThreads + thread_index(), total = p.rows * p.words;
    const uint32_t bits = index < total ? p.bits[index] : 0;
    if (kAligned) {
        if (index >= total) return;
        const Place at = place_of(p, index);
        LS_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int64_t column = at.word * 32 + half * 16;
            if (column >= p.columns) continue;
            Words4 bytes;
            LS_UNROLL
            for (int i = 0; i < 4; ++i) bytes.word[i] = bytes_of(bits >> (half * 16 + i * 4));
            *reinterpret_cast<Words4*>(p.mask + at.row * p.columns + column) = bytes;
        }
    } else {
        Place at = place_of(p, index - lane);
        LS_UNROLL
        for (int i = 0; i < kLanes; ++i) {
            const int64_t column = at.word * 32 + lane;
            const uint32_t word = from_lane(bits, i);
            if (at.row < p.rows && column < p.columns)
                p.mask[at.row * p.columns + column] = word >> lane & 1u;
            if (++at.word == p.words) at = {at.row + 1, 0};
        }
    }
}

using Kernel = void (*)(CudaBits);

const char* move(Kernel aligned, Kernel ragged, const CudaBits& p, const Device& device) {
    const int64_t total = p.rows * p.words;
    if (total == 0) return nullptr;
    const bool fits = p.columns % 16 == 0 && reinterpret_cast<uintptr_t>(p.mask) % 16 == 0;
    return launch(fits ? aligned : ragged, (total + kThreads - 1) / kThreads, 1, kThreads, 0,
                  device, p);
}

}  // namespace

const char* cuda_pack_mask(const CudaBits& p, const Device& device) {
    return move(pack_bits_kernel<true>, pack_bits_kernel<false>, p, device);
}

const char* cuda_unpack_mask(const CudaBits& p, const Device& device) {
    return move(unpack_bits_kernel<true>, unpack_bits_kernel<false>, p, device);
}

}  // namespace lottery_sparse
