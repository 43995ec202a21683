// Which weight a lane has: from rows of bits (bits.h) to the operands of the matrix unit. A warp
// reads 32 rows and 512 columns at once, 4 times 16 bytes a lane: lane 4 g + q has piece q, of 128
// columns, of rows g, g + 8, g + 16 and g + 24.
//
// A piece is four words of 32 columns, and a word 16 pairs of weights, 16 bits apart: pair i has
// columns 15 - i and 31 - i. Two pairs of a row come from one shift:
//
//   signs   of an even pair, bits 15 and 31, are those of +1 and -1; of an odd one, bits 14 and 30
//           are those of 0 and 2, which is 1 more: so sums begin with minus the sum of these x.
//           (And where x is infinite, they are NaN.)
//   masks   their bits and those of drawn signs become words of 16 weights, each its sign and
//           whether it is kept: -2, 0 and 2, as in ternary_fragments.h
//
// Signs are drawn by the law of random.h's signs: element i is bit i % 32 of word i / 32, counting
// through all rows. So a Philox block is the signs of a piece, where rows are whole blocks.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/philox.h"

namespace lottery_sparse {

constexpr int kPieceColumns = 128;
constexpr int kPieceWords = 4;
constexpr int kStepPieces = 4;
constexpr int kStepRows = 32;
constexpr int kPairs = 16;  // of a word

// Column of the word that half `h` of pair `i` is.
LS_HOST_DEVICE int binary_column(int i, int h) {
    return 15 - i + 16 * h;
}
// Row of the step that load `l` of a lane has.
LS_HOST_DEVICE int binary_row(int lane, int l) {
    return lane / 4 + 8 * l;
}

// Pair `i` of a word of signs; `one` is 1 twice.
LS_HOST_DEVICE uint32_t binary_pair(uint32_t word, int i, uint32_t one) {
    const uint32_t moved = word << (i / 2 * 2);
    if (i % 2) return moved & 0x40004000u;
#if defined(__CUDA_ARCH__)
    uint32_t pair;  // one instruction: (~moved & 0x80008000) | one
    asm("lop3.b32 %0, %1, %2, %3, 0xAE;" : "=r"(pair) : "r"(moved), "r"(0x80008000u), "r"(one));
    return pair;
#else
    return (~moved & 0x80008000u) | one;
#endif
}
// What an odd pair has more than its signs, negative, in `one`'s type: -1 twice.
LS_HOST_DEVICE uint32_t binary_excess(uint32_t one) {
    return one | 0x80008000u;
}

// Odd bits of ~signs, even bits of the mask.
LS_HOST_DEVICE uint32_t alternating(uint32_t signs, uint32_t mask) {
#if defined(__CUDA_ARCH__)
    uint32_t both;  // one instruction, which the compiler must not distribute over later ones
    asm("lop3.b32 %0, %1, %2, %3, 0x4E;" : "=r"(both) : "r"(signs), "r"(mask), "r"(0xAAAAAAAAu));
    return both;
#else
    return (~signs & 0xAAAAAAAAu) | (mask & 0x55555555u);
#endif
}
// 32 bits of a mask and of signs -> words of even pairs, [0], and of odd ones.
LS_HOST_DEVICE void join_signs(uint32_t mask, uint32_t signs, uint32_t words[2]) {
    words[0] = alternating(signs, mask >> 1);
    words[1] = alternating(signs << 1, mask);
}
// Pair `i`, of the word of its kind.
LS_HOST_DEVICE uint32_t joined_pair(uint32_t word, int i) {
    return word << (i / 2 * 2) & 0xC000C000u;
}
constexpr float kJoinedFactor = 0.5f;  // of a sum of such products

// Signs of 128 elements from a bit of `block` on, `next` being the one after it.
LS_HOST_DEVICE void shifted_signs(const PhiloxBlock& block, const PhiloxBlock& next, uint64_t first,
                                  uint32_t signs[kPieceWords]) {
    uint32_t w[2 * kPieceWords];
    for (int j = 0; j < kPieceWords; ++j) w[j] = block.word[j], w[kPieceWords + j] = next.word[j];
    const bool two = first & 64, one = first & 32;
    for (int j = 0; j < 6; ++j) w[j] = two ? w[j + 2] : w[j];
    for (int j = 0; j < 5; ++j) w[j] = one ? w[j + 1] : w[j];
    for (int j = 0; j < kPieceWords; ++j) {
        const uint64_t both = static_cast<uint64_t>(w[j + 1]) << 32 | w[j];
        signs[j] = static_cast<uint32_t>(both >> (first & 31));
    }
}

}  // namespace lottery_sparse
