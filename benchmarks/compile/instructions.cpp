// Fixed problems for the kernels of one instruction set; the others are in instructions_*.cpp.
// Prints one line per problem: kernel, units of work. Compiled and run by instructions.py.
#include "instructions.h"

#include "masks/keep_top.h"
#include "masks/mask_bits.h"
#include "masks/random_fill.h"
#include "optim/masked_optim.h"

namespace lottery_sparse {
namespace {

constexpr int64_t kRows = 256, kColumns = 784, kTiles = 2;
constexpr int64_t kScores = 1 << 16;

// Kept weights of a [kRows, kColumns] matrix, `percent` of all.
void sparse_linear(uint32_t percent, const char* const names[4]) {
    const auto& kernels = LS_KERNELS(sparse_linear_16);
    const std::vector<float> weight = draws(kRows * kColumns);
    const std::vector<uint8_t> mask = mask_of(kRows * kColumns, percent);
    const std::vector<float> x = draws(kTiles * kColumns * kTileBatch);
    const std::vector<float> dy = draws(kTiles * kRows * kTileBatch);
    std::vector<int64_t> starts(kRows + 1);
    for (int64_t r = 0; r < kRows; ++r) {
        starts[r + 1] = starts[r];
        for (int64_t c = 0; c < kColumns; ++c) starts[r + 1] += mask[r * kColumns + c];
    }
    const int64_t kept = starts[kRows];
    std::vector<uint16_t> columns(kept);
    std::vector<float> values(kept), y(kTileBatch * kRows), dx(kTileBatch * kColumns);
    std::vector<float> sums(kColumns * kTileBatch), dvalues(kept);

    begin();
    kernels.list_rows(mask.data(), weight.data(), kColumns, 0, kRows, starts.data(), columns.data(),
                      values.data());
    END(names[0], kRows * kColumns);

    const KeptRows<uint16_t> rows = {starts.data(), columns.data(), values.data()};
    begin();
    kernels.multiply({rows, x.data(), nullptr, y.data(), kRows, kTileBatch, false}, 0, kRows);
    END(names[1], kept * kTileBatch);

    begin();
    kernels.scatter(
        {rows, kRows, 0, kColumns, dy.data(), sums.data(), dx.data(), kColumns, kTileBatch, false});
    END(names[2], kept * kTileBatch);

    begin();
    kernels.sample(
        {rows, dy.data(), x.data(), nullptr, dvalues.data(), kTiles, kColumns, kRows, false}, 0,
        kRows);
    END(names[3], kept * kTileBatch * kTiles);
}

void pack_tile() {
    const std::vector<float> x = draws(kTileBatch * kColumns);
    std::vector<float> tile(kTileBatch * kColumns);
    begin();
    LS_KERNELS(sparse_linear_16).pack_tile(x.data(), kTileBatch, kColumns, tile.data());
    END("sparse_linear.pack_tile", kTileBatch * kColumns);
}

void keep_top() {
    const auto& kernels = LS_KERNELS(keep_top_kernels);
    const std::vector<float> scores = draws(kScores);
    const std::vector<uint8_t> mask(kScores, 1);
    std::vector<uint8_t> out(kScores);
    std::vector<KeepTopCandidate> candidates(kScores / 16);
    std::vector<uint32_t> counts(kRadixBuckets);
    const KeepTopChunk chunk = {scores.data(), mask.data(), out.data(), 0, kScores, {1, 2, 3}, 0};
    const uint32_t low = kernels.ordered_key(0.59f), high = kernels.ordered_key(0.61f);
    const int64_t capacity = static_cast<int64_t>(candidates.size());

    begin();
    kernels.split_scores(chunk, low, high, candidates.data(), capacity);
    END("keep_top.split_scores", kScores);
    begin();
    kernels.split_ties(chunk, low, 0x7F000000u, 0x81000000u, candidates.data(), capacity);
    END("keep_top.split_ties", kScores);
    begin();
    kernels.histogram(chunk, 32 - kRadixBits, 0, counts.data());
    END("keep_top.histogram", kScores);
}

void mask_bits() {
    const auto& kernels = LS_KERNELS(mask_bits);
    constexpr int64_t kWide = 1024, kBits = kRows * kWide;
    const std::vector<uint8_t> mask = mask_of(kBits, 10);
    std::vector<uint32_t> bits(kBits / 32);
    std::vector<uint8_t> back(kBits);
    begin();
    int64_t kept = kernels.count_kept(mask.data(), kBits);
    END("mask_bits.count_kept", kBits);
    begin();
    kernels.pack_rows(mask.data(), kWide, bits.data(), 0, kRows);
    END("mask_bits.pack_rows", kBits);
    begin();
    kernels.unpack_rows(bits.data(), kWide, back.data(), 0, kRows);
    END("mask_bits.unpack_rows", kBits);
    if (back != mask || kept == 0) std::puts("wrong: bits differ");
}

void random_fill() {
    std::vector<float> out(kScores);
    begin();
    LS_KERNELS(random_fill).uniform({1, 2, 3}, 0, kScores, out.data());
    END("random_fill.uniform", kScores);
}

void adam() {
    std::vector<float> value = draws(kScores), first = draws(kScores), second(kScores, 0.5f);
    const std::vector<float> grad = draws(kScores);
    StepPart part = {};
    part.value = value.data();
    part.grad = grad.data();
    part.state[0] = first.data();
    part.state[1] = second.data();
    part.size = kScores;
    part.step_size = -1e-3f;
    part.second_scale = 1.0f;
    AdamRates rates = {};
    rates.first_weight = 0.1f;
    rates.beta2 = 0.999f;
    rates.second_weight = 1e-3f;
    rates.eps = 1e-8f;
    rates.shrink = 1.0f;
    begin();
    LS_KERNELS(masked_optim).adam(rates, part, 0, kScores);
    END("masked_optim.adam", kScores);
}

}  // namespace
}  // namespace lottery_sparse

int main() {
    using namespace lottery_sparse;
    static const char* const at_10[4] = {"sparse_linear.list_rows 10%",
                                         "sparse_linear.multiply 10%", "sparse_linear.scatter 10%",
                                         "sparse_linear.sample 10%"};
    static const char* const at_2[4] = {"sparse_linear.list_rows 2%", "sparse_linear.multiply 2%",
                                        "sparse_linear.scatter 2%", "sparse_linear.sample 2%"};
    sparse_linear(10, at_10);
    sparse_linear(2, at_2);
    pack_tile();
    keep_top();
    mask_bits();
    random_fill();
    adam();
    count_convolutions();
    count_packed();
    count_steps();
}
