// Which weight a lane has: from the packed codes of ternary_linear.h to the operands of the matrix
// unit. A warp reads a tile of 32 rows and 64 columns at once, 16 bytes a lane: lane 4 g + q has
// word q of rows 4 g to 4 g + 3. No bit is moved: the rows and columns of an operand are numbered
// so that a lane's words are its part of it.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace lottery_sparse {

constexpr int kTileRows = 32;
constexpr int kTileWords = 4;        // of 16 columns
constexpr uint32_t kCodeOfZero = 1;  // a code is t + 1
constexpr uint32_t kZeroCodes = 0x55555555u * kCodeOfZero;

// Row of the tile that word `i` of a lane belongs to, and its word.
LS_HOST_DEVICE int ternary_row(int lane, int i) {
    return lane / 4 * 4 + i;
}
LS_HOST_DEVICE int ternary_word(int lane) {
    return lane % 4;
}

// A code t + 1, its lower bit flipped, is two bits that say "+" and "not zero". Moved to the top
// of a 16-bit number they are -2 t there, in float16 and bfloat16 alike. Pair `i` of a word, 0 to
// 7: two weights.
LS_HOST_DEVICE uint32_t ternary_pair(uint32_t word, int i) {
    const uint32_t moved = word << (2 * i);
#if defined(__CUDA_ARCH__)
    uint32_t pair;  // one instruction: (moved ^ 0x40004000) & 0xC000C000
    asm("lop3.b32 %0, %1, %2, %3, 0x28;"
        : "=r"(pair)
        : "r"(moved), "r"(0x40004000u), "r"(0xC000C000u));
    return pair;
#else
    return (moved ^ 0x40004000u) & 0xC000C000u;
#endif
}
constexpr float kTernaryFactor = -0.5f;  // of a sum of such products

// Column of the word that half `h` of pair `i` is: see the bits of a word in ternary_linear.h.
LS_HOST_DEVICE int ternary_column(int i, int h) {
    return 4 * (3 - i % 4) + (i < 4 ? 1 : 0) + 2 * h;
}

// Operand `t` of a tile, 0 or 1, has rows g and g + 8: these rows of the tile.
LS_HOST_DEVICE int ternary_operand_row(int t, int row) {
    return row % 8 * 4 + 2 * t + row / 8;
}

}  // namespace lottery_sparse
