// See cuda_optim.h. A block updates a chunk of one part, a thread four elements of it; the new
// values go on into the dense weights that hold them.
#include <cmath>

#include "common/cuda_kernel.h"
#include "optim/cuda_optim.h"

namespace lottery_sparse {
namespace {

constexpr int kEach = 4;
constexpr int kThreads = kStepChunk / kEach;
constexpr int kBlocks = 4;  // of a multiprocessor
constexpr int kCountThreads = 128;

// The last i with list[i] <= value. The list ascends, and list[0] <= value. The lanes of a warp
// call it together and look at 32 numbers at a time.
LS_DEVICE int last_at_most(const int64_t* list, int count, int64_t value) {
    const int lane = thread_index() % kLanes;
    int low = 0;
    while (count > 1) {
        const int step = (count + kLanes - 1) / kLanes, ahead = lane * step;
        const bool passed = ahead < count && list[low + ahead] <= value;
        const int ones = count_ones(ballot(passed)), skip = (ones ? ones - 1 : 0) * step;
        low += skip;
        count = step < count - skip ? step : count - skip;
    }
    return low;
}

// A thread's elements of a part.
struct Elements {
    const int64_t* part;
    int64_t begin, used;
    bool whole;  // all four are there, and aligned

    LS_MEMBER explicit Elements(const CudaStep& p) {
        const int parts = static_cast<int>(p.parts),
                  number = last_at_most(p.table, parts, block_x());
        part = p.table + p.parts + 1 + int64_t{number} * kPart;
        const int64_t shift = part[5];
        begin = (block_x() - p.table[number]) * kStepChunk - (shift > 0 ? shift : 0) +
                thread_index() * kEach;
        used = part[4];
        if (part[7] < part[8]) {  // spare slots are left alone
            const int64_t* target = p.targets + part[7] * kTarget;
            const int64_t kept = reinterpret_cast<const int64_t*>(target[1])[target[3]];
            used = kept < used ? kept : used;
        }
        whole = shift >= 0 && begin >= 0 && begin + kEach <= used;
    }
    LS_MEMBER bool inside(int j) const { return begin + j >= 0 && begin + j < used; }

    template <class T>
    LS_MEMBER void load(int which, float to[kEach]) const {
        using Bits = typename T::Bits;
        const Bits* from = reinterpret_cast<const Bits*>(part[which]) + begin;
        if (whole) {
            if (sizeof(Bits) == 4) {
                const Words4 words = words_at(from);
                LS_UNROLL
                for (int j = 0; j < kEach; ++j) to[j] = T::to_float(words.word[j]);
            } else {
                const Words2 words = *reinterpret_cast<const Words2*>(from);
                LS_UNROLL
                for (int j = 0; j < kEach; ++j)
                    to[j] = T::to_float(words.word[j / 2] >> j % 2 * 16 & 0xFFFFu);
            }
        } else {
            LS_UNROLL
            for (int j = 0; j < kEach; ++j) to[j] = inside(j) ? T::to_float(from[j]) : 0.0f;
        }
    }
    template <class T>
    LS_MEMBER void store(int which, const float from[kEach]) const {
        using Bits = typename T::Bits;
        Bits* to = reinterpret_cast<Bits*>(part[which]) + begin;
        uint32_t bits[kEach];
        LS_UNROLL
        for (int j = 0; j < kEach; ++j) bits[j] = T::from_float(from[j]);
        if (whole && sizeof(Bits) == 4) {
            *reinterpret_cast<Words4*>(to) = {{bits[0], bits[1], bits[2], bits[3]}};
        } else if (whole) {
            *reinterpret_cast<Words2*>(to) = {{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16}};
        } else {
            LS_UNROLL
            for (int j = 0; j < kEach; ++j)
                if (inside(j)) to[j] = static_cast<Bits>(bits[j]);
        }
    }
};

// The new values to their places in all dense weights of the part. A warp finds the rows of its
// first and last slot, and its lanes their own between them.
LS_DEVICE void spread(const CudaStep& p, const Elements& at, const float value[kEach]) {
    const int64_t warp_begin = at.begin - thread_index() % kLanes * kEach;
    const int64_t first = warp_begin > 0 ? warp_begin : 0;
    const int64_t warp_end = warp_begin + kLanes * kEach;
    const int64_t last = (warp_end < at.used ? warp_end : at.used) - 1;
    if (first > last) return;
    for (int64_t number = at.part[7]; number < at.part[8]; ++number) {
        const int64_t* target = p.targets + number * kTarget;
        void* const dense = reinterpret_cast<void*>(target[0]);
        if (!dense) continue;
        const int64_t* starts = reinterpret_cast<const int64_t*>(target[1]);
        const void* const columns = reinterpret_cast<const void*>(target[2]);
        const int rows = static_cast<int>(target[3]), kind = static_cast<int>(target[5]);
        const int row = last_at_most(starts, rows, first);
        const int last_row = row + last_at_most(starts + row, rows - row, last);
        LS_UNROLL
        for (int j = 0; j < kEach; ++j) {
            if (!at.inside(j)) continue;
            const int64_t slot = at.begin + j;
            int low = row, high = last_row;
            while (low < high) {
                const int middle = (low + high + 1) / 2;
                if (starts[middle] <= slot)
                    low = middle;
                else
                    high = middle - 1;
            }
            const int64_t column = kind >= 4 ? static_cast<const int32_t*>(columns)[slot]
                                             : static_cast<const uint16_t*>(columns)[slot];
            store_number(dense, static_cast<Number>(kind % 4), low * target[4] + column, value[j]);
        }
    }
}

// The gradient to descend, with L2 decay.
LS_DEVICE float descent(float g, float value, bool maximize, float decay) {
    g = maximize ? -g : g;
    return decay != 0.0f ? fused(decay, value, g) : g;
}

// The order of operations is that of masked_optim_cpu.cpp.
template <class T>
LS_GLOBAL(kThreads, kBlocks)
sgd_kernel(CudaSgd p) {
    const Elements at(p.step);
    const float lr = p.step.lr ? *p.step.lr : p.step.rate;
    float value[kEach], g[kEach];
    at.load<T>(0, value);
    at.load<T>(1, g);
    float buffer[kEach] = {};
    if (p.states && !p.first) at.load<T>(2, buffer);
    LS_UNROLL
    for (int j = 0; j < kEach; ++j) {
        g[j] = descent(g[j], value[j], p.maximize, p.weight_decay);
        if (p.states) {
            buffer[j] = p.first ? g[j] : fused(p.undamped, g[j], buffer[j] * p.momentum);
            g[j] = p.nesterov ? fused(p.momentum, buffer[j], g[j]) : buffer[j];
        }
        value[j] = fused(-lr, g[j], value[j]);
    }
    if (p.states) at.store<T>(2, buffer);
    at.store<T>(0, value);
    spread(p.step, at, value);
}

template <class T>
LS_GLOBAL(kThreads, kBlocks)
adam_kernel(CudaAdam p) {
    const Elements at(p.step);
    float value[kEach], g[kEach], m[kEach], v[kEach];
    at.load<T>(0, value);
    at.load<T>(1, g);
    at.load<T>(2, m);
    at.load<T>(3, v);
    const float lr = p.step.lr ? *p.step.lr : p.step.rate;
    const float* own = p.factors ? p.factors + 2 * at.part[6] : nullptr;
    const float step_size = own ? own[0] : p.step_size;
    const float second_scale = own ? own[1] : p.second_scale;
    const float decay = p.decoupled ? 0.0f : p.weight_decay;
    const float shrink = p.decoupled ? 1.0f - lr * p.weight_decay : 1.0f;
    // from the nearer end, as torch.lerp does
    const bool near = p.beta1_rest < 0.5f;
    const float weight = near ? p.beta1_rest : p.beta1_rest - 1.0f;
    LS_UNROLL
    for (int j = 0; j < kEach; ++j) {
        g[j] = descent(g[j], value[j], p.maximize, decay);
        m[j] = fused(weight, g[j] - m[j], near ? m[j] : g[j]);
        v[j] = fused(p.beta2_rest * g[j], g[j], v[j] * p.beta2);
        const float denominator = square_root(v[j]) / second_scale + p.eps;
        value[j] = value[j] * shrink + step_size * m[j] / denominator;
    }
    at.store<T>(2, m);
    at.store<T>(3, v);
    at.store<T>(0, value);
    spread(p.step, at, value);
}

LS_GLOBAL(kCountThreads, 1)
count_kernel(CudaCount p) {
    const int64_t i = int64_t{block_x()} * kCountThreads + thread_index();
    if (i >= p.count) return;
    float* const step = reinterpret_cast<float*>(p.steps[i]);
    const float t = *step + 1.0f;
    *step = t;
    const double lr = p.lr ? *p.lr : p.rate;
    p.factors[2 * i] = static_cast<float>(-lr / (1.0 - exp(t * p.log_beta1)));
    p.factors[2 * i + 1] = static_cast<float>(sqrt(1.0 - exp(t * p.log_beta2)));
}

}  // namespace

const char* cuda_sgd_step(const CudaSgd& p, const Device& device) {
    const auto kernel = p.step.type == Number::kFloat     ? sgd_kernel<Float32>
                        : p.step.type == Number::kFloat16 ? sgd_kernel<Float16>
                                                          : sgd_kernel<BFloat16>;
    return launch(kernel, p.step.chunks, 1, kThreads, 0, device, p);
}

const char* cuda_adam_step(const CudaAdam& p, const Device& device) {
    const auto kernel = p.step.type == Number::kFloat     ? adam_kernel<Float32>
                        : p.step.type == Number::kFloat16 ? adam_kernel<Float16>
                                                          : adam_kernel<BFloat16>;
    return launch(kernel, p.step.chunks, 1, kThreads, 0, device, p);
}

const char* cuda_count_steps(const CudaCount& p, const Device& device) {
    return launch(count_kernel, (p.count + kCountThreads - 1) / kCountThreads, 1, kCountThreads, 0,
                  device, p);
}

}  // namespace lottery_sparse
