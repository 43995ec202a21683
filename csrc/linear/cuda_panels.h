// What the kernels share that gather from panels of x, see cuda_compact.h: how rows are dealt to
// warps, and a panel's chunks in shared memory.
#pragma once

#include "common/cuda_kernel.h"
#include "linear/cuda_compact.h"

namespace lottery_sparse {
namespace {

constexpr int kPanelWarps = 16;
constexpr int kPanelThreads = kPanelWarps * kLanes;
constexpr int kReaders = 8;                 // lanes that read an entry's part of a panel
constexpr int kAtOnce = kLanes / kReaders;  // entries of a warp
constexpr int kPairBytes = kLanes * 8;      // a warp's entries: where to read, and the value
constexpr int kNothing = kPanelWarps * kPairBytes;  // zeros, for an entry that is none
constexpr int kStages = kNothing + kPanelBytes;
constexpr int kReservedShared = 1 << 10;

// Numbers of 16 bytes.
template <class T>
LS_HOST_DEVICE constexpr int each_of() {
    return 16 / static_cast<int>(sizeof(typename T::Bits));
}
template <class T>
LS_HOST_DEVICE constexpr int panel_rows() {
    return kReaders * each_of<T>();
}

// Number i of those that lie together in 16 bytes.
template <class T>
LS_DEVICE float number_of(const Words4& words, int i) {
    if (sizeof(typename T::Bits) == 4) return T::to_float(words.word[i]);
    return T::to_float(i % 2 ? words.word[i / 2] >> 16 : words.word[i / 2] & 0xFFFFu);
}

// Row i of a warp: 16 rows go together, and all blocks have some of each region, for a weight may
// keep far more in one than in another.
LS_DEVICE int64_t row_of_warp(int64_t group, int64_t groups, int64_t i, int warp) {
    return (group + groups * i) * kPanelWarps + warp;
}

struct Walk {
    int lane, warp;
    int64_t network, panel, panels, group, groups;

    LS_MEMBER explicit Walk(int64_t of_panels) {
        lane = thread_index() % kLanes;
        warp = thread_index() / kLanes;
        network = block_y();
        panels = of_panels;
        panel = block_x() % panels;
        group = block_x() / panels;
        groups = grid_x() / panels;
    }
};

// Where entries read their columns of a panel: from shared memory, chunk by chunk, two at a time
// there; or where few columns are read more than once (kDirect), from global memory.
template <bool kDirect>
struct Chunks {
    const unsigned char* panel;
    int64_t columns;
    int chunk, count;
    int part;  // of this lane: bytes from the start of a column

    LS_MEMBER Chunks(const void* panels, int64_t which, int64_t of_columns, int64_t of_chunk) {
        columns = of_columns;
        chunk = static_cast<int>(of_chunk);
        count = kDirect ? 1 : static_cast<int>((columns + chunk - 1) / chunk);
        panel = static_cast<const unsigned char*>(panels) + which * columns * kPanelBytes;
        part = thread_index() % kReaders * 16;
    }
    LS_MEMBER int stage(int c) const { return kStages + c % 2 * chunk * kPanelBytes; }
    LS_MEMBER int begin(int c) const { return c * chunk; }
    LS_MEMBER int end(int c) const {
        if (kDirect) return INT32_MAX;
        return c + 1 < count ? (c + 1) * chunk : static_cast<int>(columns);
    }
    LS_MEMBER void load(int c) const {
        if (c < count) {
            const int bytes = (end(c) - begin(c)) * kPanelBytes;
            const unsigned char* from = panel + int64_t{begin(c)} * kPanelBytes;
            unsigned char* to = shared_memory() + stage(c);
            for (int i = thread_index() * 16; i < bytes; i += kPanelThreads * 16)
                copy_async(to + i, from + i);
        }
        commit_copies();
    }
    LS_MEMBER void start() const {
        if (kDirect) return;
        if (thread_index() < kPanelBytes / 4)
            reinterpret_cast<uint32_t*>(shared_memory() + kNothing)[thread_index()] = 0;
        load(0);
    }
    // Begins the next one, and waits for this one.
    LS_MEMBER void enter(int c) const {
        if (kDirect) return;
        load(c + 1);
        wait_copies<1>();
        sync_block();
    }
    LS_MEMBER void leave() const {
        if (!kDirect) sync_block();
    }
    // Where column 0 would be while the warp is in a chunk; and where an entry that is none reads.
    LS_MEMBER int base(int c) const { return kDirect ? 0 : stage(c) - begin(c) * kPanelBytes; }
    LS_MEMBER uint32_t none() const { return kDirect ? UINT32_MAX : kNothing; }
    LS_MEMBER Words4 read(uint32_t where) const {
        if (!kDirect) return words_at(shared_memory() + part + where);
        return where == UINT32_MAX ? Words4{} : words_at(panel + part + where);
    }
};

// The entries of one network, by slot.
struct Columns {
    const void* numbers;
    bool wide;

    LS_MEMBER Columns(const CudaKept& kept, int64_t network) : wide(kept.wide) {
        numbers = static_cast<const char*>(kept.columns) + network * kept.slots * (wide ? 4 : 2);
    }
    LS_MEMBER int at(int slot) const {
        return wide ? static_cast<const int32_t*>(numbers)[slot]
                    : static_cast<const uint16_t*>(numbers)[slot];
    }
};

// What a warp still has to do of a row, and each lane's entry of it.
struct Entries {
    int from, end;  // slots
    int column;     // INT32_MAX: there is none
    uint32_t value;
};

// Whether so many groups of rows read more bytes as chunks than their entries do directly.
bool reads_directly(const CudaKept& kept, int64_t groups, int64_t columns) {
    return kept.slots < groups * columns && columns < INT32_MAX / kPanelBytes;
}

// Columns of a chunk, and bytes of shared memory, with `least` of them at least.
struct Room {
    int64_t chunk;
    int shared;
};
Room room_of(int64_t columns, int64_t least, const Device& device) {
    const int64_t bytes = device.shared - kReservedShared - kStages;
    const int64_t whole = columns > 0 ? columns : 1;
    if (whole * kPanelBytes <= bytes) {
        const int64_t used = whole * kPanelBytes > least ? whole * kPanelBytes : least;
        return {whole, static_cast<int>(kStages + used)};
    }
    const int64_t most = bytes / 2 / kPanelBytes, chunks = (whole + most - 1) / most;
    const int64_t chunk = (whole + chunks - 1) / chunks;
    const int64_t used = 2 * chunk * kPanelBytes > least ? 2 * chunk * kPanelBytes : least;
    return {chunk, static_cast<int>(kStages + used)};
}

}  // namespace
}  // namespace lottery_sparse
