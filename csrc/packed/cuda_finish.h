// The end of a product of cuda_linear.h: sums -> y, or -> partial sums.
#pragma once

#include "packed/cuda_linear.h"
#include "packed/cuda_x.h"

namespace lottery_sparse {

LS_DEVICE float finished(const CudaLinear& p, const CudaScale& s, int64_t m, int64_t n, float sum) {
    float y = sum * s.factor;
    if (s.scale) y *= number_at(s.scale, s.type, s.by_row ? n : 0);
    if (p.x_scale) y *= p.x_scale[m];
    return p.bias ? y + number_at(p.bias, p.bias_type, n) : y;
}

// The sum of one split for row m of x and row n of the weight, or of padding.
LS_DEVICE void finish(const CudaLinear& p, const CudaScale& s, int64_t m, int64_t n, float sum) {
    if (m >= p.batch || n >= p.out_features) return;
    if (p.splits == 1)
        store_number(p.y, p.y_type, m * p.out_features + n, finished(p, s, m, n, sum));
    else
        p.partial[(block_y() * p.batch + m) * p.out_features + n] = sum;
}

// The sums of all warps for kOperands times 16 rows of the weight -> y; `row_of` says which row of
// the weight a row of an operand is. Warp w has `stride` bytes of shared memory from w * stride on,
// and loses the first kOperands * kSides * 512 of them.
template <int kOperands, int kSides, int kWarps, class RowOf>
LS_DEVICE void finish_operands(const CudaLinear& p, const CudaScale& s, int stride,
                               float c[kOperands][kSides][4], const RowOf& row_of) {
    constexpr int kSlots = kOperands * kSides * 4;
    const int lane = thread_index() % kLanes, warp = thread_index() / kLanes;
    const int batch = static_cast<int>(p.batch);
    float* sums = reinterpret_cast<float*>(shared_memory() + warp * stride);
    LS_UNROLL
    for (int i = 0; i < kSlots; ++i) {
        float& from = c[i / 4 / kSides][i / 4 % kSides][i % 4];
        sums[i * kLanes + lane] = from;
        from = 0.0f;
    }
    sync_block();
    LS_ROLLED
    for (int i = thread_index(); i < kSlots * kLanes; i += kWarps * kLanes) {
        const int slot = i / kLanes, from = i % kLanes, j = slot % 4, operand = slot / 4 / kSides;
        const int m = slot / 4 % kSides * kSide + from % 4 * 2 + j % 2;
        if (m >= batch) continue;
        float sum = 0.0f;
        LS_ROLLED
        for (int row = m; row < batch * p.parts; row += batch) {
            const int at = ((operand * kSides + row / kSide) * 4 + j / 2 * 2 + row % 2) * kLanes +
                           from / 4 * 4 + row % kSide / 2;
            LS_UNROLL
            for (int w = 0; w < kWarps; ++w)
                sum += reinterpret_cast<const float*>(shared_memory() + w * stride)[at];
        }
        finish(p, s, m, row_of(operand, from / 4 + 8 * (j / 2)), sum);
    }
    sync_block();
}

}  // namespace lottery_sparse
