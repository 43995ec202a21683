#include "packed/packed_linear.h"

#include <algorithm>

#include "common/bits.h"
#include "common/finite.h"
#include "linear/list_check.h"
#include "linear/sparse_products.h"  // Buffer

namespace lottery_sparse {
namespace {

constexpr int64_t kTask = 64;  // rows
constexpr int64_t kGrainPack = 512;

// Whether rows [begin, end) are lists of columns below K; says which are not.
template <class Index>
bool rows_fit(const PackedLinear& p, const Index* columns, int64_t begin, int64_t end,
              ListCheck& check) {
    return check.starts("starts", p.starts, begin, end, p.entries) &&
           check.numbers("columns", columns + p.starts[begin], p.starts[end] - p.starts[begin],
                         p.in_features);
}

// y becomes NaN where an entry that is not stored meets NaN or Inf.
template <class Index>
void spread_non_finite(const PackedLinear& p, const Index* columns, const Parallel& parallel) {
    parallel(p.batch, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const float* x = p.x + b * p.in_features;
            int64_t all = 0;
            for (int64_t k = 0; k < p.in_features; ++k) all += !is_finite(x[k]);
            for (int64_t r = 0; all > 0 && r < p.out_features; ++r) {
                int64_t met = 0;
                for (int64_t i = p.starts[r]; i < p.starts[r + 1]; ++i)
                    met += !is_finite(x[columns[i]]);
                if (met < all)
                    p.y[b * p.out_features + r] = std::numeric_limits<float>::quiet_NaN();
            }
        }
    });
}

template <class Index, class Value>
void run(const PackedLinear& p, const PackedLinearKernels<Index, Value>& kernels,
         const Parallel& parallel) {
    const int64_t width = p.batch == 1 ? 1 : p.batch <= kNarrowTile ? kNarrowTile : kWideTile;
    const Buffer<float> tile = buffer<float>(width == 1 ? 0 : p.in_features * width);
    const ListBounds bounds = {p.entries, p.in_features};
    ListCheck check;
    for (int64_t b = 0; b < p.batch; b += width) {
        const int64_t batch = std::min(width, p.batch - b);
        const float* x = p.x + b * p.in_features;
        if (width > 1)
            parallel(p.in_features, kGrainPack, [&](int64_t begin, int64_t end) {
                kernels.pack(x, batch, p.in_features, width, begin, end, tile.get());
            });
        const PackedTile<Index, Value> product = {p.starts,
                                                  static_cast<const Index*>(p.columns),
                                                  static_cast<const Value*>(p.values),
                                                  width > 1 ? tile.get() : x,
                                                  p.bias,
                                                  p.y + b * p.out_features,
                                                  p.out_features,
                                                  batch,
                                                  width,
                                                  b == 0 ? &bounds : nullptr};
        parallel(divide_up(p.out_features, kTask), 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                const int64_t first = task * kTask, last = std::min(first + kTask, p.out_features);
                if (kernels.multiply(product, first, last)) continue;
                rows_fit(p, product.columns, first, last, check);
                return;
            }
        });
        check.done();
    }
    if (!all_finite(p.x, p.batch * p.in_features))
        spread_non_finite(p, static_cast<const Index*>(p.columns), parallel);
}

// Whether the values of rows [begin, end) are there. A row takes as many as its bits say, at most
// the columns of its groups, so only rows near the end of the values must be counted.
bool rows_fit(const BitmapLinear& p, int64_t begin, int64_t end, ListCheck& check) {
    if (!check.starts("starts", p.starts, begin, end, p.entries)) return false;
    const int64_t groups = divide_up(p.in_features, kBitmapGroup),
                  words = packed_words(p.in_features);
    for (int64_t r = end - 1; r >= begin && p.starts[r] + groups * kBitmapGroup > p.entries; --r) {
        const auto* bits = reinterpret_cast<const uint16_t*>(p.bits + r * words);
        int64_t kept = 0;
        for (int64_t g = 0; g < groups; ++g) kept += __builtin_popcount(bits[g]);
        if (kept > p.entries - p.starts[r])
            return check.refuse("bits",
                                "must have as many ones in a row as starts give it entries");
    }
    return true;
}

template <class Value>
void run(const BitmapLinear& p, const BitmapLinearKernels<Value>& kernels,
         const Parallel& parallel) {
    // not a power of two: rows of x at such a distance would share few sets of the cache
    const int64_t stride = (divide_up(p.in_features, kBitmapGroup) + 1) * kBitmapGroup;
    const int64_t padded = divide_up(p.batch, kBitmapSide) * kBitmapSide;
    const Buffer<float> x = buffer<float>(padded * stride);
    std::fill_n(x.get() + p.batch * stride, (padded - p.batch) * stride, 0.0f);
    for (int64_t b = 0; b < p.batch; ++b) {
        float* row = x.get() + b * stride;
        std::copy_n(p.x + b * p.in_features, p.in_features, row);  // of no columns there is no x
        std::fill_n(row + p.in_features, stride - p.in_features, 0.0f);
    }
    ListCheck check;
    parallel(divide_up(p.out_features, kTask), 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task * kTask, last = std::min(first + kTask, p.out_features);
            if (!rows_fit(p, first, last, check)) return;
            for (int64_t b = 0; b < p.batch; b += kBitmapBatch)
                kernels.multiply({p.starts, reinterpret_cast<const uint16_t*>(p.bits),
                                  static_cast<const Value*>(p.values), x.get() + b * stride, p.bias,
                                  p.y + b * p.out_features, p.in_features, p.out_features, stride,
                                  std::min(kBitmapBatch, p.batch - b)},
                                 first, last);
        }
    });
    check.done();
}

}  // namespace

void bitmap_linear(const BitmapLinear& p, const Parallel& parallel) {
    p.half ? run(p, LS_CHOSEN_KERNELS(bitmap_linear_half), parallel)
           : run(p, LS_CHOSEN_KERNELS(bitmap_linear_float), parallel);
}

void packed_linear(const PackedLinear& p, const Parallel& parallel) {
    if (p.wide)
        p.half ? run(p, LS_CHOSEN_KERNELS(packed_linear_32_half), parallel)
               : run(p, LS_CHOSEN_KERNELS(packed_linear_32), parallel);
    else
        p.half ? run(p, LS_CHOSEN_KERNELS(packed_linear_16_half), parallel)
               : run(p, LS_CHOSEN_KERNELS(packed_linear_16), parallel);
}

}  // namespace lottery_sparse
