// The order of work of sparse_linear: list, pack, multiply. Kernels in sparse_linear_cpu.cpp.
#include "sparse_linear.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "mask_bits.h"

namespace lottery_sparse {
namespace {

constexpr int64_t kTaskRows = 4 * kRowBlock;  // rows of one multiply task
constexpr int64_t kLineBytes = 64;
constexpr int64_t kGrainColumns = 256;
// Up to this many tiles, listing the kept weights by column for dx costs more than it saves.
constexpr int64_t kScatterTiles = 2;
// A group of x tiles that sample() sweeps again for every row should stay in the second-level
// cache.
constexpr int64_t kSampleBytes = 512 << 10;

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Uninitialised, on a cache line.
template <class T>
Buffer<T> buffer(int64_t count) {
    const int64_t bytes = (count * sizeof(T) + kLineBytes - 1) / kLineBytes * kLineBytes;
    void* p = std::aligned_alloc(kLineBytes, std::max(bytes, kLineBytes));
    if (!p) throw std::bad_alloc();
    return Buffer<T>(static_cast<T*>(p));
}

int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

const SparseLinearKernels<uint16_t>& chosen_kernels(uint16_t) {
    return LS_CHOSEN_KERNELS(sparse_linear_16);
}
const SparseLinearKernels<uint32_t>& chosen_kernels(uint32_t) {
    return LS_CHOSEN_KERNELS(sparse_linear_32);
}

template <class Index>
struct KeptLists {
    std::vector<int64_t> starts;  // [rows + 1]
    Buffer<Index> columns;
    Buffer<float> values;

    void allocate() {
        columns = buffer<Index>(starts.back());
        values = buffer<float>(starts.back());
    }
    // The lists from row `first` on.
    KeptRows<Index> from(int64_t first) const {
        return {starts.data() + first, columns.get(), values.get()};
    }
};

void counts_to_starts(std::vector<int64_t>& counts_after_zero) {
    for (size_t r = 1; r < counts_after_zero.size(); ++r)
        counts_after_zero[r] += counts_after_zero[r - 1];
}

template <class Index>
class SparseLinear {
  public:
    SparseLinear(const SparseLinearShape& shape, const Parallel& parallel)
        : shape_(shape), tiles_(divide_up(shape.batch, kTileBatch)), parallel_(parallel) {}

    void forward(const SparseLinearForward& p) const;
    void backward(const SparseLinearBackward& p) const;

  private:
    KeptLists<Index> list_by_row(const uint8_t* mask, const float* weight) const;
    KeptLists<Index> list_by_column(const KeptLists<Index>& rows) const;
    // source [count, B, features] -> tiles [count, tiles_, features, kTileBatch]
    Buffer<float> pack(const float* source, int64_t count, int64_t features) const;
    // out [E, B, rows], or with `sum` [B, rows] summed over replicates, from tiles of `columns`
    // features, [E or (shared) 1, tiles_, columns, kTileBatch].
    void multiply(const KeptLists<Index>& lists, int64_t rows, const float* tiles, int64_t columns,
                  bool shared, const float* bias, bool sum, float* out) const;
    // dx from tiles of dy, without lists by column.
    void scatter(const KeptLists<Index>& lists, const float* dy, float* dx) const;
    void sample(const KeptLists<Index>& lists, const float* dy, const float* x, float* dw) const;

    const SparseLinearShape shape_;
    const int64_t tiles_;
    const Parallel& parallel_;
    const SparseLinearKernels<Index>& kernels_ = chosen_kernels(Index{});
};

template <class Index>
KeptLists<Index> SparseLinear<Index>::list_by_row(const uint8_t* mask, const float* weight) const {
    const int64_t rows = shape_.replicates * shape_.out_features, columns = shape_.in_features;
    const auto count = LS_CHOSEN_KERNELS(mask_bits).count_kept;
    KeptLists<Index> lists;
    lists.starts.resize(rows + 1);
    parallel_(rows, kTaskRows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            lists.starts[r + 1] = count(mask + r * columns, columns);
    });
    counts_to_starts(lists.starts);
    lists.allocate();
    parallel_(rows, kTaskRows, [&](int64_t begin, int64_t end) {
        kernels_.list_rows(mask, weight, columns, begin, end, lists.starts.data(),
                           lists.columns.get(), lists.values.get());
    });
    return lists;
}

template <class Index>
KeptLists<Index> SparseLinear<Index>::list_by_column(const KeptLists<Index>& rows) const {
    const int64_t n = shape_.out_features, k = shape_.in_features, replicates = shape_.replicates;
    // Calls f(global column, row, position in `rows`) for the kept entries whose global column
    // e k + column is in [begin, end), rows ascending within a replicate.
    const auto for_columns = [&](int64_t begin, int64_t end, const auto& f) {
        for (int64_t e = begin / k; e * k < end; ++e) {
            const int64_t first = std::max<int64_t>(begin - e * k, 0);
            const int64_t last = std::min(end - e * k, k);
            for (int64_t r = 0; r < n; ++r) {
                int64_t i = rows.starts[e * n + r];
                const int64_t row_end = rows.starts[e * n + r + 1];
                if (first > 0)
                    i = std::lower_bound(rows.columns.get() + i, rows.columns.get() + row_end,
                                         static_cast<Index>(first)) -
                        rows.columns.get();
                for (; i < row_end && static_cast<int64_t>(rows.columns[i]) < last; ++i)
                    f(e * k + static_cast<int64_t>(rows.columns[i]), r, i);
            }
        }
    };
    KeptLists<Index> lists;
    lists.starts.resize(replicates * k + 1);
    parallel_(replicates * k, kGrainColumns, [&](int64_t begin, int64_t end) {
        for_columns(begin, end, [&](int64_t c, int64_t, int64_t) { ++lists.starts[c + 1]; });
    });
    counts_to_starts(lists.starts);
    lists.allocate();
    std::vector<int64_t> next(lists.starts.begin(), lists.starts.end() - 1);
    parallel_(replicates * k, kGrainColumns, [&](int64_t begin, int64_t end) {
        for_columns(begin, end, [&](int64_t c, int64_t r, int64_t i) {
            const int64_t at = next[c]++;
            lists.columns[at] = static_cast<Index>(r);
            lists.values[at] = rows.values[i];
        });
    });
    return lists;
}

template <class Index>
Buffer<float> SparseLinear<Index>::pack(const float* source, int64_t count,
                                        int64_t features) const {
    Buffer<float> tiles = buffer<float>(count * tiles_ * features * kTileBatch);
    parallel_(count * tiles_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t e = i / tiles_, b = i % tiles_ * kTileBatch;
            kernels_.pack_tile(source + (e * shape_.batch + b) * features,
                               std::min(kTileBatch, shape_.batch - b), features,
                               tiles.get() + i * features * kTileBatch);
        }
    });
    return tiles;
}

template <class Index>
void SparseLinear<Index>::multiply(const KeptLists<Index>& lists, int64_t rows, const float* tiles,
                                   int64_t columns, bool shared, const float* bias, bool sum,
                                   float* out) const {
    const int64_t outputs = sum ? 1 : shape_.replicates;
    const int64_t blocks = divide_up(rows, kTaskRows);
    parallel_(outputs * tiles_ * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % blocks * kTaskRows;
            const int64_t t = task / blocks % tiles_, output = task / blocks / tiles_;
            const int64_t b = t * kTileBatch;
            for (int64_t e = output; e < (sum ? shape_.replicates : output + 1); ++e) {
                const TileProduct<Index> product = {
                    lists.from(e * rows),
                    tiles + ((shared ? 0 : e) * tiles_ + t) * columns * kTileBatch,
                    bias ? bias + e * rows : nullptr,
                    out + (output * shape_.batch + b) * rows,
                    rows,
                    std::min(kTileBatch, shape_.batch - b),
                    e > output,
                };
                kernels_.multiply(product, first, std::min(first + kTaskRows, rows));
            }
        }
    });
}

template <class Index>
void SparseLinear<Index>::scatter(const KeptLists<Index>& lists, const float* dy, float* dx) const {
    const int64_t n = shape_.out_features, k = shape_.in_features;
    const int64_t outputs = shape_.shared_x ? 1 : shape_.replicates;
    const Buffer<float> sums = buffer<float>(outputs * tiles_ * k * kTileBatch);
    // a part is a range of columns of one tile; how columns are split changes no sum
    parallel_(outputs * tiles_ * k, kGrainColumns, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin / k; task * k < end; ++task) {
            const int64_t t = task % tiles_, output = task / tiles_, b = t * kTileBatch;
            const int64_t first = std::max<int64_t>(begin - task * k, 0);
            for (int64_t e = output; e < (shape_.shared_x ? shape_.replicates : output + 1); ++e)
                kernels_.scatter({
                    lists.from(e * n),
                    n,
                    first,
                    std::min(end - task * k, k),
                    dy + (e * tiles_ + t) * n * kTileBatch,
                    sums.get() + (task * k + first) * kTileBatch,
                    dx + (output * shape_.batch + b) * k + first,
                    k,
                    std::min(kTileBatch, shape_.batch - b),
                    e > output,
                });
        }
    });
}

template <class Index>
void SparseLinear<Index>::sample(const KeptLists<Index>& lists, const float* dy, const float* x,
                                 float* dw) const {
    const int64_t n = shape_.out_features, k = shape_.in_features;
    const int64_t tile_bytes = k * kTileBatch * static_cast<int64_t>(sizeof(float));
    const int64_t group = std::max<int64_t>(1, kSampleBytes / std::max<int64_t>(tile_bytes, 1));
    parallel_(shape_.replicates * n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin / n; e * n < end; ++e) {
            const int64_t first = std::max<int64_t>(begin - e * n, 0);
            const int64_t last = std::min(end - e * n, n);
            int64_t t = 0;
            do {  // at least once: an empty batch has a gradient of zeros
                const SampledProduct<Index> product = {
                    lists.from(e * n),
                    dy + (e * tiles_ + t) * n * kTileBatch,
                    x + ((shape_.shared_x ? 0 : e) * tiles_ + t) * k * kTileBatch,
                    dw + e * n * k,
                    std::min(group, tiles_ - t),
                    k,
                    n,
                    t > 0,
                };
                kernels_.sample(product, first, last);
                t += group;
            } while (t < tiles_);
        }
    });
}

template <class Index>
void SparseLinear<Index>::forward(const SparseLinearForward& p) const {
    const auto lists = list_by_row(p.mask, p.weight);
    const auto x = pack(p.x, shape_.shared_x ? 1 : shape_.replicates, shape_.in_features);
    multiply(lists, shape_.out_features, x.get(), shape_.in_features, shape_.shared_x, p.bias,
             /*sum=*/false, p.y);
}

template <class Index>
void SparseLinear<Index>::backward(const SparseLinearBackward& p) const {
    const auto lists = list_by_row(p.mask, p.weight);
    const auto dy = pack(p.dy, shape_.replicates, shape_.out_features);
    if (p.dx && tiles_ <= kScatterTiles)
        scatter(lists, dy.get(), p.dx);
    else if (p.dx)
        multiply(list_by_column(lists), shape_.in_features, dy.get(), shape_.out_features,
                 /*shared=*/false, /*bias=*/nullptr, /*sum=*/shape_.shared_x, p.dx);
    if (p.dw) {
        const auto x = pack(p.x, shape_.shared_x ? 1 : shape_.replicates, shape_.in_features);
        sample(lists, dy.get(), x.get(), p.dw);
    }
}

// Calls f with an index type that holds every row and column number.
template <class F>
void with_index(const SparseLinearShape& shape, const F& f) {
    constexpr int64_t kNarrow = int64_t{std::numeric_limits<uint16_t>::max()} + 1;
    if (std::max(shape.in_features, shape.out_features) <= kNarrow)
        f(uint16_t{});
    else
        f(uint32_t{});
}

}  // namespace

void sparse_linear_forward(const SparseLinearForward& p, const Parallel& parallel) {
    with_index(p.shape,
               [&](auto index) { SparseLinear<decltype(index)>(p.shape, parallel).forward(p); });
}

void sparse_linear_backward(const SparseLinearBackward& p, const Parallel& parallel) {
    with_index(p.shape,
               [&](auto index) { SparseLinear<decltype(index)>(p.shape, parallel).backward(p); });
}

}  // namespace lottery_sparse
