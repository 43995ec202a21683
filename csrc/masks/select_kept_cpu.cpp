#include "masks/select_kept.h"

namespace lottery_sparse {
namespace {

// Compilers turn the loops below into vectors: a byte is spread to a word of all bits or none.
template <class Word>
Word keep_of(uint8_t byte) {
    return static_cast<Word>(-static_cast<Word>(byte != 0));
}

template <class Word>
void select_words(const uint8_t* mask, const Word* values, const Word* others, Word* out,
                  int64_t count) {
    if (others == nullptr) {
        for (int64_t i = 0; i < count; ++i) out[i] = values[i] & keep_of<Word>(mask[i]);
        return;
    }
    for (int64_t i = 0; i < count; ++i)
        out[i] = others[i] ^ ((values[i] ^ others[i]) & keep_of<Word>(mask[i]));
}

// Bits of pruned entries that are not what they should be.
template <class Word>
Word wrong_bits(const uint8_t* mask, const Word* values, const Word* others, int64_t count) {
    Word wrong = 0;
    if (others == nullptr) {
        for (int64_t i = 0; i < count; ++i) wrong |= values[i] & ~keep_of<Word>(mask[i]);
        return wrong;
    }
    for (int64_t i = 0; i < count; ++i) wrong |= (values[i] ^ others[i]) & ~keep_of<Word>(mask[i]);
    return wrong;
}

template <class Word>
bool put_back_words(const uint8_t* mask, Word* values, const Word* others, int64_t count) {
    // After most steps nothing has moved; memory that is only read stays clean in the cache.
    constexpr int64_t kBlock = 2048;
    bool wrote = false;
    for (int64_t at = 0; at < count; at += kBlock) {
        const int64_t n = count - at < kBlock ? count - at : kBlock;
        const Word* other = others ? others + at : nullptr;
        if (wrong_bits(mask + at, values + at, other, n) == 0) continue;
        select_words(mask + at, values + at, other, values + at, n);
        wrote = true;
    }
    return wrote;
}

template <class Word>
void select_as(const uint8_t* mask, const void* values, const void* others, void* out,
               int64_t count) {
    select_words(mask, static_cast<const Word*>(values), static_cast<const Word*>(others),
                 static_cast<Word*>(out), count);
}

template <class Word>
bool put_back_as(const uint8_t* mask, void* values, const void* others, int64_t count) {
    return put_back_words(mask, static_cast<Word*>(values), static_cast<const Word*>(others),
                          count);
}

void select(const uint8_t* mask, const void* values, const void* others, void* out, int64_t count,
            int width) {
    if (width == 2) return select_as<uint16_t>(mask, values, others, out, count);
    if (width == 4) return select_as<uint32_t>(mask, values, others, out, count);
    select_as<uint64_t>(mask, values, others, out, count);
}

bool put_back(const uint8_t* mask, void* values, const void* others, int64_t count, int width) {
    if (width == 2) return put_back_as<uint16_t>(mask, values, others, count);
    if (width == 4) return put_back_as<uint32_t>(mask, values, others, count);
    return put_back_as<uint64_t>(mask, values, others, count);
}

}  // namespace

const SelectKeptKernels LS_KERNELS(select_kept) = {select, put_back};

}  // namespace lottery_sparse
