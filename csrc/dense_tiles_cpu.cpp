#include <array>
#include <utility>

#include "dense_tiles.h"
#include "simd.h"

namespace lottery_sparse {
namespace {

// Rows x kVecs sums, which with a row of b and one broadcast fill the registers.
constexpr int kRows = kWidth == 16 ? kDenseRows : 6;
constexpr int kVecs = 2;
constexpr int kColumns = kVecs * kWidth;

template <int kCount>
void block(const DenseProduct& p, int64_t first) {
    // three rows to a pointer: their addresses are pointer + {0, 1, 2} a_row
    const float* a[(kCount + 2) / 3];
    for (int64_t c = 0; c < kTileBatch; c += kColumns) {
        for (int i = 0; i < (kCount + 2) / 3; ++i) a[i] = p.a + (first + 3 * i) * p.a_row;
        Vec sum[kCount][kVecs];
        for (int r = 0; r < kCount; ++r)
            for (int v = 0; v < kVecs; ++v)
                sum[r][v] = p.bias ? broadcast(p.bias[first + r]) : zero();
        const float* b = p.b + c;
        for (int64_t s = 0; s < p.steps; ++s, b += kTileBatch) {
            Vec row[kVecs];
            for (int v = 0; v < kVecs; ++v) row[v] = load(b + v * kWidth);
            for (int r = 0; r < kCount; ++r) {
                const Vec value = broadcast(a[r / 3][r % 3 * p.a_row]);
                for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(value, row[v], sum[r][v]);
            }
            for (const float*& pointer : a) pointer += p.a_step;
        }
        for (int r = 0; r < kCount; ++r)
            for (int v = 0; v < kVecs; ++v)
                store(p.out + (first + r) * p.out_stride + c + v * kWidth, sum[r][v]);
    }
    for (int64_t r = first; r < first + kCount; ++r) {
        float* out = p.out + r * p.out_stride;
        if (p.relu)  // keeps NaN, as torch.relu does
            for (int b = 0; b < kTileBatch; ++b) out[b] = out[b] < 0.0f ? 0.0f : out[b];
        if (p.gate)
            for (int b = 0; b < kTileBatch; ++b)
                out[b] = p.gate[r * kTileBatch + b] > 0.0f ? out[b] : 0.0f;
    }
}

using Block = void (*)(const DenseProduct&, int64_t);

template <int... kCounts>
constexpr std::array<Block, kRows> blocks(std::integer_sequence<int, kCounts...>) {
    return {block<kCounts + 1>...};
}

void multiply(const DenseProduct& p, int64_t begin, int64_t end) {
    constexpr std::array<Block, kRows> kBlocks = blocks(std::make_integer_sequence<int, kRows>());
    for (int64_t r = begin; r < end; r += kRows)
        kBlocks[(end - r < kRows ? end - r : kRows) - 1](p, r);
}

void transpose(const float* tile, int64_t features, int64_t batch, float* out, int64_t stride) {
    const int64_t block_features = features / 8 * 8, block_batch = batch / 8 * 8;
    for (int64_t f = 0; f < block_features; f += 8)
        for (int64_t b = 0; b < block_batch; b += 8)
            transpose_8x8(tile + f * kTileBatch + b, kTileBatch, out + b * stride + f, stride);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t f = b < block_batch ? block_features : 0; f < features; ++f)
            out[b * stride + f] = tile[f * kTileBatch + b];
}

}  // namespace

const DenseTilesKernels LS_KERNELS(dense_tiles) = {multiply, transpose};

}  // namespace lottery_sparse
