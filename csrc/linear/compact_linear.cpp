// A compact layer on the CPU: the lists stay, so a call packs and multiplies.
#include <algorithm>
#include <cstring>

#include "linear/sparse_products.h"

namespace lottery_sparse {
namespace {

template <class Index>
KeptLists<Index> by_row(const SparseLinearShape& shape, const CompactLists& lists,
                        const float* values, ListCheck& check) {
    return {lists.starts,   static_cast<const Index*>(lists.columns),
            values,         shape.out_features + 1,
            lists.capacity, "kept.starts",
            "kept.columns", &check};
}

bool order(const float* from, const int32_t* positions, int64_t count, int64_t slots, float* to) {
    return chosen_kernels(uint16_t{}).order(from, positions, count, slots, to);
}
bool order(const Bfloat16* from, const int32_t* positions, int64_t count, int64_t slots,
           float* to) {
    return LS_CHOSEN_KERNELS(sparse_linear_bf16).order(from, positions, count, slots, to);
}

// The values in the order of the lists by column.
template <class T>
Buffer<float> values_by_column(const SparseLinearShape& shape, const CompactLists& lists,
                               const T* values, ListCheck& check, const Parallel& parallel) {
    Buffer<float> ordered = buffer<float>(shape.replicates * lists.capacity);
    for (int64_t e = 0; e < shape.replicates; ++e) {
        const int32_t* positions = lists.positions + e * lists.capacity;
        const T* from = values + e * lists.capacity;
        float* to = ordered.get() + e * lists.capacity;
        parallel(lists.capacity, kGrainConvert, [&, from, to](int64_t begin, int64_t end) {
            if (!order(from, positions + begin, end - begin, lists.capacity, to + begin))
                check.numbers("kept.positions", positions + begin, end - begin, lists.capacity);
        });
    }
    return ordered;
}

template <class T>
void clear_spare_slots(const SparseLinearShape& shape, const CompactLists& lists, int64_t matrix,
                       T* values) {
    const int64_t used = lists.starts[matrix * (shape.out_features + 1) + shape.out_features];
    std::memset(values + matrix * lists.capacity + used, 0, (lists.capacity - used) * sizeof(T));
}

template <class T>
void clear_spare_slots(const SparseLinearShape& shape, const CompactLists& lists, T* values) {
    for (int64_t e = 0; e < shape.replicates; ++e) clear_spare_slots(shape, lists, e, values);
}

template <class Index, class T>
void forward(const CompactLinearForward<T>& p, const Parallel& parallel) {
    const SparseLinearShape& shape = p.shape;
    const int64_t n = shape.out_features;
    const Products<Index> products(shape, parallel);
    products.pack(p.x, products.x_count(), shape.in_features, p.packed_x);
    Buffer<float> wide_values, wide_bias;
    const float* values =
        products.floats(p.values, shape.replicates * p.lists.capacity, wide_values);
    ListCheck check;
    const KeptLists<Index> rows = by_row<Index>(shape, p.lists, values, check);
    products.multiply(rows, n, p.packed_x, shape.in_features, shape.shared_x,
                      products.floats(p.bias, shape.replicates * n, wide_bias), /*sum=*/false, p.y);
    check.done();
    if (!products.finite(p.x, products.x_count(), shape.in_features))
        products.spread_non_finite(rows, n, p.x, shape.in_features, shape.shared_x, /*sum=*/false,
                                   p.y);
}

template <class Index, class T>
void backward(const CompactLinearBackward<T>& p, const Parallel& parallel) {
    const SparseLinearShape& shape = p.shape;
    const int64_t n = shape.out_features, k = shape.in_features, capacity = p.lists.capacity;
    const Products<Index> products(shape, parallel);
    const auto dy = products.packed(p.dy, shape.replicates, n);
    ListCheck check;
    if (p.dx) {  // the lists by column are there, so this beats scattering at every batch
        const auto values = values_by_column(shape, p.lists, p.values, check, parallel);
        const KeptLists<Index> columns = {p.lists.column_starts,
                                          static_cast<const Index*>(p.lists.rows),
                                          values.get(),
                                          k + 1,
                                          capacity,
                                          "kept.column_starts",
                                          "kept.rows",
                                          &check};
        products.multiply(columns, k, dy.get(), n, /*shared=*/false, /*bias=*/nullptr,
                          /*sum=*/shape.shared_x, p.dx);
        check.done();
        if (!products.finite(p.dy, shape.replicates, n))
            products.spread_non_finite(columns, k, p.dy, n, /*shared=*/false,
                                       /*sum=*/shape.shared_x, p.dx);
    }
    if (p.dvalues) {
        const auto rows = by_row<Index>(shape, p.lists, /*values=*/nullptr, check);
        if constexpr (std::is_same_v<T, float>) {
            products.sample(rows, dy.get(), p.packed_x, /*dw=*/nullptr, p.dvalues);
        } else {
            const auto dvalues = buffer<float>(shape.replicates * capacity);
            products.sample(rows, dy.get(), p.packed_x, /*dw=*/nullptr, dvalues.get());
            for (int64_t e = 0; e < shape.replicates; ++e) {
                const int64_t used = p.lists.starts[e * (n + 1) + n];
                products.round(dvalues.get() + e * capacity, used, p.dvalues + e * capacity);
            }
        }
        clear_spare_slots(shape, p.lists, p.dvalues);
    }
    if (p.dbias) products.sum_batch(dy.get(), n, p.dbias);
    check.done();
}

// Calls f(dense row, columns, values, count) for the kept entries of rows [first, last) of all E N,
// in parallel; p.dense begins with row `first`.
template <class Index, class T, class F>
void for_rows(const KeptEntries<T>& p, int64_t first, int64_t last, const Parallel& parallel,
              const F& f) {
    constexpr int64_t kGrain = 64;
    const int64_t n = p.shape.out_features, k = p.shape.in_features;
    ListCheck check;
    const KeptLists<Index> lists = by_row<Index>(p.shape, p.lists, /*values=*/nullptr, check);
    parallel(last - first, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin, known = begin; i < end; ++i) {
            const int64_t e = (first + i) / n, r = (first + i) % n;
            if (i == known) {  // the rest of this range and network
                known = std::min(end, i + n - r);
                if (!lists.fit(e, r, r + known - i, k)) return;
            }
            const KeptRows<Index> rows = lists.of(e);
            const int64_t slot = rows.starts[r];
            f(p.dense + i * k, rows.columns + slot, p.values + e * p.lists.capacity + slot,
              rows.starts[r + 1] - slot);
        }
    });
    check.done();
}

template <class Index>
void gather_row(const float* row, int64_t width, const Index* columns, int64_t count,
                float* values) {
    chosen_kernels(Index{}).gather_row(row, width, columns, count, values);
}

void gather_row(const Bfloat16* row, int64_t width, const uint16_t* columns, int64_t count,
                Bfloat16* values) {
    LS_CHOSEN_KERNELS(sparse_linear_bf16).gather_row(row, width, columns, count, values);
}

void gather_row(const Bfloat16* row, int64_t, const uint32_t* columns, int64_t count,
                Bfloat16* values) {
    for (int64_t i = 0; i < count; ++i) values[i] = row[columns[i]];
}

template <class Index, class T>
void gather(const KeptEntries<T>& p, int64_t first, int64_t last, const Parallel& parallel) {
    for_rows<Index>(p, first, last, parallel,
                    [&](const T* row, const Index* columns, T* values, int64_t count) {
                        gather_row(row, p.shape.in_features, columns, count, values);
                    });
}

template <class T>
void gather(const KeptEntries<T>& p, int64_t first, int64_t last, const Parallel& parallel) {
    p.lists.wide ? gather<uint32_t>(p, first, last, parallel)
                 : gather<uint16_t>(p, first, last, parallel);
}

template <class T>
void gather(const KeptEntries<T>& p, const Parallel& parallel) {
    gather(p, 0, p.shape.replicates * p.shape.out_features, parallel);
    clear_spare_slots(p.shape, p.lists, p.values);
}

template <class Index, class T>
void scatter(const KeptEntries<T>& p, const Parallel& parallel) {
    for_rows<Index>(p, 0, p.shape.replicates * p.shape.out_features, parallel,
                    [](T* row, const Index* columns, const T* values, int64_t count) {
                        for (int64_t i = 0; i < count; ++i) row[columns[i]] = values[i];
                    });
}

template <class T>
void scatter(const KeptEntries<T>& p, const Parallel& parallel) {
    p.lists.wide ? scatter<uint32_t>(p, parallel) : scatter<uint16_t>(p, parallel);
}

template <class T>
void pack(const T* x, int64_t count, int64_t batch, int64_t features, float* tiles,
          const Parallel& parallel) {
    const SparseLinearShape shape = {count, batch, features, 0, false};
    Products<uint16_t>(shape, parallel).pack(x, count, features, tiles);
}

}  // namespace

void pack_tiles(const float* x, int64_t count, int64_t batch, int64_t features, float* tiles,
                const Parallel& parallel) {
    pack(x, count, batch, features, tiles, parallel);
}
void pack_tiles(const Bfloat16* x, int64_t count, int64_t batch, int64_t features, float* tiles,
                const Parallel& parallel) {
    pack(x, count, batch, features, tiles, parallel);
}

void gather_kept(const KeptEntries<float>& p, const Parallel& parallel) {
    gather(p, parallel);
}
void gather_kept(const KeptEntries<Bfloat16>& p, const Parallel& parallel) {
    gather(p, parallel);
}

void gather_rows(const KeptEntries<float>& p, int64_t matrix, int64_t begin, int64_t end,
                 const Parallel& parallel) {
    const int64_t n = p.shape.out_features;
    gather(p, matrix * n + begin, matrix * n + end, parallel);
    if (end == n) clear_spare_slots(p.shape, p.lists, matrix, p.values);
}

void scatter_kept(const KeptEntries<float>& p, const Parallel& parallel) {
    scatter(p, parallel);
}
void scatter_kept(const KeptEntries<Bfloat16>& p, const Parallel& parallel) {
    scatter(p, parallel);
}

void compact_linear_forward(const CompactLinearForward<float>& p, const Parallel& parallel) {
    p.lists.wide ? forward<uint32_t>(p, parallel) : forward<uint16_t>(p, parallel);
}
void compact_linear_forward(const CompactLinearForward<Bfloat16>& p, const Parallel& parallel) {
    p.lists.wide ? forward<uint32_t>(p, parallel) : forward<uint16_t>(p, parallel);
}

void compact_linear_backward(const CompactLinearBackward<float>& p, const Parallel& parallel) {
    p.lists.wide ? backward<uint32_t>(p, parallel) : backward<uint16_t>(p, parallel);
}
void compact_linear_backward(const CompactLinearBackward<Bfloat16>& p, const Parallel& parallel) {
    p.lists.wide ? backward<uint32_t>(p, parallel) : backward<uint16_t>(p, parallel);
}

}  // namespace lottery_sparse
