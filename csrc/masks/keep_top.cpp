// The selection: find the boundary key, the key of the entry ranked `count`. Entries above it are
// in; of those equal to it, as many as are missing, chosen the same way by Philox word.
//
// Usually one pass does it: a random sample brackets the boundary, and the few entries inside the
// bracket are settled by sorting. Where the bracket misses or holds too many entries (ties), radix
// histograms find the boundary. The sample decides only the path: counts are checked, so the result
// is exact, and the same for every thread count and variant.
#include "masks/keep_top.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>

#include "masks/mask_bits.h"

namespace lottery_sparse {
namespace {

// One entry in kSampleShare is a sample, up to kSamples in all.
constexpr int64_t kSampleShare = 32;
constexpr int64_t kSamples = 1 << 16;
constexpr int64_t kFewestSamples = 256;
// Candidates that a chunk stores. Where there are no more entries than these, all may be
// candidates.
constexpr int64_t kCapacity = kKeepTopChunk / 16;
// Half widths of brackets, in standard deviations of the rank that a bracket aims at. A miss costs
// three more passes over the scores; a miss over ties, which no sample outnumbers, costs memory.
constexpr double kDeviations = 4.0;
constexpr double kTieDeviations = 6.5;
constexpr uint32_t kMaxValue = 0xFFFFFFFFu;

struct Bracket {
    uint32_t low;
    uint32_t high;
};

// A candidate with its chunk.
struct Open {
    uint32_t value;
    uint32_t offset;
    int64_t chunk;
};

uint64_t scrambled(uint64_t x) {  // the finaliser of splitmix64
    x = (x + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

class Selection {
  public:
    Selection(const std::vector<KeepTopTensor>& tensors, const Parallel& parallel);
    KeepTopResult run(int64_t count);

  private:
    int64_t count_kept() const;
    Bracket sample_bracket(int64_t count, int64_t kept) const;
    uint32_t radix_boundary(int64_t count) const;

    // Runs kernel(chunk, candidates, capacity) on every chunk and fills above_, inside_, open_
    // (candidates in order of position) and nan_tensor_. With capacity 0, open_ stays empty.
    template <class Kernel>
    void pass(int64_t capacity, const Kernel& kernel);
    void split_scores(Bracket bracket, int64_t capacity);
    bool brackets(int64_t count) const { return above_ <= count && count <= above_ + inside_; }

    void break_ties(uint32_t tie, int64_t tied, int64_t missing);
    // Keeps the open entries above the value ranked `missing`; those equal to it stay open.
    // Returns how many of them are still missing.
    int64_t settle(int64_t missing);
    void keep_first_open(int64_t missing);
    void keep(const Open& entry) { chunks_[entry.chunk].out[entry.offset] = 1; }

    const KeepTopKernels& kernels_;
    const Parallel& parallel_;
    std::vector<KeepTopChunk> chunks_;
    std::vector<int64_t> starts_;  // of each chunk, counted over all tensors
    int64_t size_ = 0;

    int64_t above_ = 0, inside_ = 0, nan_tensor_ = -1;
    bool stored_all_ = false;
    std::vector<Open> open_;
};

Selection::Selection(const std::vector<KeepTopTensor>& tensors, const Parallel& parallel)
    : kernels_(LS_CHOSEN_KERNELS(keep_top_kernels)), parallel_(parallel) {
    for (size_t t = 0; t < tensors.size(); ++t) {
        const KeepTopTensor& tensor = tensors[t];
        for (int64_t begin = 0; begin < tensor.size; begin += kKeepTopChunk) {
            const int64_t size = std::min(kKeepTopChunk, tensor.size - begin);
            chunks_.push_back({tensor.scores + begin, tensor.mask + begin, tensor.out + begin,
                               begin, size, tensor.ties, static_cast<int64_t>(t)});
            starts_.push_back(size_);
            size_ += size;
        }
    }
}

KeepTopResult Selection::run(int64_t count) {
    const int64_t kept = count_kept();
    if (count > kept) return {kept, -1};

    Bracket bracket = {0, kMaxValue};
    if (count == 0 || count == kept)
        bracket.low = bracket.high = count == 0 ? kMaxValue : 0;  // beyond every number
    else if (size_ > kCapacity)
        bracket = sample_bracket(count, kept);

    split_scores(bracket, bracket.low == bracket.high ? 0 : kCapacity);
    if (nan_tensor_ >= 0) return {kept, nan_tensor_};
    if (!brackets(count) || (bracket.low < bracket.high && !stored_all_)) {
        bracket.low = bracket.high = radix_boundary(count);
        split_scores(bracket, 0);
    }

    int64_t missing = count - above_;
    if (missing == 0) return {kept, -1};
    if (bracket.low == bracket.high) {
        break_ties(bracket.low, inside_, missing);
        return {kept, -1};
    }
    missing = settle(missing);
    for (Open& entry : open_) {
        const KeepTopChunk& chunk = chunks_[entry.chunk];
        entry.value = philox_word(chunk.ties, chunk.begin + entry.offset);
    }
    missing = settle(missing);
    keep_first_open(missing);
    return {kept, -1};
}

int64_t Selection::count_kept() const {
    const auto count = LS_CHOSEN_KERNELS(mask_bits).count_kept;
    std::vector<int64_t> kept(chunks_.size());
    parallel_(chunks_.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) kept[c] = count(chunks_[c].mask, chunks_[c].size);
    });
    int64_t total = 0;
    for (int64_t k : kept) total += k;
    return total;
}

Bracket Selection::sample_bracket(int64_t count, int64_t kept) const {
    const int64_t samples = std::min(kSamples, size_ / kSampleShare);
    std::vector<uint32_t> keys;
    keys.reserve(samples);
    for (int64_t i = 0; i < samples; ++i) {
        const int64_t position = static_cast<int64_t>(scrambled(i) % static_cast<uint64_t>(size_));
        const int64_t c =
            std::upper_bound(starts_.begin(), starts_.end(), position) - starts_.begin() - 1;
        const int64_t offset = position - starts_[c];
        if (chunks_[c].mask[offset])
            keys.push_back(kernels_.ordered_key(chunks_[c].scores[offset]));
    }
    const int64_t n = static_cast<int64_t>(keys.size());
    if (n < kFewestSamples) return {0, kMaxValue};
    const auto ranked = [&](int64_t rank) {  // 0 = highest
        std::nth_element(keys.begin(), keys.begin() + rank, keys.end(), std::greater<>());
        return keys[rank];
    };
    const double p = static_cast<double>(count) / static_cast<double>(kept);
    const double margin = kDeviations * std::sqrt(p * (1 - p) * n) + 2;
    const int64_t first = static_cast<int64_t>(std::floor(p * n - margin));
    const int64_t last = static_cast<int64_t>(std::ceil(p * n + margin));
    return {last >= n ? 0 : ranked(last), first < 0 ? kMaxValue : ranked(first)};
}

uint32_t Selection::radix_boundary(int64_t count) const {
    constexpr int kDigits = 3;  // 3 x 11 bits hold a 32-bit key
    const int64_t chunks = static_cast<int64_t>(chunks_.size());
    uint32_t prefix = 0;
    for (int digit = kDigits - 1; digit >= 0; --digit) {
        const int shift = digit * kRadixBits;
        std::vector<uint32_t> counts(chunks * kRadixBuckets);
        parallel_(chunks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c)
                kernels_.histogram(chunks_[c], shift, prefix, &counts[c * kRadixBuckets]);
        });
        int64_t bucket = kRadixBuckets - 1;
        for (;; --bucket) {
            int64_t inside = 0;
            for (int64_t c = 0; c < chunks; ++c) inside += counts[c * kRadixBuckets + bucket];
            if (count <= inside) break;
            count -= inside;
        }
        prefix = prefix << kRadixBits | static_cast<uint32_t>(bucket);
    }
    return prefix;
}

template <class Kernel>
void Selection::pass(int64_t capacity, const Kernel& kernel) {
    const int64_t chunks = static_cast<int64_t>(chunks_.size());
    std::vector<int64_t> slot(chunks + 1);
    for (int64_t c = 0; c < chunks; ++c)
        slot[c + 1] = slot[c] + std::min(capacity, chunks_[c].size);
    // not a vector: that would write zeros to memory that is mostly never used
    const std::unique_ptr<KeepTopCandidate[]> candidates(new KeepTopCandidate[slot[chunks]]);
    std::vector<KeepTopFound> found(chunks);
    parallel_(chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c)
            found[c] = kernel(chunks_[c], candidates.get() + slot[c], slot[c + 1] - slot[c]);
    });

    above_ = inside_ = 0;
    nan_tensor_ = -1;
    stored_all_ = true;
    open_.clear();
    int64_t most = 0;
    for (int64_t c = 0; c < chunks; ++c) most += std::min(found[c].inside, slot[c + 1] - slot[c]);
    open_.reserve(most);  // growing would touch twice the fresh memory
    for (int64_t c = 0; c < chunks; ++c) {
        above_ += found[c].above;
        inside_ += found[c].inside;
        if (found[c].nan && nan_tensor_ < 0) nan_tensor_ = chunks_[c].tensor;
        const int64_t stored = std::min(found[c].inside, slot[c + 1] - slot[c]);
        stored_all_ &= stored == found[c].inside;
        for (int64_t i = 0; i < stored; ++i) {
            const KeepTopCandidate& candidate = candidates[slot[c] + i];
            open_.push_back({candidate.value, candidate.offset, c});
        }
    }
}

void Selection::split_scores(Bracket bracket, int64_t capacity) {
    pass(capacity, [&](const KeepTopChunk& chunk, KeepTopCandidate* candidates, int64_t room) {
        return kernels_.split_scores(chunk, bracket.low, bracket.high, candidates, room);
    });
}

void Selection::break_ties(uint32_t tie, int64_t tied, int64_t missing) {
    // Philox words are uniform, so the word ranked `missing` of `tied` is known within a few
    // standard deviations without looking; the second attempt, with all, is for the rare miss.
    for (const bool all : {tied <= kCapacity, true}) {
        const double p = static_cast<double>(missing) / static_cast<double>(tied);
        const double margin = kTieDeviations * std::sqrt(p * (1 - p) / tied) + 16.0 / tied;
        const double low = std::max(0.0, 1 - p - margin), high = std::min(1.0, 1 - p + margin);
        const Bracket words = {all ? 0 : static_cast<uint32_t>(low * kMaxValue),
                               all ? kMaxValue : static_cast<uint32_t>(high * kMaxValue)};
        pass(all ? kKeepTopChunk : kCapacity,
             [&](const KeepTopChunk& chunk, KeepTopCandidate* candidates, int64_t room) {
                 return kernels_.split_ties(chunk, tie, words.low, words.high, candidates, room);
             });
        if (brackets(missing) && stored_all_) break;
    }
    keep_first_open(settle(missing - above_));
}

int64_t Selection::settle(int64_t missing) {
    if (missing == 0) {
        open_.clear();
        return 0;
    }
    std::vector<uint32_t> values(open_.size());
    for (size_t i = 0; i < open_.size(); ++i) values[i] = open_[i].value;
    const auto ranked = values.begin() + (missing - 1);
    std::nth_element(values.begin(), ranked, values.end(), std::greater<>());
    const uint32_t boundary = *ranked;
    size_t equal = 0;
    for (const Open& entry : open_) {
        if (entry.value > boundary) {
            keep(entry);
            --missing;
        } else if (entry.value == boundary) {
            open_[equal++] = entry;
        }
    }
    open_.resize(equal);
    return missing;
}

void Selection::keep_first_open(int64_t missing) {
    for (int64_t i = 0; i < missing; ++i) keep(open_[i]);
}

}  // namespace

KeepTopResult keep_top(const std::vector<KeepTopTensor>& tensors, int64_t count,
                       const Parallel& parallel) {
    return Selection(tensors, parallel).run(count);
}

}  // namespace lottery_sparse
