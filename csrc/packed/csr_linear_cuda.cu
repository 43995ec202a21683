// A sparse weight by rows times 1 to 8 rows of x, see cuda_linear.h: a warp takes a row of the
// weight, gathers x from shared memory and adds up in float.
#include "packed/cuda_finish.h"
#include "packed/cuda_linear.h"
#include "packed/cuda_x.h"

namespace lottery_sparse {
namespace {

constexpr int kWarps = 8;
constexpr int kBlocks = 2;  // of a multiprocessor
constexpr int kReserved = 1 << 10;
constexpr int kEach = 8;   // entries that a lane reads at once
constexpr int kAhead = 2;  // reads of kEach entries of the next row
constexpr int kChunk = kEach * kLanes;

// A warp's row: its entries, from a multiple of kEach on.
struct Row {
    int64_t aligned, begin, end;
};

struct Entries {
    Words4 values, columns;
};

LS_DEVICE uint32_t half_of(const Words4& words, int i) {
    return i % 2 ? words.word[i / 2] >> 16 : words.word[i / 2] & 0xFFFFu;
}

// kWidth numbers that lie together.
template <int kWidth>
LS_DEVICE void read_numbers(const uint16_t* from, uint16_t to[kWidth]) {
    if (kWidth == 1) {
        to[0] = from[0];
    } else if (kWidth == 2) {
        const uint32_t both = *reinterpret_cast<const uint32_t*>(from);
        to[0] = static_cast<uint16_t>(both), to[1] = static_cast<uint16_t>(both >> 16);
    } else if (kWidth == 4) {
        const Words2 all = *reinterpret_cast<const Words2*>(from);
        LS_UNROLL
        for (int i = 0; i < kWidth; ++i)
            to[i] = static_cast<uint16_t>(all.word[i / 2] >> (i % 2 * 16));
    } else {
        const Words4 all = words_at(from);
        LS_UNROLL
        for (int i = 0; i < kWidth; ++i) to[i] = static_cast<uint16_t>(half_of(all, i));
    }
}

// x [batch][K] -> [K][kWidth], zeros beyond the batch.
template <int kWidth>
LS_DEVICE void load_columns(const CudaLinear& p, uint16_t* out, int threads) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x);
    LS_ROLLED
    for (int row = 0; row < kWidth; ++row)
        for (int64_t k = thread_index(); k < p.in_features; k += threads)
            out[k * kWidth + row] = row < p.batch ? x[row * p.in_features + k] : 0;
}

// x of 8 rows is half of a multiprocessor's memory, so one block has it all.
LS_HOST_DEVICE constexpr int blocks_of(int width) {
    return width == 8 ? 1 : kBlocks;
}
LS_HOST_DEVICE constexpr int warps_of(int width) {
    return kWarps * kBlocks / blocks_of(width);
}

// T: the numbers of x and of the weight. kWidth: rows of x, at least its batch.
template <class T, int kWidth>
LS_GLOBAL(warps_of(kWidth) * kLanes, blocks_of(kWidth))
csr_kernel(CudaCsr p) {
    constexpr int kAll = warps_of(kWidth);
    const CudaLinear& linear = p.linear;
    const int lane = thread_index() % kLanes;
    const int64_t rows = linear.out_features, stride = int64_t{grid_x()} * kAll;
    const int64_t total = p.starts[rows];
    uint16_t* const x = reinterpret_cast<uint16_t*>(shared_memory());
    const uint64_t policy = evict_first();

    const auto row_of = [&](int64_t n) -> Row {
        if (n >= rows) return {0, 0, 0};
        const int64_t begin = p.starts[n];
        return {begin / kEach * kEach, begin, p.starts[n + 1]};
    };
    const auto read = [&](const Row& row, int64_t chunk) -> Entries {
        const int64_t at = row.aligned + chunk * kChunk + lane * kEach;
        if (at >= row.end) return {};
        Entries e = {};
        if (at + kEach <= total) {
            e.values = stream(reinterpret_cast<const Words4*>(p.values + at), policy);
            e.columns = stream(reinterpret_cast<const Words4*>(p.columns + at), policy);
            return e;
        }
        LS_UNROLL
        for (int i = 0; i < kEach; ++i)  // the last ones of all
            if (at + i < total) {
                e.values.word[i / 2] |= stream(p.values + at + i, policy) << (i % 2 * 16);
                e.columns.word[i / 2] |= stream(p.columns + at + i, policy) << (i % 2 * 16);
            }
        return e;
    };

    int64_t n = int64_t{block_x()} * kAll + thread_index() / kLanes;
    Row row = row_of(n), next = row_of(n + stride);
    Entries ahead[kAhead];
    LS_UNROLL
    for (int i = 0; i < kAhead; ++i) ahead[i] = read(row, i);
    load_columns<kWidth>(linear, x, kAll * kLanes);
    sync_block();

    for (; n < rows; n += stride) {
        float sums[kWidth] = {};
        const auto add = [&](const Entries& e, int64_t chunk) {
            const int64_t at = row.aligned + chunk * kChunk + lane * kEach;
            // entries of other rows are read too: those from `begin` to `end` - 1 are this one's
            const int first = chunk > 0 ? 0 : static_cast<int>(row.begin - row.aligned);
            const int begin = first - lane * kEach;
            const int end = static_cast<int>(least(row.end - at, kEach));
            LS_UNROLL
            for (int i = 0; i < kEach; ++i) {
                const uint32_t bits = half_of(e.values, i);
                uint16_t of_x[kWidth];
                read_numbers<kWidth>(x + half_of(e.columns, i) * kWidth, of_x);
                const bool adds = i >= begin && i < end;
                const float value = T::to_float(adds ? bits : 0);
                LS_UNROLL
                for (int m = 0; m < kWidth; ++m)
                    sums[m] = fused(value, T::to_float(adds ? of_x[m] : 0), sums[m]);
            }
        };
        Entries now[kAhead];
        LS_UNROLL
        for (int i = 0; i < kAhead; ++i) now[i] = ahead[i];
        const Row after = row_of(n + 2 * stride);
        LS_UNROLL
        for (int i = 0; i < kAhead; ++i) ahead[i] = read(next, i);
        LS_UNROLL
        for (int i = 0; i < kAhead; ++i)
            if (row.aligned + i * kChunk < row.end) add(now[i], i);
        for (int64_t i = kAhead; row.aligned + i * kChunk < row.end; ++i) add(read(row, i), i);
        float sum = 0.0f;  // of row `lane` of x
        LS_UNROLL
        for (int m = 0; m < kWidth; ++m) {
            LS_UNROLL
            for (int other = 16; other; other /= 2)
                sums[m] += float_from_lane(sums[m], lane ^ other);
            sum = lane == m ? sums[m] : sum;
        }
        if (lane < kWidth) finish(linear, {nullptr, Number::kFloat, false, 1.0f}, lane, n, sum);
        row = next;
        next = after;
    }
}

int width_of(int64_t batch) {
    return batch > 4 ? 8 : batch > 2 ? 4 : static_cast<int>(batch);
}

template <class T>
auto chosen(int width) {
    return width == 1   ? csr_kernel<T, 1>
           : width == 2 ? csr_kernel<T, 2>
           : width == 4 ? csr_kernel<T, 4>
                        : csr_kernel<T, 8>;
}

}  // namespace

bool cuda_csr_fits(int64_t batch, int64_t in_features, const Device& device) {
    const int width = width_of(batch);
    return batch <= kCudaCsrBatch &&
           in_features * width * 2 <= device.shared / blocks_of(width) - kReserved;
}

const char* cuda_csr_linear(const CudaCsr& p, const Device& device) {
    const CudaLinear& linear = p.linear;
    const int width = width_of(linear.batch), warps = warps_of(width);
    const auto kernel =
        linear.type == Number::kFloat16 ? chosen<Float16>(width) : chosen<BFloat16>(width);
    const int64_t blocks = (linear.out_features + warps - 1) / warps;
    const int64_t room = blocks_of(width) * device.processors;
    const int shared = static_cast<int>(linear.in_features) * width * 2;
    return launch(kernel, least(blocks, room), 1, warps * kLanes, shared, device, p);
}

}  // namespace lottery_sparse
