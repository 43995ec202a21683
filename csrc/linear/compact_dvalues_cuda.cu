// dW = dy^T x at the kept entries only, from panels of x and of dy; see cuda_compact.h. An entry
// multiplies its column of x with its row of dy and adds up over the rows of x. Each panel leaves
// sums of its own; a second kernel adds them in the order of the panels.
#include "linear/cuda_panels.h"

namespace lottery_sparse {
namespace {

constexpr int kSteps =
    kLanes / kAtOnce;  // of a warp over its entries: as many as there are readers
constexpr int kFinishThreads = 256;

// The sum of sums[q] over the 8 lanes that have read together, for lane q of them.
LS_DEVICE float transpose_sum(float sums[kSteps], int lane) {
    LS_UNROLL
    for (int width = kSteps / 2; width; width /= 2) {
        const bool high = lane & width;
        LS_UNROLL
        for (int j = 0; j < width; ++j) {
            const float low = sums[j], up = sums[j + width];
            sums[j] = (high ? up : low) + float_across(high ? low : up, width);
        }
    }
    return sums[0];
}

template <class T, bool kDirect>
LS_GLOBAL(kPanelThreads, 1)
dvalues_kernel(CudaDvalues p) {
    constexpr int kEach = each_of<T>(), kBatch = panel_rows<T>();
    const Walk at((p.batch + kBatch - 1) / kBatch);
    const int lane = at.lane, rows = static_cast<int>(p.rows);
    const Chunks<kDirect> chunks(p.panels, (p.shared_x ? 0 : at.network * at.panels) + at.panel,
                                 p.in_features, p.chunk);
    const int64_t* const starts = p.kept.starts + at.network * (p.out_features + 1);
    const Columns columns(p.kept, at.network);
    const int entry_of_lane = lane % kReaders * kAtOnce + lane / kReaders;
    float* const partial =
        p.partial + (at.panel * p.networks + at.network) * p.kept.slots + entry_of_lane;
    uint32_t* const places = reinterpret_cast<uint32_t*>(shared_memory() + at.warp * kPairBytes);
    const uint32_t* const theirs = places + lane / kReaders * kSteps;

    int from = 0, end = 0;
    const int64_t own = row_of_warp(at.group, at.groups, lane, at.warp);
    if (lane < rows && own < p.out_features) {
        from = static_cast<int>(starts[own]);
        end = static_cast<int>(starts[own + 1]);
    }
    const auto read = [&](int begin, int last) -> Entries {
        const int slot = begin + lane;
        return {begin, last, slot < last ? columns.at(slot) : INT32_MAX, 0};
    };
    const auto read_row = [&](int i) -> Entries {
        const int begin = static_cast<int>(from_lane(from, i));
        return read(begin, static_cast<int>(from_lane(end, i)));
    };
    // dy of the warp's rows, one after the other
    const int64_t rows_apart = at.groups * kPanelWarps * kPanelBytes;
    const int64_t first_dy = row_of_warp(at.group, at.groups, 0, at.warp) * kPanelBytes;
    const int64_t dy_bytes = p.out_features * kPanelBytes;
    const unsigned char* const dy = static_cast<const unsigned char*>(p.dy_panels) +
                                    (at.network * at.panels + at.panel) * dy_bytes +
                                    lane % kReaders * 16;
    const auto read_dy = [&](int64_t offset) -> Words4 {
        return offset < dy_bytes ? words_at(dy + offset) : Words4{};
    };

    chunks.start();
    LS_ROLLED
    for (int c = 0; c < chunks.count; ++c) {
        chunks.enter(c);
        const int beyond = chunks.end(c), base = chunks.base(c);
        Entries next = read_row(0);
        int64_t dy_at = first_dy;
        Words4 next_dy = read_dy(dy_at);
        LS_ROLLED
        for (int i = 0; i < rows; ++i) {
            Entries row = next;
            float factors[kEach];
            LS_UNROLL
            for (int j = 0; j < kEach; ++j) factors[j] = number_of<T>(next_dy, j);
            if (i + 1 < rows) {
                next = read_row(i + 1);
                dy_at += rows_apart;
                next_dy = read_dy(dy_at);
            }
            LS_ROLLED
            while (true) {
                const bool here = row.column < beyond;
                const int count = count_ones(ballot(here));
                places[lane % kAtOnce * kSteps + lane / kAtOnce] =
                    here ? base + row.column * kPanelBytes : chunks.none();
                sync_warp();
                if (count) {
                    float sums[kSteps] = {};
                    const auto add = [&](int first) {  // four reads at a time
                        const Words4 where = words_at(theirs + first);
                        Words4 x[4];
                        LS_UNROLL
                        for (int i = 0; i < 4; ++i) x[i] = chunks.read(where.word[i]);
                        LS_UNROLL
                        for (int j = 0; j < kEach; ++j) {
                            LS_UNROLL
                            for (int i = 0; i < 4; ++i)
                                sums[first + i] =
                                    fused(factors[j], number_of<T>(x[i], j), sums[first + i]);
                        }
                    };
                    add(0);
                    if (count > 4 * kAtOnce) add(4);
                    const float sum = transpose_sum(sums, lane);
                    if (entry_of_lane < count) partial[row.from] = sum;
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
}

template <class T>
LS_GLOBAL(kFinishThreads, 1)
finish_kernel(CudaDvalues p) {
    const int64_t i = static_cast<int64_t>(block_x()) * kFinishThreads + thread_index();
    if (i >= p.kept.slots) return;
    constexpr int kBatch = panel_rows<T>();
    const int64_t panels = (p.batch + kBatch - 1) / kBatch, network = block_y();
    const int64_t* starts = p.kept.starts + network * (p.out_features + 1);
    const int64_t at = network * p.kept.slots + i;
    float sum = 0.0f;
    if (i < starts[p.out_features])
        for (int64_t panel = 0; panel < panels; ++panel)
            sum += p.partial[panel * p.networks * p.kept.slots + at];
    static_cast<typename T::Bits*>(p.dvalues)[at] =
        static_cast<typename T::Bits>(T::from_float(sum));
}

template <class T>
const char* launch_all(CudaDvalues p, const Device& device) {
    constexpr int64_t kBatch = panel_rows<T>();
    const int64_t panels = (p.batch + kBatch - 1) / kBatch;
    if (panels && p.in_features && p.out_features) {
        const int64_t blocks = panels * p.networks,
                      each = (p.out_features + kPanelWarps - 1) / kPanelWarps;
        const int64_t wanted =
            each * blocks / device.processors + (each * blocks % device.processors != 0);
        p.rows = wanted < kLanes ? wanted : kLanes;
        const int64_t groups = (each + p.rows - 1) / p.rows;
        const bool direct = reads_directly(p.kept, groups, p.in_features);
        const Room room = room_of(direct ? 0 : p.in_features, 0, device);
        const auto kernel = direct ? dvalues_kernel<T, true> : dvalues_kernel<T, false>;
        p.chunk = room.chunk;
        const char* error =
            launch(kernel, groups * panels, p.networks, kPanelThreads, room.shared, device, p);
        if (error) return error;
    }
    return launch(finish_kernel<T>, (p.kept.slots + kFinishThreads - 1) / kFinishThreads,
                  p.networks, kFinishThreads, 0, device, p);
}

}  // namespace

const char* cuda_compact_dvalues(CudaDvalues p, const Device& device) {
    if (p.networks * p.kept.slots == 0) return nullptr;
    return p.type == Number::kFloat     ? launch_all<Float32>(p, device)
           : p.type == Number::kFloat16 ? launch_all<Float16>(p, device)
                                        : launch_all<BFloat16>(p, device);
}

}  // namespace lottery_sparse
