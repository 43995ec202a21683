// Rows of x in shared memory, as the second operand of the matrix unit: lane 4 g + q reads the 16
// columns of word q of row g, 8 registers, for four products of 16 columns.
#pragma once

#include "cuda_linear.h"

namespace lottery_sparse {

constexpr int kSide = 8;        // rows of x in an operand
constexpr int kWordBytes = 32;  // of 16 columns of x

LS_HOST_DEVICE int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Rows of x in shared memory are half a bank row apart, so that a warp's reads do not collide.
LS_HOST_DEVICE int row_bytes(int words) {
    return words * kWordBytes + 16;
}

// Columns of x as pairs, in the order in which ternary_pair takes them from a word.
LS_DEVICE void store_pairs(const uint32_t in[8], Words4 out[2]) {
    LS_UNROLL
    for (int i = 0; i < 4; ++i) {
        const int from = 2 * (3 - i);  // columns 4 (3 - i) to + 3
        out[0].word[i] = permute_bytes(in[from], in[from + 1], 0x7632);
        out[1].word[i] = permute_bytes(in[from], in[from + 1], 0x5410);
    }
}

// This block's columns of x -> shared memory, zeros beyond K. kPairs: in ternary_pair's order.
template <bool kPairs>
LS_DEVICE void load_x(const CudaLinear& p, int64_t first_word, int words, unsigned char* shared,
                      int threads) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x);
    const bool aligned = p.in_features % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    for (int i = thread_index(); i < words * static_cast<int>(p.batch); i += threads) {
        const int row = i / words, word = i % words;
        const int64_t column = (first_word + word) * 16;
        const uint16_t* from = x + row * p.in_features + column;
        uint32_t in[8];
        if (aligned && column + 16 <= p.in_features) {
            const Words4 low = words_at(from), high = words_at(from + 8);
            LS_UNROLL
            for (int j = 0; j < 4; ++j) in[j] = low.word[j], in[4 + j] = high.word[j];
        } else {
            LS_UNROLL
            for (int j = 0; j < 8; ++j) {
                const int64_t at = column + 2 * j;
                const uint32_t low = at < p.in_features ? from[2 * j] : 0;
                const uint32_t high = at + 1 < p.in_features ? from[2 * j + 1] : 0;
                in[j] = low | high << 16;
            }
        }
        Words4* out =
            reinterpret_cast<Words4*>(shared + row * row_bytes(words) + word * kWordBytes);
        if (kPairs) {
            store_pairs(in, out);
        } else {
            out[0] = {{in[0], in[1], in[2], in[3]}};
            out[1] = {{in[4], in[5], in[6], in[7]}};
        }
    }
}

// The operands of half of the 64 columns from `word` on; rows beyond the batch are zeros.
template <int kSides>
LS_DEVICE void read_x(const unsigned char* x, int words, int word, int half, int64_t batch,
                      int lane, Words4 b[kSides]) {
    LS_UNROLL
    for (int side = 0; side < kSides; ++side) {
        const int row = side * kSide + lane / 4;
        const unsigned char* from = x + row * row_bytes(words) + (word + lane % 4) * kWordBytes;
        b[side] = row < batch ? words_at(from + half * 16) : Words4{};
    }
}

}  // namespace lottery_sparse
