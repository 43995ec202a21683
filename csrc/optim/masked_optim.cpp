// The steps on the CPU: parts are cut into chunks, and a chunk's values are scattered while they
// are in the cache.
#include "optim/masked_optim.h"

#include <algorithm>

namespace lottery_sparse {
namespace {

constexpr int64_t kChunk = 1 << 13;
// Below this many elements waking a second thread costs more than it gives.
constexpr int64_t kSerial = 1 << 15;

struct Chunk {
    const StepPart* part;
    int64_t begin, end;
};

// Copies slots [begin, end) of `values` to their places.
template <class Index>
void scatter(const ScatterTarget& target, const float* values, int64_t begin, int64_t end) {
    const Index* columns = static_cast<const Index*>(target.columns);
    const int64_t* starts = target.starts;
    int64_t row = std::upper_bound(starts, starts + target.rows + 1, begin) - starts - 1;
    for (int64_t i = begin; i < end; ++row) {
        float* dense = target.dense + row * target.columns_count;
        for (const int64_t last = std::min(end, starts[row + 1]); i < last; ++i)
            dense[columns[i]] = values[i];
    }
}

template <class Rates, class Kernel>
void step(const Rates& rates, Kernel kernel, const std::vector<StepPart>& parts,
          const std::vector<ScatterTarget>& targets, const Parallel& parallel) {
    std::vector<Chunk> chunks;
    int64_t elements = 0;
    for (const StepPart& part : parts) {
        elements += part.size;
        for (int64_t begin = 0; begin < part.size; begin += kChunk)
            chunks.push_back({&part, begin, std::min(begin + kChunk, part.size)});
    }
    const int64_t count = static_cast<int64_t>(chunks.size());
    parallel(count, elements < kSerial ? count : 1, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) {
            const auto [part, begin, end] = chunks[c];
            kernel(rates, *part, begin, end);
            for (int64_t t = part->first_target; t < part->last_target; ++t) {
                const ScatterTarget& target = targets[t];
                const int64_t used = std::min(end, target.starts[target.rows]);
                if (target.wide)
                    scatter<uint32_t>(target, part->value, begin, used);
                else
                    scatter<uint16_t>(target, part->value, begin, used);
            }
        }
    });
}

}  // namespace

void sgd_step(const SgdRates& rates, const std::vector<StepPart>& parts,
              const std::vector<ScatterTarget>& targets, const Parallel& parallel) {
    step(rates, LS_CHOSEN_KERNELS(masked_optim).sgd, parts, targets, parallel);
}

void adam_step(const AdamRates& rates, const std::vector<StepPart>& parts,
               const std::vector<ScatterTarget>& targets, const Parallel& parallel) {
    step(rates, LS_CHOSEN_KERNELS(masked_optim).adam, parts, targets, parallel);
}

}  // namespace lottery_sparse
