// Problems and counting for instructions*.cpp. Each problem is collected by callgrind on its own:
// `begin`, the calls, END("name", units of work), which prints a line. Without valgrind it just
// runs.
#pragma once

#include <valgrind/callgrind.h>

#include <cstdint>
#include <cstdio>
#include <vector>

#include "common/parallel.h"
#include "linear/sparse_linear.h"

namespace lottery_sparse {

inline uint32_t draw() {  // a linear congruential generator: the same problem everywhere
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
}

inline std::vector<float> draws(int64_t count) {
    std::vector<float> out(count);
    for (float& value : out) value = static_cast<float>(draw() % 2001) / 1000.0f - 1.0f;
    return out;
}

inline std::vector<uint8_t> mask_of(int64_t count, uint32_t percent) {
    std::vector<uint8_t> out(count);
    for (uint8_t& kept : out) kept = draw() % 100 < percent;
    return out;
}

inline void begin() {
    CALLGRIND_ZERO_STATS;
    CALLGRIND_START_INSTRUMENTATION;
}

// `units` of work were done; the dump carries the name.
#define END(name, units)                                               \
    do {                                                               \
        CALLGRIND_STOP_INSTRUMENTATION;                                \
        CALLGRIND_DUMP_STATS_AT(name);                                 \
        std::printf("%s %lld\n", name, static_cast<long long>(units)); \
    } while (0)

// One thread.
inline const Parallel kSerial([](int64_t begin, int64_t end, int64_t, Parallel::Body body,
                                 void* context) { body(begin, end, context); });

// The kept weights of a matrix [rows, columns], by row and by column.
struct Kept {
    std::vector<int64_t> starts, column_starts;
    std::vector<uint16_t> columns, rows;
    std::vector<int32_t> positions;

    Kept(const std::vector<uint8_t>& mask, int64_t height, int64_t width)
        : starts(1), column_starts(width + 1) {
        for (int64_t r = 0; r < height; ++r) {
            for (int64_t c = 0; c < width; ++c)
                if (mask[r * width + c]) columns.push_back(static_cast<uint16_t>(c));
            starts.push_back(count());
        }
        for (uint16_t c : columns) ++column_starts[c + 1];
        for (int64_t c = 0; c < width; ++c) column_starts[c + 1] += column_starts[c];
        std::vector<int64_t> next(column_starts.begin(), column_starts.end() - 1);
        rows.resize(columns.size());
        positions.resize(columns.size());
        for (int64_t r = 0; r < height; ++r)
            for (int64_t i = starts[r]; i < starts[r + 1]; ++i) {
                const int64_t to = next[columns[i]]++;
                rows[to] = static_cast<uint16_t>(r);
                positions[to] = static_cast<int32_t>(i);
            }
    }

    int64_t count() const { return static_cast<int64_t>(columns.size()); }
    CompactLists lists() const {
        return {starts.data(), columns.data(), column_starts.data(), rows.data(), positions.data(),
                count(),       false};
    }
};

void count_convolutions();
void count_packed();
void count_steps();

}  // namespace lottery_sparse
