// See emulate_cuda.h. Only tests build this: cuda_emulator.py, with the kernel files.
#include "emulate_cuda.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "common/cuda_kernel.h"

namespace lottery_sparse {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kMostShared = 227 << 10;

// Threads that wait for each other; `round` counts how often they have.
struct Meeting {
    int size, arrived = 0;
    int64_t round = 0;
};

struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    ucontext_t context;
    std::deque<std::vector<Copy>> copies;  // by group, the last one not committed yet
    std::unique_ptr<char[]> stack;
    bool done;
    const Meeting* waits;  // or nullptr
    int64_t round;         // of the meeting, when it began to wait
};

struct Range {
    uintptr_t begin, end;
};

struct Operands {
    float c[4];
    uint32_t a[4], b[2];
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    std::vector<Operands> operands;
    Meeting all;
    ucontext_t scheduler;
    int current = 0;
    int64_t x = 0, y = 0, grid = 0;
    std::vector<unsigned char> shared;
    const std::function<void()>* thread = nullptr;
} block;

std::vector<Range> readable;
std::string fault;
bool descending = false;  // the first thread is that with the highest number

void fail(const std::string& message) {
    if (fault.empty())
        fault = message + " (block " + std::to_string(block.x) + ", " + std::to_string(block.y) +
                ", thread " + std::to_string(block.current) + ")";
}

void pause() {
    swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

// Waits until all threads of the meeting are here.
void meet(Meeting& meeting) {
    const int64_t round = meeting.round;
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        ++meeting.round;
        return;
    }
    Fiber& fiber = block.fibers[block.current];
    fiber.waits = &meeting;
    fiber.round = round;
    pause();
    fiber.waits = nullptr;
}

void run_thread() {
    (*block.thread)();
    block.fibers[block.current].done = true;
    pause();
}

void check_read(const void* p, size_t bytes) {
    const auto at = reinterpret_cast<uintptr_t>(p);
    if (at % bytes) fail("misaligned read of " + std::to_string(bytes) + " bytes");
    for (const Range& range : readable)
        if (range.begin <= at && at + bytes <= range.end) return;
    fail("read of " + std::to_string(bytes) + " bytes outside every tensor");
}

template <class T>
float product(uint32_t a, uint32_t b) {
    return T::to_float(a & 0xFFFF) * T::to_float(b & 0xFFFF) +
           T::to_float(a >> 16) * T::to_float(b >> 16);
}

// A lane's part of the product of its warp, from the operands of all lanes.
template <class T>
void multiply(const Operands* warp, int lane, float c[4]) {
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i / 2), column = 2 * q + i % 2;
        float sum = warp[lane].c[i];
        for (int k = 0; k < 8; ++k) {  // pairs of the 16 columns
            const uint32_t a = warp[4 * (row % 8) + k % 4].a[row / 8 + 2 * (k / 4)];
            const uint32_t b = warp[4 * column + k % 4].b[k / 4];
            sum += product<T>(a, b);
        }
        c[i] = sum;
    }
}

void run_block(int threads) {
    const int warps = threads / kLanes;
    block.all = {threads};
    block.warps.assign(warps, Meeting{kLanes});
    block.operands.resize(threads);
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = block.fibers[i];
        fiber.done = false;
        fiber.copies.assign(1, {});
        fiber.waits = nullptr;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = &block.scheduler;
        makecontext(&fiber.context, run_thread, 0);
    }
    // Always the first thread that can go on, so that warps get as far apart as barriers allow.
    for (int left = threads; left && fault.empty();) {
        int turn = 0;
        const auto at = [&] { return descending ? threads - 1 - turn : turn; };
        const auto waits = [&] {
            const Fiber& fiber = block.fibers[at()];
            return fiber.done || (fiber.waits && fiber.waits->round == fiber.round);
        };
        while (turn < threads && waits()) ++turn;
        if (turn == threads) {
            fail("threads wait for others that do not come");
            break;
        }
        block.current = at();
        swapcontext(&block.scheduler, &block.fibers[block.current].context);
        left -= block.fibers[block.current].done;
    }
}

}  // namespace

int thread_index() {
    return block.current;
}
int block_x() {
    return static_cast<int>(block.x);
}
int block_y() {
    return static_cast<int>(block.y);
}
int grid_x() {
    return static_cast<int>(block.grid);
}
void sync_block() {
    meet(block.all);
}
void sync_warp() {
    meet(block.warps[block.current / kLanes]);
}
unsigned char* shared_memory() {
    auto at = reinterpret_cast<uintptr_t>(block.shared.data());
    return reinterpret_cast<unsigned char*>((at + 127) / 128 * 128);
}

template <class T>
T streamed(const T* p) {
    check_read(p, sizeof *p);
    return fault.empty() ? *p : T{};
}
Words4 stream(const Words4* p, uint64_t) {
    return streamed(p);
}
uint32_t stream(const uint32_t* p, uint64_t) {
    return streamed(p);
}
uint32_t stream(const uint16_t* p, uint64_t) {
    return streamed(p);
}

void copy_async(void* shared, const void* global) {
    check_read(global, 16);
    block.fibers[block.current].copies.back().push_back({shared, global});
}

void commit_copies() {
    block.fibers[block.current].copies.emplace_back();
}

void finish_copies(int last) {
    auto& groups = block.fibers[block.current].copies;
    for (; static_cast<int>(groups.size()) > last + 1 && fault.empty(); groups.pop_front())
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
}

uint32_t ballot(bool holds) {
    const int first = block.current / kLanes * kLanes;
    block.operands[block.current].a[0] = holds;
    sync_warp();
    uint32_t found = 0;
    for (int i = 0; i < kLanes; ++i) found |= block.operands[first + i].a[0] << i;
    sync_warp();
    return found;
}

uint32_t from_lane(uint32_t value, int lane) {
    const int first = block.current / kLanes * kLanes;
    block.operands[block.current].a[0] = value;
    sync_warp();
    const uint32_t found = block.operands[first + lane % kLanes].a[0];
    sync_warp();
    return found;
}

float float_from_lane(float value, int lane) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = from_lane(bits, lane);
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

template <class T>
void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    const int first = block.current / kLanes * kLanes;
    Operands& mine = block.operands[block.current];
    std::memcpy(mine.c, c, sizeof mine.c);
    std::memcpy(mine.a, a, sizeof mine.a);
    std::memcpy(mine.b, b, sizeof mine.b);
    sync_warp();
    multiply<T>(&block.operands[first], block.current - first, c);
    sync_warp();
}
template void mma<BFloat16>(float*, const uint32_t*, const uint32_t*);
template void mma<Float16>(float*, const uint32_t*, const uint32_t*);

uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i)
        out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return out;
}

float half_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float x = exponent == 31  ? (mantissa ? NAN : INFINITY)
              : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
    return bits & 0x8000 ? -x : x;
}

uint16_t half_from_float(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (std::isnan(x)) return sign | 0x7E00;
    if (x >= 65520.0f) return sign | 0x7C00;
    if (x == 0.0f) return sign;
    int exponent = std::max(std::ilogb(x), -14);
    auto units = static_cast<int>(std::nearbyint(std::ldexp(x, 10 - exponent)));  // ties to even
    return static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + units));
}

const char* emulate_grid(const std::function<void()>& thread, int64_t grid_x, int64_t grid_y,
                         int threads, int shared) {
    fault.clear();
    if (shared > kMostShared) fail("a block has no " + std::to_string(shared) + " bytes");
    if (grid_x < 1 || grid_x > INT32_MAX || grid_y < 1 || grid_y > 65535) fail("no such grid");
    block.thread = &thread;
    block.grid = grid_x;
    while (static_cast<int>(block.fibers.size()) < threads) {
        block.fibers.emplace_back();
        block.fibers.back().stack = std::make_unique<char[]>(kStack);
    }
    for (block.y = 0; block.y < grid_y && fault.empty(); ++block.y)
        for (block.x = 0; block.x < grid_x && fault.empty(); ++block.x) {
            block.shared.assign(shared + 256, 0xFF);  // NaN: memory that nobody has written
            run_block(threads);
            for (int i = 0; i < 128 && fault.empty(); ++i)
                if (shared_memory()[shared + i] != 0xFF &&
                    &shared_memory()[shared + i] <= &block.shared.back())
                    fail("write beyond shared memory");
        }
    return fault.empty() ? nullptr : fault.c_str();
}

}  // namespace lottery_sparse

// ---- what the tests call -----------------------------------------------------------------------

using namespace lottery_sparse;

// Only tensors that a test names may be read; 0 bytes: forget all.
extern "C" void ls_emulate_readable(const void* begin, int64_t bytes) {
    const auto at = reinterpret_cast<uintptr_t>(begin);
    if (bytes)
        readable.push_back({at, at + static_cast<uintptr_t>(bytes)});
    else
        readable.clear();
}

// Threads run one after another up to each barrier, so a missing one shows in one of both orders.
extern "C" void ls_emulate_descending(bool first) {
    descending = first;
}
