// A sparse weight as tiles of 64 x 64 (their places are those of tile_fragments.h), each its mask
// and its kept values. A lane finds a value by counting the ones before it.
//
// An operand register of a warp holds 64 weights, two of each lane; a tile has 64 of them, number
// 4 f + r is register r of fragment f. Their bits are two words: bit 2 (l % 16) + h of word l / 16
// is half h of lane l. A tile is
//
//   bits    [2][64] words: word 0 of all registers, then word 1
//   values  16 bits each: by register, word and bit; padded to 16 bytes
//
// or nothing, if it keeps nothing.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "packed/tile_fragments.h"

namespace lottery_sparse {

constexpr int kBitmapRegisters = 64;
constexpr int kBitmapWords = 2 * kBitmapRegisters;
constexpr int kBitmapBytes = kBitmapWords * 4;
constexpr int kBitmapUnit = 16;  // bytes, in which the sizes of tiles are counted

// Word and bit of the weight at place `p`, see tile_place.
LS_HOST_DEVICE int bitmap_word(int p) {
    const int lane = p / 8 % 32, reg = p / 256 * 4 + p % 8 / 2;
    return lane / 16 * kBitmapRegisters + reg;
}
LS_HOST_DEVICE int bitmap_bit(int p) {
    return p / 8 % 16 * 2 + p % 2;
}

}  // namespace lottery_sparse
