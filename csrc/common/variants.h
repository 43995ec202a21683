// CPU variants: kernel files are compiled once per instruction set, one is chosen at run time.
// A kernel file defines LS_KERNELS(table); its header declares all of them; callers use
// LS_CHOSEN_KERNELS(table).
#pragma once

namespace lottery_sparse {

enum class Variant { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr int kVariants = 3;

const char* variant_name(Variant variant);
bool variant_compiled(Variant variant);
bool variant_runs_here(Variant variant);
// Variants of one number give the same float32 results, bit for bit. The size of the number names
// the order of sums; the sign is negative where products are rounded before they are added
// (portable code). Studies record the number (dispatch.numerics).
int variant_numerics(Variant variant);

// The best variant of this machine, or the one named by LS_CPU (read once). Throws
// std::runtime_error if LS_CPU names a variant that is unknown, not compiled or cannot run here.
Variant chosen_variant();

}  // namespace lottery_sparse

#define LS_JOIN_(a, b) a##_##b
#define LS_JOIN(a, b) LS_JOIN_(a, b)
// LS_VARIANT is portable, avx2 or avx512 in a file compiled per variant.
#define LS_KERNELS(table) LS_JOIN(table, LS_VARIANT)

#if LS_X86_VARIANTS
#define LS_DECLARE_KERNELS(Table, table) \
    extern const Table table##_portable, table##_avx2, table##_avx512
#define LS_CHOSEN_KERNELS(table)                           \
    (chosen_variant() == Variant::kAvx512 ? table##_avx512 \
     : chosen_variant() == Variant::kAvx2 ? table##_avx2   \
                                          : table##_portable)
#else
#define LS_DECLARE_KERNELS(Table, table) extern const Table table##_portable
#define LS_CHOSEN_KERNELS(table) ((void)chosen_variant(), table##_portable)
#endif
