// A compact layer on the CPU: the lists stay, so a call packs and multiplies.
#include <cstring>

#include "sparse_products.h"

namespace lottery_sparse {
namespace {

template <class Index>
KeptLists<Index> by_row(const SparseLinearShape& shape, const CompactLists& lists,
                        const float* values) {
    return {lists.starts, static_cast<const Index*>(lists.columns), values, shape.out_features + 1,
            lists.capacity};
}

// The values in the order of the lists by column.
template <class T>
Buffer<float> values_by_column(const SparseLinearShape& shape, const CompactLists& lists,
                               const T* values, const Parallel& parallel) {
    Buffer<float> ordered = buffer<float>(shape.replicates * lists.capacity);
    for (int64_t e = 0; e < shape.replicates; ++e) {
        const int64_t first = e * lists.capacity;
        parallel(lists.capacity, kGrainConvert, [&](int64_t begin, int64_t end) {
            for (int64_t i = first + begin; i < first + end; ++i)
                ordered[i] = number(values[first + lists.positions[i]]);
        });
    }
    return ordered;
}

template <class T>
void clear_spare_slots(const SparseLinearShape& shape, const CompactLists& lists, T* values) {
    for (int64_t e = 0; e < shape.replicates; ++e) {
        const int64_t used = lists.starts[e * (shape.out_features + 1) + shape.out_features];
        std::memset(values + e * lists.capacity + used, 0, (lists.capacity - used) * sizeof(T));
    }
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
    products.multiply(by_row<Index>(shape, p.lists, values), n, p.packed_x, shape.in_features,
                      shape.shared_x, products.floats(p.bias, shape.replicates * n, wide_bias),
                      /*sum=*/false, p.y);
}

template <class Index, class T>
void backward(const CompactLinearBackward<T>& p, const Parallel& parallel) {
    const SparseLinearShape& shape = p.shape;
    const int64_t n = shape.out_features, k = shape.in_features, capacity = p.lists.capacity;
    const Products<Index> products(shape, parallel);
    const auto dy = products.packed(p.dy, shape.replicates, n);
    if (p.dx) {  // the lists by column are there, so this beats scattering at every batch
        const auto values = values_by_column(shape, p.lists, p.values, parallel);
        const KeptLists<Index> columns = {p.lists.column_starts,
                                          static_cast<const Index*>(p.lists.rows), values.get(),
                                          k + 1, capacity};
        products.multiply(columns, k, dy.get(), n, /*shared=*/false, /*bias=*/nullptr,
                          /*sum=*/shape.shared_x, p.dx);
    }
    if (p.dvalues) {
        const auto rows = by_row<Index>(shape, p.lists, /*values=*/nullptr);
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
}

// Calls f(dense entry, value) for every kept entry, rows in parallel.
template <class Index, class T, class F>
void for_kept(const KeptEntries<T>& p, const Parallel& parallel, const F& f) {
    constexpr int64_t kGrain = 64;
    const int64_t n = p.shape.out_features, k = p.shape.in_features;
    const Index* columns = static_cast<const Index*>(p.lists.columns);
    parallel(p.shape.replicates * n, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t e = row / n, r = row % n, slots = e * p.lists.capacity;
            const int64_t* starts = p.lists.starts + e * (n + 1) + r;
            for (int64_t i = slots + starts[0]; i < slots + starts[1]; ++i)
                f(p.dense[row * k + static_cast<int64_t>(columns[i])], p.values[i]);
        }
    });
}

template <class T, class F>
void for_kept(const KeptEntries<T>& p, const Parallel& parallel, const F& f) {
    p.lists.wide ? for_kept<uint32_t>(p, parallel, f) : for_kept<uint16_t>(p, parallel, f);
}

template <class T>
void gather(const KeptEntries<T>& p, const Parallel& parallel) {
    for_kept(p, parallel, [](const T& dense, T& value) { value = dense; });
    clear_spare_slots(p.shape, p.lists, p.values);
}

template <class T>
void scatter(const KeptEntries<T>& p, const Parallel& parallel) {
    for_kept(p, parallel, [](T& dense, const T& value) { dense = value; });
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
