#include "ternary_linear.h"

#include <algorithm>
#include <cstring>

#include "sparse_products.h"  // Buffer

namespace lottery_sparse {
namespace {

constexpr int64_t kTaskBlocks = 8;  // row blocks of a task: their codes stay in cache
constexpr int64_t kGrainWords = 64;
constexpr int64_t kTableRows = 2;  // rows of x whose tables are in the second-level cache together

}  // namespace

void ternary_linear(const TernaryLinear& p, const Parallel& parallel) {
    const TernaryKernels& kernels = LS_CHOSEN_KERNELS(ternary_linear);
    const int64_t words = divide_up(p.in_features, kTernaryColumns);
    const int64_t blocks = divide_up(p.out_features, kTernaryRows);
    const int64_t most = std::min(kTableRows, p.batch);
    const Buffer<float> tables = buffer<float>(most * words * kernels.table_floats);
    for (int64_t first = 0; first < p.batch; first += kTableRows) {
        const int64_t batch = std::min(kTableRows, p.batch - first);
        const float* x = p.x + first * p.in_features;
        parallel(words, kGrainWords, [&](int64_t begin, int64_t end) {
            kernels.tables(x, batch, p.in_features, begin, end, tables.get());
        });
        const TernaryTile tile = {p.codes,
                                  words,
                                  tables.get(),
                                  p.scale,
                                  p.scale_by_row,
                                  p.bias,
                                  p.y + first * p.out_features,
                                  p.out_features,
                                  batch};
        parallel(divide_up(blocks, kTaskBlocks), 1, [&](int64_t begin, int64_t end) {
            kernels.multiply(tile, begin * kTaskBlocks, std::min(end * kTaskBlocks, blocks));
        });
    }
}

void ternary_linear_int8(const TernaryLinear& p, const Parallel& parallel) {
    const TernaryKernels& kernels = LS_CHOSEN_KERNELS(ternary_linear);
    const int64_t words = divide_up(p.in_features, kTernaryColumns);
    const int64_t blocks = divide_up(p.out_features, kTernaryRows);
    const int64_t tiles = divide_up(p.batch, kTernaryBatch);
    const int64_t tile_words = 4 * words * kTernaryBatch;
    const auto width_of = [&](int64_t t) {
        int64_t width = 1;
        while (width < std::min(kTernaryBatch, p.batch - t * kTernaryBatch)) width *= 2;
        return width;
    };
    const int64_t columns = tiles * kTernaryBatch;
    const Buffer<uint32_t> x = buffer<uint32_t>(
        (std::max<int64_t>(tiles - 1, 0) * kTernaryBatch + (tiles ? width_of(tiles - 1) : 0)) * 4 *
        words);
    const Buffer<float> scale = buffer<float>(columns);
    const Buffer<int32_t> sum = buffer<int32_t>(columns);
    parallel(columns, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t t = b / kTernaryBatch, m = b % kTernaryBatch, width = width_of(t);
            if (m < width)
                kernels.quantise(b < p.batch ? p.x + b * p.in_features : nullptr, p.in_features,
                                 words, width, x.get() + t * tile_words + m, scale.get() + b,
                                 sum.get() + b);
        }
    });
    parallel(divide_up(blocks, kTaskBlocks), 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t b = t * kTernaryBatch;
                const TernaryTile8 tile = {p.codes,
                                           words,
                                           x.get() + t * tile_words,
                                           scale.get() + b,
                                           sum.get() + b,
                                           p.scale,
                                           p.scale_by_row,
                                           p.bias,
                                           p.y + b * p.out_features,
                                           p.out_features,
                                           std::min(kTernaryBatch, p.batch - b),
                                           width_of(t)};
                kernels.multiply_int8(tile, task * kTaskBlocks,
                                      std::min((task + 1) * kTaskBlocks, blocks));
            }
    });
}

void ternary_unpack(const uint32_t* codes, int64_t in_features, int64_t begin, int64_t end,
                    float* t) {
    const int64_t words = divide_up(in_features, kTernaryColumns);
    for (int64_t r = begin; r < end; ++r) {
        const uint32_t* block = codes + r / kTernaryRows * words * kTernaryRows + r % kTernaryRows;
        float* row = t + r * in_features;
        for (int64_t k = 0; k < in_features; ++k) {
            const int64_t j = k % kTernaryColumns;
            const uint32_t word = block[k / kTernaryColumns * kTernaryRows];
            row[k] = static_cast<float>(word >> (j % 4 * 8 + j / 4 * 2) & 3u) - 1.0f;
        }
    }
}

}  // namespace lottery_sparse
