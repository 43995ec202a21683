// keep_top: of all kept entries of a list of tensors, keep exactly `count` that score highest.
// Order: score descending (-0.0 equals 0.0), then the entry's Philox word descending, then position
// ascending (list position, flat index). A score is compared as its ordered key: an unsigned 32-bit
// integer that grows with the float.
#pragma once

#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "common/philox.h"
#include "common/variants.h"

namespace lottery_sparse {

struct KeepTopTensor {
    const float* scores;  // [size]
    const uint8_t* mask;  // [size], not 0 = kept so far
    uint8_t* out;         // [size], every element is written: 1 = kept
    int64_t size;
    PhiloxKey ties;  // the Philox word of flat index i breaks ties
};

struct KeepTopResult {
    int64_t kept;        // entries kept so far; if fewer than count, nothing was selected
    int64_t nan_tensor;  // list position of the first tensor with a kept NaN score, or -1
};

KeepTopResult keep_top(const std::vector<KeepTopTensor>& tensors, int64_t count,
                       const Parallel& parallel);

// Part [begin, begin + size) of a tensor; begin is a multiple of kKeepTopChunk.
constexpr int64_t kKeepTopChunk = 1 << 18;

struct KeepTopChunk {
    const float* scores;
    const uint8_t* mask;
    uint8_t* out;
    int64_t begin;
    int64_t size;
    PhiloxKey ties;
    int64_t tensor;  // list position
};

// An entry whose fate one pass leaves open. In a pass over scores, value is the ordered key; in a
// pass over ties, the Philox word.
struct KeepTopCandidate {
    uint32_t value;
    uint32_t offset;  // in the chunk
};

// What a pass found in a chunk. If more than `capacity` candidates are met, their number is still
// right but only the first `capacity` are stored.
struct KeepTopFound {
    int64_t above;
    int64_t inside;
    bool nan;
};

constexpr int kRadixBits = 11;
constexpr int64_t kRadixBuckets = 1 << kRadixBits;

struct KeepTopKernels {
    // out = key > high for every entry of the chunk; candidates: low <= key <= high.
    KeepTopFound (*split_scores)(const KeepTopChunk& chunk, uint32_t low, uint32_t high,
                                 KeepTopCandidate* candidates, int64_t capacity);
    // Where key is `tie`, out = word > high; candidates: those with low <= word <= high.
    KeepTopFound (*split_ties)(const KeepTopChunk& chunk, uint32_t tie, uint32_t low, uint32_t high,
                               KeepTopCandidate* candidates, int64_t capacity);
    // Adds to counts[bucket] the kept entries with key >> (shift + kRadixBits) == prefix, where
    // bucket is the next kRadixBits bits of the key, (key >> shift) % kRadixBuckets.
    void (*histogram)(const KeepTopChunk& chunk, int shift, uint32_t prefix,
                      uint32_t counts[kRadixBuckets]);
    uint32_t (*ordered_key)(float score);
};

LS_DECLARE_KERNELS(KeepTopKernels, keep_top_kernels);

}  // namespace lottery_sparse
