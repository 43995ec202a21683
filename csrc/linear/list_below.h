// Whether the lists of some rows stay within what they number, for the instruction set a file is
// compiled for. Kernels ask right before they read a block of rows, so that the lists come into the
// cache once for both, and the processor goes on with the products meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace lottery_sparse {

// What the lists of a matrix must stay within.
struct ListBounds {
    int64_t slots;    // of the matrix
    int64_t columns;  // of the matrix
};

namespace {

#if defined(__AVX512BW__)
inline __m512i larger(__m512i a, __m512i b, uint16_t) {
    return _mm512_max_epu16(a, b);
}
inline __m512i larger(__m512i a, __m512i b, uint32_t) {
    return _mm512_max_epu32(a, b);
}
inline __m512i first_of(const uint16_t* numbers, int64_t count) {
    return _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, static_cast<uint32_t>(count)), numbers);
}
inline __m512i first_of(const uint32_t* numbers, int64_t count) {
    return _mm512_maskz_loadu_epi32(_bzhi_u32(~0u, static_cast<uint32_t>(count)), numbers);
}
inline bool all_at_most(__m512i numbers, uint16_t last) {
    return !_mm512_cmpgt_epu16_mask(numbers, _mm512_set1_epi16(static_cast<int16_t>(last)));
}
inline bool all_at_most(__m512i numbers, uint32_t last) {
    return !_mm512_cmpgt_epu32_mask(numbers, _mm512_set1_epi32(static_cast<int32_t>(last)));
}

// Whether all of `count` numbers are below `bound`. The largest number decides.
template <class Index>
inline bool below(const Index* numbers, int64_t count, int64_t bound) {
    constexpr int64_t kVector = 64 / sizeof(Index), kMost = std::numeric_limits<Index>::max();
    __m512i most[4] = {};
    int64_t i = 0;
    for (; i + 4 * kVector <= count; i += 4 * kVector)
        for (int v = 0; v < 4; ++v)
            most[v] = larger(most[v], _mm512_loadu_si512(numbers + i + v * kVector), Index{});
    for (; i < count; i += kVector)
        most[0] = larger(most[0], first_of(numbers + i, std::min(kVector, count - i)), Index{});
    for (int v = 1; v < 4; ++v) most[0] = larger(most[0], most[v], Index{});
    return count == 0 ||
           (bound > 0 && all_at_most(most[0], static_cast<Index>(std::min(bound - 1, kMost))));
}
#else
template <class Index>
inline bool below(const Index* numbers, int64_t count, int64_t bound) {
    if (count == 0) return true;
    Index most = 0;  // compilers make vectors of this loop
    for (int64_t i = 0; i < count; ++i) most = numbers[i] > most ? numbers[i] : most;
    return static_cast<int64_t>(most) < bound;
}
#endif

// Whether none of the first `count` + 1 numbers is negative, or below the one before it. Only a
// sign bit decides. Numbers that are not negative have a difference that fits; that of others may
// be anything.
inline bool ascend(const int64_t* numbers, int64_t count) {
    uint64_t signs = static_cast<uint64_t>(numbers[0]);
    for (int64_t i = 0; i < count; ++i) {
        const auto here = static_cast<uint64_t>(numbers[i]),
                   next = static_cast<uint64_t>(numbers[i + 1]);
        signs |= next | (next - here);
    }
    return static_cast<int64_t>(signs) >= 0;
}

// Whether `count` rows from `starts` on are slots of the matrix that hold columns of it.
template <class Index>
inline bool rows_fit(const ListBounds& bounds, const Index* columns, const int64_t* starts,
                     int64_t count) {
    return ascend(starts, count) && starts[count] <= bounds.slots &&
           below(columns + starts[0], starts[count] - starts[0], bounds.columns);
}

}  // namespace
}  // namespace lottery_sparse
