// The products of sparse_linear over packed tiles, in the order of work that both callers share.
// Kernels in sparse_linear_cpu.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "common/finite.h"
#include "linear/list_check.h"
#include "linear/sparse_linear.h"

namespace lottery_sparse {

constexpr int64_t kTaskRows = 4 * kRowBlock;  // rows of one multiply task
constexpr int64_t kLineBytes = 64;
constexpr int64_t kGrainColumns = 256;
// Up to this many tiles, listing the kept weights by column for dx costs more than it saves.
constexpr int64_t kScatterTiles = 2;
// A group of x tiles that sample() sweeps again for every row should stay in the second-level
// cache.
constexpr int64_t kSampleBytes = 512 << 10;
constexpr int64_t kGrainConvert = 1 << 14;
// Multiply-adds, or floats written, of a range: with fewer, waking a thread costs more than it
// gives.
constexpr int64_t kGrainWork = 1 << 17;

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

inline int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

inline const SparseLinearKernels<uint16_t>& chosen_kernels(uint16_t) {
    return LS_CHOSEN_KERNELS(sparse_linear_16);
}
inline const SparseLinearKernels<uint32_t>& chosen_kernels(uint32_t) {
    return LS_CHOSEN_KERNELS(sparse_linear_32);
}

// The kept lists of E matrices, wherever they lie.
template <class Index>
struct KeptLists {
    const int64_t* starts;
    const Index* columns;
    const float* values;
    int64_t starts_stride;  // from a matrix to the next one in `starts`
    int64_t slots;          // the same in `columns` and `values`
    const char *starts_name, *columns_name;
    ListCheck* check;  // or nullptr: this call has made the lists

    // What kernels check: nothing of lists that this call has made.
    const ListBounds* checked(const ListBounds& bounds) const { return check ? &bounds : nullptr; }
    // Whether rows [begin, end) of a matrix are lists of columns below `bound`; says which are not.
    bool fit(int64_t matrix, int64_t begin, int64_t end, int64_t bound) const {
        if (!check) return true;
        const KeptRows<Index> rows = of(matrix);
        return check->starts(starts_name, rows.starts, begin, end, slots) &&
               check->numbers(columns_name, rows.columns + rows.starts[begin],
                              rows.starts[end] - rows.starts[begin], bound);
    }
    KeptRows<Index> of(int64_t matrix) const {
        return {starts + matrix * starts_stride, columns + matrix * slots, values + matrix * slots};
    }
};

template <class Index>
class Products {
  public:
    Products(const SparseLinearShape& shape, const Parallel& parallel)
        : shape_(shape), tiles_(divide_up(shape.batch, kTileBatch)), parallel_(parallel) {}

    int64_t x_count() const { return shape_.shared_x ? 1 : shape_.replicates; }

    // source [count, B, features] -> tiles [count, tiles, features, kTileBatch]
    template <class T>
    void pack(const T* source, int64_t count, int64_t features, float* tiles) const;
    template <class T>
    Buffer<float> packed(const T* source, int64_t count, int64_t features) const {
        Buffer<float> tiles = buffer<float>(count * tiles_ * features * kTileBatch);
        pack(source, count, features, tiles.get());
        return tiles;
    }
    // out [E, B, rows], or with `sum` [B, rows] summed over replicates, from tiles of `columns`
    // features, [E or (shared) 1, tiles, columns, kTileBatch].
    template <class T>
    void multiply(const KeptLists<Index>& lists, int64_t rows, const float* tiles, int64_t columns,
                  bool shared, const float* bias, bool sum, T* out) const;
    // dx from tiles of dy, without lists by column.
    template <class T>
    void scatter(const KeptLists<Index>& lists, const float* dy, T* dx) const;
    // Up to this many tiles, scatter beats multiply over lists by column.
    bool scatters() const { return tiles_ <= kScatterTiles; }
    // Gradients of kept weights: dense, dw [E, N, K]; or by list position, `kept` [E, slots].
    void sample(const KeptLists<Index>& lists, const float* dy, const float* x, float* dw,
                float* kept) const;
    // Whether multiply gives what the dense product does: `x` [count, B, features] is finite.
    template <class T>
    bool finite(const T* x, int64_t count, int64_t features) const;
    // After multiply from an x [E or (shared) 1, B, columns] that is not: out is NaN where a pruned
    // weight meets NaN or Inf. Other elements stay as they are.
    template <class T>
    void spread_non_finite(const KeptLists<Index>& lists, int64_t rows, const T* x, int64_t columns,
                           bool shared, bool sum, T* out) const;
    // out [E, features]: the sums over the batch of tiles [E, tiles, features, kTileBatch].
    template <class T>
    void sum_batch(const float* tiles, int64_t features, T* out) const;

    // `source` as floats: itself, or what `widened` then holds.
    const float* floats(const float* source, int64_t, Buffer<float>&) const { return source; }
    const float* floats(const Bfloat16* source, int64_t count, Buffer<float>& widened) const;
    void round(const float* source, int64_t count, Bfloat16* target) const;

    void list_rows(const uint8_t* mask, const float* weight, int64_t columns, int64_t begin,
                   int64_t end, const int64_t* starts, Index* kept_columns, float* values) const {
        kernels_.list_rows(mask, weight, columns, begin, end, starts, kept_columns, values);
    }
    void list_rows(const uint8_t* mask, const Bfloat16* weight, int64_t columns, int64_t begin,
                   int64_t end, const int64_t* starts, Index* kept_columns, float* values) const {
        if constexpr (std::is_same_v<Index, uint16_t>)
            half_.list_rows_16(mask, weight, columns, begin, end, starts, kept_columns, values);
        else
            half_.list_rows_32(mask, weight, columns, begin, end, starts, kept_columns, values);
    }

  private:
    // How many of `count` tasks make a range, if all of them make `work` of which one has `least`.
    static int64_t grain(int64_t count, int64_t work, int64_t least) {
        return work ? std::max<int64_t>(1, count * least / work) : count;
    }
    // Multiply-adds of the kept entries in `rows` rows of each network with all tiles.
    int64_t work(const KeptLists<Index>& lists, int64_t rows) const {
        int64_t entries = 0;
        for (int64_t e = 0; e < shape_.replicates; ++e) {
            const int64_t* starts = lists.of(e).starts;
            entries += starts[rows] - starts[0];
        }
        return entries * tiles_ * kTileBatch;
    }
    void pack_tile(const float* source, int64_t batch, int64_t features, float* tile) const {
        kernels_.pack_tile(source, batch, features, tile);
    }
    void pack_tile(const Bfloat16* source, int64_t batch, int64_t features, float* tile) const {
        half_.pack_tile(source, batch, features, tile);
    }
    // Of a block [batch][stride] that a kernel has written, `columns` columns to `out`.
    void round_block(const float* block, int64_t stride, int64_t batch, int64_t columns,
                     Bfloat16* out, int64_t out_stride) const {
        for (int64_t b = 0; b < batch; ++b)
            half_.round(block + b * stride, columns, out + b * out_stride);
    }

    const SparseLinearShape shape_;
    const int64_t tiles_;
    const Parallel& parallel_;
    const SparseLinearKernels<Index>& kernels_ = chosen_kernels(Index{});
    const Bfloat16Kernels& half_ = LS_CHOSEN_KERNELS(sparse_linear_bf16);
};

template <class Index>
template <class T>
void Products<Index>::pack(const T* source, int64_t count, int64_t features, float* tiles) const {
    const int64_t parts = count * tiles_, floats = parts * features * kTileBatch;
    parallel_(parts, grain(parts, floats, kGrainConvert), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t e = i / tiles_, b = i % tiles_ * kTileBatch;
            pack_tile(source + (e * shape_.batch + b) * features,
                      std::min(kTileBatch, shape_.batch - b), features,
                      tiles + i * features * kTileBatch);
        }
    });
}

template <class Index>
template <class T>
void Products<Index>::multiply(const KeptLists<Index>& lists, int64_t rows, const float* tiles,
                               int64_t columns, bool shared, const float* bias, bool sum,
                               T* out) const {
    const int64_t outputs = sum ? 1 : shape_.replicates;
    const int64_t blocks = divide_up(rows, kTaskRows);
    const int64_t tasks = outputs * tiles_ * blocks;
    const int64_t size = work(lists, rows) + outputs * shape_.batch * rows;
    const ListBounds bounds = {lists.slots, columns};
    parallel_(tasks, grain(tasks, size, kGrainWork), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % blocks * kTaskRows,
                          count = std::min(kTaskRows, rows - first);
            const int64_t t = task / blocks % tiles_, output = task / blocks / tiles_;
            const int64_t b = t * kTileBatch, batch = std::min(kTileBatch, shape_.batch - b);
            T* target = out + (output * shape_.batch + b) * rows + first;
            alignas(kLineBytes) float block[kTileBatch * kTaskRows];  // what is to be rounded
            const bool again = t > 0 && task - blocks >= begin;  // this thread has read these lists
            for (int64_t e = output; e < (sum ? shape_.replicates : output + 1); ++e) {
                TileProduct<Index> product = {
                    lists.of(e),
                    tiles + ((shared ? 0 : e) * tiles_ + t) * columns * kTileBatch,
                    bias ? bias + e * rows + first : nullptr,
                    block,
                    kTaskRows,
                    batch,
                    e > output,
                    again ? nullptr : lists.checked(bounds),
                };
                product.rows.starts += first;
                if constexpr (std::is_same_v<T, float>) {
                    product.out = target;
                    product.out_stride = rows;
                }
                if (!kernels_.multiply(product, 0, count)) {
                    lists.fit(e, first, first + count, columns);
                    return;
                }
            }
            if constexpr (!std::is_same_v<T, float>)
                round_block(block, kTaskRows, batch, count, target, rows);
        }
    });
}

template <class Index>
template <class T>
bool Products<Index>::finite(const T* x, int64_t count, int64_t features) const {
    const int64_t size = count * shape_.batch * features;
    std::atomic<bool> all{true};
    parallel_(size, kGrainConvert, [&](int64_t begin, int64_t end) {
        if (!all_finite(x + begin, end - begin)) all = false;
    });
    return all;
}

template <class Index>
template <class T>
void Products<Index>::spread_non_finite(const KeptLists<Index>& lists, int64_t rows, const T* x,
                                        int64_t columns, bool shared, bool sum, T* out) const {
    parallel_(shape_.batch, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
            for (int64_t e = 0; e < shape_.replicates; ++e) {
                const T* row = x + ((shared ? 0 : e) * shape_.batch + b) * columns;
                int64_t all = 0;  // that are not finite
                for (int64_t c = 0; c < columns; ++c) all += !is_finite(number(row[c]));
                if (all == 0) continue;
                const KeptRows<Index> kept = lists.of(e);
                T* to = out + ((sum ? 0 : e) * shape_.batch + b) * rows;
                for (int64_t r = 0; r < rows; ++r) {
                    int64_t met = 0;
                    for (int64_t i = kept.starts[r]; i < kept.starts[r + 1]; ++i)
                        met += !is_finite(number(row[kept.columns[i]]));
                    if (met < all) assign(to[r], std::numeric_limits<float>::quiet_NaN());
                }
            }
    });
}

template <class Index>
template <class T>
void Products<Index>::scatter(const KeptLists<Index>& lists, const float* dy, T* dx) const {
    constexpr bool kRounds = !std::is_same_v<T, float>;
    const int64_t n = shape_.out_features, k = shape_.in_features;
    const int64_t outputs = shape_.shared_x ? 1 : shape_.replicates;
    // seven columns of slack: they are read in blocks of eight
    const Buffer<float> sums = buffer<float>((outputs * tiles_ * k + 7) * kTileBatch);
    Buffer<float> blocks;  // what is to be rounded: [outputs, tiles, kTileBatch, K]
    if constexpr (kRounds) blocks = buffer<float>(outputs * tiles_ * k * kTileBatch);
    // a part is a range of columns of one tile; how columns are split changes no sum
    parallel_(outputs * tiles_ * k, kGrainColumns, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin / k; task * k < end; ++task) {
            const int64_t t = task % tiles_, output = task / tiles_, b = t * kTileBatch;
            const int64_t first = std::max<int64_t>(begin - task * k, 0);
            const int64_t last = std::min(end - task * k, k);
            const int64_t batch = std::min(kTileBatch, shape_.batch - b);
            T* target = dx + (output * shape_.batch + b) * k + first;
            float* out;
            if constexpr (kRounds)
                out = blocks.get() + task * k * kTileBatch + first;
            else
                out = target;
            for (int64_t e = output; e < (shape_.shared_x ? shape_.replicates : output + 1); ++e)
                kernels_.scatter({
                    lists.of(e),
                    n,
                    first,
                    last,
                    dy + (e * tiles_ + t) * n * kTileBatch,
                    sums.get() + (task * k + first) * kTileBatch,
                    out,
                    k,
                    batch,
                    e > output,
                });
            if constexpr (kRounds) round_block(out, k, batch, last - first, target, k);
        }
    });
}

template <class Index>
void Products<Index>::sample(const KeptLists<Index>& lists, const float* dy, const float* x,
                             float* dw, float* kept) const {
    const int64_t n = shape_.out_features, k = shape_.in_features;
    const int64_t tile_bytes = k * kTileBatch * static_cast<int64_t>(sizeof(float));
    const int64_t group = std::max<int64_t>(1, kSampleBytes / std::max<int64_t>(tile_bytes, 1));
    const int64_t rows = shape_.replicates * n, size = work(lists, n) + (dw ? rows * k : 0);
    const ListBounds bounds = {lists.slots, k};
    parallel_(rows, grain(rows, size, kGrainWork), [&](int64_t begin, int64_t end) {
        for (int64_t e = begin / n; e * n < end; ++e) {
            const int64_t first = std::max<int64_t>(begin - e * n, 0);
            const int64_t last = std::min(end - e * n, n);
            int64_t t = 0;
            do {  // at least once: an empty batch has a gradient of zeros
                const SampledProduct<Index> product = {
                    lists.of(e),
                    dy + (e * tiles_ + t) * n * kTileBatch,
                    x + ((shape_.shared_x ? 0 : e) * tiles_ + t) * k * kTileBatch,
                    dw ? dw + e * n * k : nullptr,
                    kept ? kept + e * lists.slots : nullptr,
                    std::min(group, tiles_ - t),
                    k,
                    n,
                    t > 0,
                    t > 0 ? nullptr : lists.checked(bounds),
                };
                if (!kernels_.sample(product, first, last)) {
                    lists.fit(e, first, last, k);
                    return;
                }
                t += group;
            } while (t < tiles_);
        }
    });
}

template <class Index>
template <class T>
void Products<Index>::sum_batch(const float* tiles, int64_t features, T* out) const {
    const int64_t rows = shape_.replicates * features, floats = rows * tiles_ * kTileBatch;
    parallel_(rows, grain(rows, floats, kGrainConvert), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t e = i / features, f = i % features;
            assign(out[i], kernels_.sum_row(tiles + (e * tiles_ * features + f) * kTileBatch,
                                            tiles_, features * kTileBatch));
        }
    });
}

template <class Index>
const float* Products<Index>::floats(const Bfloat16* source, int64_t count,
                                     Buffer<float>& widened) const {
    if (!source) return nullptr;
    widened = buffer<float>(count);
    parallel_(count, kGrainConvert, [&](int64_t begin, int64_t end) {
        half_.widen(source + begin, end - begin, widened.get() + begin);
    });
    return widened.get();
}

template <class Index>
void Products<Index>::round(const float* source, int64_t count, Bfloat16* target) const {
    parallel_(count, kGrainConvert, [&](int64_t begin, int64_t end) {
        half_.round(source + begin, end - begin, target + begin);
    });
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

}  // namespace lottery_sparse
