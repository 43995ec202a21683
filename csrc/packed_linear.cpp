#include "packed_linear.h"

#include <algorithm>
#include <cstring>

#include "finite.h"
#include "sparse_products.h"  // Buffer

namespace lottery_sparse {
namespace {

constexpr int64_t kTask = 64;  // rows
constexpr int64_t kGrainPack = 512;

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
                                                  width};
        parallel(divide_up(p.out_features, kTask), 1, [&](int64_t begin, int64_t end) {
            kernels.multiply(product, begin * kTask, std::min(end * kTask, p.out_features));
        });
    }
    if (!all_finite(p.x, p.batch * p.in_features))
        spread_non_finite(p, static_cast<const Index*>(p.columns), parallel);
}

template <class Index>
Buffer<Index> columns_of(const PackedLinear& p, const uint8_t* gaps, const Parallel& parallel) {
    Buffer<Index> columns = buffer<Index>(p.starts[p.out_features]);
    parallel(divide_up(p.out_features, kTask), 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin * kTask; r < std::min(end * kTask, p.out_features); ++r) {
            Index column = 0;
            for (int64_t i = p.starts[r]; i < p.starts[r + 1]; ++i)
                columns[i] = column = static_cast<Index>(column + gaps[i]);
        }
    });
    return columns;
}

template <class Value>
void run(const BitmapLinear& p, const BitmapLinearKernels<Value>& kernels,
         const Parallel& parallel) {
    // not a power of two: rows of x at such a distance would share few sets of the cache
    const int64_t stride = (divide_up(p.in_features, kBitmapGroup) + 1) * kBitmapGroup;
    const int64_t padded = divide_up(p.batch, kBitmapSide) * kBitmapSide;
    const Buffer<float> x = buffer<float>(padded * stride);
    std::memset(x.get() + p.batch * stride, 0, (padded - p.batch) * stride * sizeof(float));
    for (int64_t b = 0; b < p.batch; ++b) {
        std::memcpy(x.get() + b * stride, p.x + b * p.in_features, p.in_features * sizeof(float));
        std::memset(x.get() + b * stride + p.in_features, 0,
                    (stride - p.in_features) * sizeof(float));
    }
    parallel(divide_up(p.out_features, kTask), 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
            for (int64_t b = 0; b < p.batch; b += kBitmapBatch)
                kernels.multiply({p.starts, reinterpret_cast<const uint16_t*>(p.bits),
                                  static_cast<const Value*>(p.values), x.get() + b * stride, p.bias,
                                  p.y + b * p.out_features, p.in_features, p.out_features, stride,
                                  std::min(kBitmapBatch, p.batch - b)},
                                 task * kTask, std::min((task + 1) * kTask, p.out_features));
    });
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

void delta_linear(PackedLinear p, const uint8_t* gaps, const Parallel& parallel) {
    p.wide = p.in_features > (1 << 16);
    if (p.wide) {
        const Buffer<uint32_t> columns = columns_of<uint32_t>(p, gaps, parallel);
        p.columns = columns.get();
        packed_linear(p, parallel);
    } else {
        const Buffer<uint16_t> columns = columns_of<uint16_t>(p, gaps, parallel);
        p.columns = columns.get();
        packed_linear(p, parallel);
    }
}

}  // namespace lottery_sparse
