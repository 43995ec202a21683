// A sparse weight as tiles of 64 rows and 64 columns. A warp writes the kept values of a tile to
// their places in shared memory, where they are operands of the matrix unit, and zeros lie between.
//
// An entry is a value, 16 bits, and its place, 12 bits. 64 entries are a group, of which lane l has
// entries l and 32 + l. A tile of G groups is
//
//   values  [G][32] pairs of 16 bits
//   low     [G][32] pairs of bytes: the places' lower bits
//   high    [ceil(G / 4)][32] words: their upper 4, of group 4 i + j in byte j of word i
//
// What fills the last group repeats the tile's last entry. Entries that lie in the same bank of
// shared memory are apart, so that 32 lanes write into nearly as many banks.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace lottery_sparse {

constexpr int kTileSide = 64;
constexpr int kFragmentBytes = 512;  // of 16 x 16 weights
constexpr int kTileBytes = 16 * kFragmentBytes;
constexpr int kValueBytes = 128, kLowBytes = 64;  // of a group
constexpr int kHighBytes = 128, kHighGroups = 4;  // of so many groups
constexpr int kUnit = 64;                         // bytes, in which the sizes of tiles are counted
constexpr int kUnitsOfGroup = (kValueBytes + kLowBytes) / kUnit;
constexpr int kUnitsOfHigh = kHighBytes / kUnit;

// Groups of a tile that takes so many units.
LS_HOST_DEVICE uint32_t groups_of_units(uint32_t units) {
    constexpr uint32_t kFull = kHighGroups * kUnitsOfGroup + kUnitsOfHigh;
    const uint32_t rest = units % kFull;
    return units / kFull * kHighGroups + (rest ? (rest - kUnitsOfHigh) / kUnitsOfGroup : 0);
}

// Bytes from the start of a tile to the weight at (row, column): twice its place. Fragment 4 s + k
// has rows 16 s to 16 s + 15 and, of each 16 columns, 4 k to 4 k + 3; lane 4 g + q reads 16 bytes
// of it: of rows g and g + 8, columns 16 q + 4 k to + 3.
LS_HOST_DEVICE int tile_place(int row, int column) {
    const int fragment = row / 16 * 4 + column % 16 / 4;
    const int lane = row % 8 * 4 + column / 16;
    const int word = row % 16 / 8 + column % 4 / 2 * 2;
    return fragment * kFragmentBytes + lane * 16 + word * 4 + column % 2 * 2;
}

// Where the two entries of a lane go, the second in the upper 16 bits: `low` as stored, and the
// word of `high` for group `i`.
LS_HOST_DEVICE uint32_t entry_places(uint32_t low, uint32_t high, int i) {
    const uint32_t both = high >> (8 * (i % kHighGroups));
    const uint32_t first = (both & 0xFu) << 8 | (low & 0xFFu);
    const uint32_t second = (both & 0xF0u) << 4 | low >> 8;
    return (second << 16 | first) << 1;
}

}  // namespace lottery_sparse
