// Packed inference: per kept weight (ternary: per weight) and row of x.
#include "common/bits.h"
#include "instructions.h"
#include "masks/mask_bits.h"
#include "packed/packed_linear.h"
#include "packed/ternary_linear.h"

namespace lottery_sparse {
namespace {

constexpr int64_t kRows = 256, kColumns = 1024;

void packed_rows() {
    const Kept kept(mask_of(kRows * kColumns, 10), kRows, kColumns);
    const std::vector<float> values = draws(kept.count()), x = draws(kNarrowTile * kColumns);
    std::vector<float> y(kNarrowTile * kRows);
    const auto& kernels = LS_KERNELS(packed_linear_16);
    const auto count = [&](const char* name, int64_t batch) {
        begin();
        kernels.multiply({kept.starts.data(), kept.columns.data(), values.data(), x.data(), nullptr,
                          y.data(), kRows, batch, batch},
                         0, kRows);
        END(name, kept.count() * batch);
    };
    count("packed_linear.multiply 10% batch 1", 1);
    count("packed_linear.multiply 10% batch 16", kNarrowTile);
}

void bitmap_rows() {
    const std::vector<uint8_t> mask = mask_of(kRows * kColumns, 50);
    const Kept kept(mask, kRows, kColumns);
    std::vector<uint32_t> bits(kRows * packed_words(kColumns));
    LS_KERNELS(mask_bits).pack_rows(mask.data(), kColumns, bits.data(), 0, kRows);
    const std::vector<float> values = draws(kept.count() + kBitmapGroup);
    const std::vector<float> x = draws(kBitmapSide * kColumns);
    std::vector<float> y(kBitmapSide * kRows);
    const auto count = [&](const char* name, int64_t batch) {
        begin();
        LS_KERNELS(bitmap_linear_float)
            .multiply(
                {kept.starts.data(), reinterpret_cast<const uint16_t*>(bits.data()), values.data(),
                 x.data(), nullptr, y.data(), kColumns, kRows, kColumns, batch},
                0, kRows);
        END(name, kept.count() * batch);
    };
    count("bitmap_linear.multiply 50% batch 1", 1);
    count("bitmap_linear.multiply 50% batch 4", kBitmapSide);
}

void ternary_rows() {
    constexpr int64_t kWords = kColumns / kTernaryColumns, kBatch = 4;
    std::vector<uint32_t> codes(kRows * kWords);
    for (uint32_t& word : codes) {
        word = 0;
        for (int i = 0; i < kTernaryColumns; ++i) word |= draw() % 3 << 2 * i;
    }
    const std::vector<float> x = draws(kBatch * kColumns);
    const float scale = 0.5f;
    std::vector<float> y(kBatch * kRows);
    const auto& kernels = LS_KERNELS(ternary_linear);
    std::vector<float> tables(kWords * kernels.table_floats);
    begin();
    kernels.tables(x.data(), 1, kColumns, 0, kWords, tables.data());
    END("ternary_linear.tables", kColumns);
    begin();
    kernels.multiply(
        {codes.data(), kWords, tables.data(), &scale, false, nullptr, y.data(), kRows, 1}, 0,
        kRows / kTernaryRows);
    END("ternary_linear.multiply", kRows * kColumns);

    const auto& tiles = LS_KERNELS(ternary_tiles);
    std::vector<uint32_t> bytes(kWords * 4 * kBatch);
    std::vector<float> x_scale(kBatch);
    std::vector<int32_t> x_sum(kBatch);
    begin();
    for (int64_t b = 0; b < kBatch; ++b)
        tiles.quantise(x.data() + b * kColumns, kColumns, kWords, kBatch, bytes.data() + b,
                       &x_scale[b], &x_sum[b]);
    END("ternary_tiles.quantise", kBatch * kColumns);
    begin();
    tiles.multiply_int8({codes.data(), kWords, bytes.data(), x_scale.data(), x_sum.data(), &scale,
                         false, nullptr, y.data(), kRows, kBatch, kBatch},
                        0, kRows / kTernaryRows);
    END("ternary_tiles.multiply_int8 batch 4", kBatch * kRows * kColumns);
}

}  // namespace

void count_packed() {
    packed_rows();
    bitmap_rows();
    ternary_rows();
}

}  // namespace lottery_sparse
