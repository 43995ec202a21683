#include "packed/ternary_linear.h"

#include <algorithm>

#include "linear/sparse_products.h"  // Buffer

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

namespace {

// Tiles of up to kTernaryBatch rows of x, each with a width that kernels have.
struct Tiles {
    explicit Tiles(int64_t batch) : batch(batch), count(divide_up(batch, kTernaryBatch)) {}
    int64_t width(int64_t t) const {
        int64_t width = 1;
        while (width < rows(t)) width *= 2;
        return width;
    }
    int64_t rows(int64_t t) const { return std::min(kTernaryBatch, batch - t * kTernaryBatch); }
    int64_t columns() const { return count ? (count - 1) * kTernaryBatch + width(count - 1) : 0; }

    const int64_t batch;
    const int64_t count;
};

// pack(row of x or nullptr, width, its column of a tile, its number) makes the tiles, `parts` words
// of each word of codes; multiply(tile, first block, end) takes them.
template <class Pack, class Multiply>
void multiply_tiles(const TernaryLinear& p, int64_t parts, const Pack& pack, const float* scale,
                    const int32_t* sum, const Multiply& multiply, const Parallel& parallel) {
    const Tiles tiles(p.batch);
    const int64_t words = divide_up(p.in_features, kTernaryColumns);
    const int64_t blocks = divide_up(p.out_features, kTernaryRows);
    const int64_t tile_words = parts * words * kTernaryBatch;
    const Buffer<uint32_t> x = buffer<uint32_t>(tiles.columns() * parts * words);
    parallel(tiles.columns(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t t = b / kTernaryBatch, m = b % kTernaryBatch;
            pack(b, words, tiles.width(t), x.get() + t * tile_words + m);
        }
    });
    parallel(divide_up(blocks, kTaskBlocks), 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
            for (int64_t t = 0; t < tiles.count; ++t) {
                const int64_t b = t * kTernaryBatch;
                const TernaryTileX tile = {p.codes,
                                           words,
                                           x.get() + t * tile_words,
                                           scale ? scale + b : nullptr,
                                           sum ? sum + b : nullptr,
                                           p.scale,
                                           p.scale_by_row,
                                           p.bias,
                                           p.y + b * p.out_features,
                                           p.out_features,
                                           tiles.rows(t),
                                           tiles.width(t)};
                multiply(tile, task * kTaskBlocks, std::min((task + 1) * kTaskBlocks, blocks));
            }
    });
}

}  // namespace

void ternary_linear_int8(const TernaryLinear& p, const Parallel& parallel) {
    const TernaryTileKernels& kernels = LS_CHOSEN_KERNELS(ternary_tiles);
    const int64_t columns = Tiles(p.batch).columns();
    const Buffer<float> scale = buffer<float>(columns);
    const Buffer<int32_t> sum = buffer<int32_t>(columns);
    const auto pack = [&](int64_t b, int64_t words, int64_t width, uint32_t* column) {
        kernels.quantise(b < p.batch ? p.x + b * p.in_features : nullptr, p.in_features, words,
                         width, column, scale.get() + b, sum.get() + b);
    };
    multiply_tiles(p, 4, pack, scale.get(), sum.get(), kernels.multiply_int8, parallel);
}

void ternary_linear_half(const TernaryLinear& p, const uint16_t* x, const Parallel& parallel) {
    const TernaryTileKernels& kernels = LS_CHOSEN_KERNELS(ternary_tiles);
    const auto pack = [&](int64_t b, int64_t words, int64_t width, uint32_t* column) {
        kernels.pack_half(b < p.batch ? x + b * p.in_features : nullptr, p.in_features, words,
                          width, column);
    };
    multiply_tiles(p, 8, pack, nullptr, nullptr, kernels.multiply_half, parallel);
}

bool ternary_half_runs() {
#if LS_X86_VARIANTS
    static const bool runs = __builtin_cpu_supports("avx512bf16");
    return runs && LS_CHOSEN_KERNELS(ternary_tiles).multiply_half;
#else
    return false;
#endif
}

}  // namespace lottery_sparse
