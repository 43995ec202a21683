#include "common/bits.h"
#include "common/simd.h"
#include "masks/mask_bits.h"

namespace lottery_sparse {
namespace {

int64_t count_kept(const uint8_t* mask, int64_t count) {
    int64_t kept = 0, i = 0;
    for (; i + 64 <= count; i += 64) kept += count_bits(kept_bits_64(mask + i));
    if (i < count) kept += count_bits(kept_bits(mask + i, count - i));
    return kept;
}

void pack_rows(const uint8_t* mask, int64_t columns, uint32_t* bits, int64_t begin, int64_t end) {
    const int64_t words = packed_words(columns);
    for (int64_t r = begin; r < end; ++r) {
        const uint8_t* source = mask + r * columns;
        uint32_t* row = bits + r * words;
        for (int64_t w = 0; w < words; w += 2) {
            const int64_t left = columns - w * kWordBits;
            const uint64_t pair = left > 0 ? kept_bits(source + w * kWordBits, left) : 0;
            row[w] = static_cast<uint32_t>(pair);
            row[w + 1] = static_cast<uint32_t>(pair >> 32);
        }
    }
}

void unpack_rows(const uint32_t* bits, int64_t columns, uint8_t* mask, int64_t begin, int64_t end) {
    const int64_t words = packed_words(columns);
    for (int64_t r = begin; r < end; ++r) {
        const uint32_t* row = bits + r * words;
        uint8_t* target = mask + r * columns;
        for (int64_t c = 0; c < columns; c += kWordBits) {
            const uint32_t word = row[c / kWordBits];
            const int64_t n = columns - c < kWordBits ? columns - c : kWordBits;
            for (int64_t j = 0; j < n; ++j) target[c + j] = (word >> j) & 1u;
        }
    }
}

}  // namespace

const MaskBitsKernels LS_KERNELS(mask_bits) = {count_kept, pack_rows, unpack_rows};

}  // namespace lottery_sparse
