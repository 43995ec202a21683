// masked_linear on the CPU: list the kept weights of this call, pack, multiply.
#include <algorithm>
#include <cstring>
#include <vector>

#include "linear/sparse_products.h"
#include "masks/mask_bits.h"

namespace lottery_sparse {
namespace {

template <class Index>
struct ListedRows {
    std::vector<int64_t> starts;  // [rows + 1]
    Buffer<Index> columns;
    Buffer<float> values;

    void allocate() {
        columns = buffer<Index>(starts.back());
        values = buffer<float>(starts.back());
    }
    // One run of lists over all matrices, each of `rows` rows.
    KeptLists<Index> view(int64_t rows) const {
        return {starts.data(), columns.get(), values.get(), rows, 0, nullptr, nullptr, nullptr};
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
        : shape_(shape), parallel_(parallel), products_(shape, parallel) {}

    template <class T>
    void forward(const SparseLinearForward<T>& p) const;
    template <class T>
    void backward(const SparseLinearBackward<T>& p) const;

  private:
    template <class T>
    ListedRows<Index> list_by_row(const uint8_t* mask, const T* weight) const;
    ListedRows<Index> list_by_column(const ListedRows<Index>& rows) const;
    void spread(const ListedRows<Index>& rows, const float* kept, Bfloat16* dw) const;

    const SparseLinearShape shape_;
    const Parallel& parallel_;
    const Products<Index> products_;
};

template <class Index>
template <class T>
ListedRows<Index> SparseLinear<Index>::list_by_row(const uint8_t* mask, const T* weight) const {
    const int64_t rows = shape_.replicates * shape_.out_features, columns = shape_.in_features;
    const auto count = LS_CHOSEN_KERNELS(mask_bits).count_kept;
    ListedRows<Index> lists;
    lists.starts.resize(rows + 1);
    parallel_(rows, kTaskRows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            lists.starts[r + 1] = count(mask + r * columns, columns);
    });
    counts_to_starts(lists.starts);
    lists.allocate();
    parallel_(rows, kTaskRows, [&](int64_t begin, int64_t end) {
        products_.list_rows(mask, weight, columns, begin, end, lists.starts.data(),
                            lists.columns.get(), lists.values.get());
    });
    return lists;
}

template <class Index>
ListedRows<Index> SparseLinear<Index>::list_by_column(const ListedRows<Index>& rows) const {
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
    ListedRows<Index> lists;
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

// Rounds gradients by list position into dw [E, N, K], 0 at pruned entries.
template <class Index>
void SparseLinear<Index>::spread(const ListedRows<Index>& rows, const float* kept,
                                 Bfloat16* dw) const {
    const int64_t k = shape_.in_features;
    parallel_(shape_.replicates * shape_.out_features, kTaskRows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            std::memset(dw + r * k, 0, k * sizeof(Bfloat16));
            for (int64_t i = rows.starts[r]; i < rows.starts[r + 1]; ++i)
                dw[r * k + static_cast<int64_t>(rows.columns[i])] = rounded(kept[i]);
        }
    });
}

template <class Index>
template <class T>
void SparseLinear<Index>::forward(const SparseLinearForward<T>& p) const {
    const auto lists = list_by_row(p.mask, p.weight);
    const auto x = products_.packed(p.x, products_.x_count(), shape_.in_features);
    Buffer<float> wide;
    const float* bias = products_.floats(p.bias, shape_.replicates * shape_.out_features, wide);
    products_.multiply(lists.view(shape_.out_features), shape_.out_features, x.get(),
                       shape_.in_features, shape_.shared_x, bias, /*sum=*/false, p.y);
    if (!products_.finite(p.x, products_.x_count(), shape_.in_features))
        products_.spread_non_finite(lists.view(shape_.out_features), shape_.out_features, p.x,
                                    shape_.in_features, shape_.shared_x, /*sum=*/false, p.y);
}

template <class Index>
template <class T>
void SparseLinear<Index>::backward(const SparseLinearBackward<T>& p) const {
    const int64_t n = shape_.out_features, k = shape_.in_features;
    const auto lists = list_by_row(p.mask, p.weight);
    const auto dy = products_.packed(p.dy, shape_.replicates, n);
    if (p.dx && products_.scatters())
        products_.scatter(lists.view(n), dy.get(), p.dx);
    else if (p.dx)
        products_.multiply(list_by_column(lists).view(k), k, dy.get(), n, /*shared=*/false,
                           /*bias=*/nullptr, /*sum=*/shape_.shared_x, p.dx);
    if (p.dx && !products_.finite(p.dy, shape_.replicates, n))
        products_.spread_non_finite(list_by_column(lists).view(k), k, p.dy, n, /*shared=*/false,
                                    /*sum=*/shape_.shared_x, p.dx);
    if (p.dw) {
        const auto x = products_.packed(p.x, products_.x_count(), k);
        if constexpr (std::is_same_v<T, float>) {
            products_.sample(lists.view(n), dy.get(), x.get(), p.dw, /*kept=*/nullptr);
        } else {
            const auto kept = buffer<float>(lists.starts.back());
            products_.sample(lists.view(n), dy.get(), x.get(), /*dw=*/nullptr, kept.get());
            spread(lists, kept.get(), p.dw);
        }
    }
}

}  // namespace

template <class T>
void sparse_linear_forward(const SparseLinearForward<T>& p, const Parallel& parallel) {
    with_index(p.shape,
               [&](auto index) { SparseLinear<decltype(index)>(p.shape, parallel).forward(p); });
}
template <class T>
void sparse_linear_backward(const SparseLinearBackward<T>& p, const Parallel& parallel) {
    with_index(p.shape,
               [&](auto index) { SparseLinear<decltype(index)>(p.shape, parallel).backward(p); });
}
template void sparse_linear_forward(const SparseLinearForward<float>&, const Parallel&);
template void sparse_linear_forward(const SparseLinearForward<Bfloat16>&, const Parallel&);
template void sparse_linear_backward(const SparseLinearBackward<float>&, const Parallel&);
template void sparse_linear_backward(const SparseLinearBackward<Bfloat16>&, const Parallel&);

}  // namespace lottery_sparse
