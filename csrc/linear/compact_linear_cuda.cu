// y = x W^T + b from panels of x and the kept entries of W by row, and dx = dy W with those by
// column; see cuda_compact.h.
#include "linear/cuda_panels.h"

namespace lottery_sparse {
namespace {

// T: all numbers. kRows: rows of W that a warp keeps sums of.
template <class T, int kRows, bool kDirect>
LS_GLOBAL(kPanelThreads, kDirect ? 2 : 1)
compact_kernel(CudaCompact p) {
    constexpr int kEach = each_of<T>(), kBatch = panel_rows<T>();
    constexpr int kBlockRows = kRows * kPanelWarps;
    using Bits = typename T::Bits;
    const Walk at((p.batch + kBatch - 1) / kBatch);
    const int lane = at.lane;
    const Chunks<kDirect> chunks(p.panels, (p.shared_x ? 0 : at.network * at.panels) + at.panel,
                                 p.in_features, p.chunk);
    const int64_t* const starts = p.kept.starts + at.network * (p.out_features + 1);
    const Columns columns(p.kept, at.network);
    const Bits* const values = static_cast<const Bits*>(p.values) + at.network * p.kept.slots;
    unsigned char* const pairs = shared_memory() + at.warp * kPairBytes;
    // A lane reads two pairs of where and value at once, the second that of four entries further.
    unsigned char* const mine = pairs + ((lane / 8 * 4 + lane % 4) * 2 + lane / 4 % 2) * 8;
    const unsigned char* const theirs = pairs + lane / kReaders * 16;

    // Lane i has where the warp's row i is in its entries.
    int from = 0, end = 0;
    const int64_t own = row_of_warp(at.group, at.groups, lane, at.warp);
    if (lane < kRows && own < p.out_features) {
        from = static_cast<int>(starts[own]);
        end = static_cast<int>(starts[own + 1]);
    }
    const auto read = [&](int begin, int last) -> Entries {
        const int slot = begin + lane;
        if (slot >= last) return {begin, last, INT32_MAX, 0};
        return {begin, last, columns.at(slot), values[slot]};
    };
    const auto read_row = [&](int i) -> Entries {
        const int begin = static_cast<int>(from_lane(from, i));
        return read(begin, static_cast<int>(from_lane(end, i)));
    };

    float sums[kRows][kEach] = {};
    chunks.start();
    LS_ROLLED
    for (int c = 0; c < chunks.count; ++c) {
        chunks.enter(c);
        const int beyond = chunks.end(c), base = chunks.base(c);
        Entries next = read_row(0);
        LS_UNROLL
        for (int i = 0; i < kRows; ++i) {
            Entries row = next;
            if (i + 1 < kRows) next = read_row(i + 1);
            LS_ROLLED
            while (true) {
                const bool here = row.column < beyond;
                const int count = count_ones(ballot(here));
                const uint32_t where = here ? base + row.column * kPanelBytes : chunks.none();
                const float value = here ? T::to_float(row.value) : 0.0f;
                *reinterpret_cast<Words2*>(mine) = {{where, Float32::from_float(value)}};
                sync_warp();
                LS_ROLLED
                for (int done = 0; done < count; done += 2 * kAtOnce) {
                    const Words4 two = words_at(theirs + done * 8);
                    const Words4 x[2] = {chunks.read(two.word[0]), chunks.read(two.word[2])};
                    LS_UNROLL
                    for (int j = 0; j < 2 * kEach; ++j)
                        sums[i][j % kEach] =
                            fused(Float32::to_float(two.word[j / kEach * 2 + 1]),
                                  number_of<T>(x[j / kEach], j % kEach), sums[i][j % kEach]);
                }
                sync_warp();
                row.from += count;
                if (count < kLanes) break;
                row = read(row.from, row.end);
            }
            if (lane == i) from = row.from;
        }
        chunks.leave();
    }

    // The four entries of a warp -> one lane for each row of x, then all rows together -> y.
    float* const out = reinterpret_cast<float*>(shared_memory() + kStages);  // [rows of x][rows]
    constexpr int kStride = kBlockRows + 1;
    const bool high = lane / 16 % 2, second = lane / 8 % 2;
    const int first = lane % kReaders * kEach + (high * 2 + second) * (kEach / 4);
    LS_UNROLL
    for (int i = 0; i < kRows; ++i) {
        float half[kEach / 2];
        LS_UNROLL
        for (int j = 0; j < kEach / 2; ++j) {
            const float low = sums[i][j], up = sums[i][j + kEach / 2];
            half[j] = (high ? up : low) + float_across(high ? low : up, 16);
        }
        LS_UNROLL
        for (int j = 0; j < kEach / 4; ++j) {
            const float low = half[j], up = half[j + kEach / 4];
            const float sum = (second ? up : low) + float_across(second ? low : up, 8);
            out[(first + j) * kStride + i * kPanelWarps + at.warp] = sum;
        }
    }
    sync_block();
    LS_ROLLED
    for (int i = thread_index(); i < kBatch * kBlockRows; i += kPanelThreads) {
        const int slot = i % kBlockRows;
        const int64_t row = at.panel * kBatch + i / kBlockRows;
        const int64_t n = row_of_warp(at.group, at.groups, slot / kPanelWarps, slot % kPanelWarps);
        if (row >= p.batch || n >= p.out_features) continue;
        float sum = out[i / kBlockRows * kStride + slot];
        if (p.bias) sum += number_at(p.bias, p.type, at.network * p.out_features + n);
        static_cast<Bits*>(p.y)[(at.network * p.batch + row) * p.out_features + n] =
            static_cast<Bits>(T::from_float(sum));
    }
}

// The largest number of rows of a warp for which all multiprocessors have a block.
template <class T, int kMost, int kSome>
const char* launch_rows(CudaCompact p, const Device& device) {
    constexpr int64_t kBatch = panel_rows<T>();
    const int64_t panels = (p.batch + kBatch - 1) / kBatch;
    const auto groups_of = [&](int64_t rows) {
        return (p.out_features + rows * kPanelWarps - 1) / (rows * kPanelWarps);
    };
    const auto enough = [&](int64_t rows) {
        return groups_of(rows) * panels * p.networks * 4 >= int64_t{3} * device.processors;
    };
    const int64_t rows = enough(kMost) ? kMost : enough(kSome) ? kSome : 1;
    const bool direct = reads_directly(p.kept, groups_of(rows), p.in_features);
    const int64_t used = direct ? 1 : rows;
    const Room room =
        room_of(direct ? 0 : p.in_features, kBatch * (used * kPanelWarps + 1) * 4, device);
    p.chunk = room.chunk;
    const auto kernel = direct          ? compact_kernel<T, 1, true>
                        : rows == kMost ? compact_kernel<T, kMost, false>
                        : rows == kSome ? compact_kernel<T, kSome, false>
                                        : compact_kernel<T, 1, false>;
    return launch(kernel, groups_of(used) * panels, p.networks, kPanelThreads, room.shared, device,
                  p);
}

}  // namespace

const char* cuda_compact_linear(CudaCompact p, const Device& device) {
    if (p.networks * p.batch * p.out_features == 0) return nullptr;
    if (p.type == Number::kFloat) return launch_rows<Float32, 16, 4>(p, device);
    return p.type == Number::kFloat16 ? launch_rows<Float16, 8, 2>(p, device)
                                      : launch_rows<BFloat16, 8, 2>(p, device);
}

}  // namespace lottery_sparse
