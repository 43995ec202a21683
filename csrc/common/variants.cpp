#include "common/variants.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace lottery_sparse {
namespace {

constexpr const char* kNames[kVariants] = {"portable", "avx2", "avx512"};

Variant choose() {
    Variant best = Variant::kPortable;
    std::string usable;
    const char* forced = std::getenv("LS_CPU");
    for (int i = 0; i < kVariants; ++i) {
        const Variant variant = static_cast<Variant>(i);
        if (!variant_compiled(variant) || !variant_runs_here(variant)) continue;
        if (forced && std::string(forced) == kNames[i]) return variant;
        best = variant;
        usable += std::string(usable.empty() ? "" : ", ") + kNames[i];
    }
    if (forced && *forced)
        throw std::runtime_error("LS_CPU is '" + std::string(forced) +
                                 "', but this build on this machine can run: " + usable +
                                 "; unset LS_CPU to use the best.");
    return best;
}

}  // namespace

const char* variant_name(Variant variant) {
    return kNames[static_cast<int>(variant)];
}

int variant_numerics(Variant variant) {
    constexpr int kOrder = 1;
    return variant == Variant::kPortable ? -kOrder : kOrder;
}

bool variant_compiled(Variant variant) {
#if LS_X86_VARIANTS
    return static_cast<int>(variant) < kVariants;
#else
    return variant == Variant::kPortable;
#endif
}

bool variant_runs_here(Variant variant) {
#if LS_X86_VARIANTS
    switch (variant) {
        case Variant::kAvx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   variant_runs_here(Variant::kAvx2);
        case Variant::kAvx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                   __builtin_cpu_supports("popcnt");
        case Variant::kPortable:
            return true;
    }
    return false;
#else
    return variant == Variant::kPortable;
#endif
}

Variant chosen_variant() {
    static const Variant variant = choose();
    return variant;
}

}  // namespace lottery_sparse
