// Rows of x in shared memory, as the second operand of the matrix unit: of 64 columns, lane 4 g + q
// has the 16 of word q of row g, 8 registers, for four products of 16 columns. Either each word is
// in ternary_pair's order (kPairs), or the quarters of four words go together (kQuarters).
#pragma once

#include "common/cuda_kernel.h"
#include "packed/cuda_linear.h"

namespace lottery_sparse {

constexpr int kSide = 8;        // rows of x in an operand
constexpr int kWordBytes = 32;  // of 16 columns of x

LS_HOST_DEVICE int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

LS_HOST_DEVICE int64_t x_rows(const CudaLinear& p) {
    return p.batch * p.parts;
}

// Bytes of a row: a warp's reads of several rows must not meet in a bank.
enum class Columns { kPairs, kQuarters };
template <Columns kOrder>
LS_HOST_DEVICE int row_bytes(int words) {
    return words * kWordBytes + (kOrder == Columns::kPairs ? 16 : 32);
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

// Columns `column` to + 15 of a row of x, zeros beyond K.
LS_DEVICE void read_columns(const CudaLinear& p, int row, int64_t column, bool aligned,
                            uint32_t in[8]) {
    const uint16_t* from = static_cast<const uint16_t*>(p.x) + row * p.in_features + column;
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
}

// Whether rows of x are whole units of 16 bytes.
LS_DEVICE bool x_aligned(const CudaLinear& p) {
    return p.in_features % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
}

// This block's columns of x -> shared memory, zeros beyond K.
template <Columns kOrder>
LS_DEVICE void load_x(const CudaLinear& p, int64_t first_word, int words, unsigned char* shared,
                      int threads) {
    const bool aligned = x_aligned(p);
    for (int i = thread_index(); i < words * static_cast<int>(x_rows(p)); i += threads) {
        const int row = i / words, word = i % words;
        uint32_t in[8];
        read_columns(p, row, (first_word + word) * 16, aligned, in);
        unsigned char* out = shared + row * row_bytes<kOrder>(words);
        if (kOrder == Columns::kPairs) {
            store_pairs(in, reinterpret_cast<Words4*>(out + word * kWordBytes));
        } else {
            LS_UNROLL
            for (int k = 0; k < 4; ++k)
                *reinterpret_cast<Words2*>(out + (word / 4 * 16 + k * 4 + word % 4) *
                                                     8) = {{in[2 * k], in[2 * k + 1]}};
        }
    }
}

// Where row `row` of an operand is, another one if there is none: sums for it are not used.
template <Columns kOrder>
LS_DEVICE const unsigned char* x_row(const unsigned char* x, int words, int row, int64_t rows) {
    return x + (row < rows ? row : static_cast<int>(rows) - 1) * row_bytes<kOrder>(words);
}

// The operands of half of the 64 columns from `word` on.
template <int kSides>
LS_DEVICE void read_pairs(const unsigned char* x, int words, int word, int half, int64_t rows,
                          int lane, Words4 b[kSides]) {
    LS_UNROLL
    for (int side = 0; side < kSides; ++side) {
        const unsigned char* from = x_row<Columns::kPairs>(x, words, side * kSide + lane / 4, rows);
        b[side] = words_at(from + (word + lane % 4) * kWordBytes + half * 16);
    }
}

// The same for quarter `k`.
template <int kSides>
LS_DEVICE void read_quarter(const unsigned char* x, int words, int word, int k, int64_t rows,
                            int lane, Words2 b[kSides]) {
    LS_UNROLL
    for (int side = 0; side < kSides; ++side) {
        const unsigned char* from =
            x_row<Columns::kQuarters>(x, words, side * kSide + lane / 4, rows);
        const int at = word * kWordBytes + (k * 4 + lane % 4) * 8;
        b[side] = *reinterpret_cast<const Words2*>(from + at);
    }
}

}  // namespace lottery_sparse
