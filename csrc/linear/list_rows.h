// Listing the kept entries of a dense matrix, and ordering their values, for the instruction set a
// file is compiled for.
#pragma once

#include "common/bfloat16.h"
#include "common/simd.h"
#include "linear/list_below.h"

namespace lottery_sparse {
namespace {

template <class Index, class Value>
void list_rows(const uint8_t* mask, const Value* weight, int64_t columns, int64_t begin,
               int64_t end, const int64_t* starts, Index* kept_columns, float* values) {
    int64_t at = starts[begin];
    for (int64_t r = begin; r < end; ++r) {
        const uint8_t* mask_row = mask + r * columns;
        const Value* weight_row = weight + r * columns;
        for (int64_t c = 0; c < columns; c += 64) {
            uint64_t bits = kept_bits(mask_row + c, columns - c);
            while (bits) {
                const int64_t column = c + __builtin_ctzll(bits);
                kept_columns[at] = static_cast<Index>(column);
                values[at++] = number(weight_row[column]);
                bits &= bits - 1;
            }
        }
    }
}

// to[i] = values[positions[i]]. False: a position is not below `slots`.
template <class Value>
bool order(const Value* values, const int32_t* positions, int64_t count, int64_t slots, float* to) {
    constexpr int64_t kBlock = 64;  // checked while the ones before are still being read
    for (int64_t first = 0; first < count; first += kBlock) {
        const int64_t last = first + kBlock < count ? first + kBlock : count;
        const auto* numbers = reinterpret_cast<const uint32_t*>(positions + first);
        if (!below(numbers, last - first, slots)) return false;
        for (int64_t i = first; i < last; ++i) to[i] = number(values[positions[i]]);
    }
    return true;
}

}  // namespace
}  // namespace lottery_sparse
