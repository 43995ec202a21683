#include "linear/list_check.h"

namespace lottery_sparse {
namespace {

// The largest number decides; compilers make vectors of this loop.
template <class Index>
bool below(const Index* numbers, int64_t count, int64_t bound) {
    if (count == 0) return true;
    Index most = 0;
    for (int64_t i = 0; i < count; ++i) most = numbers[i] > most ? numbers[i] : most;
    return static_cast<int64_t>(most) < bound;
}

// Only a sign bit decides, again for vectors. Numbers that are not negative have a difference that
// fits; that of others may be anything.
bool ascend(const int64_t* numbers, int64_t count) {
    uint64_t signs = static_cast<uint64_t>(numbers[0]);
    for (int64_t i = 0; i < count; ++i) {
        const auto here = static_cast<uint64_t>(numbers[i]),
                   next = static_cast<uint64_t>(numbers[i + 1]);
        signs |= next | (next - here);
    }
    return static_cast<int64_t>(signs) >= 0;
}

}  // namespace

const ListCheckKernels LS_KERNELS(list_check) = {below<uint16_t>, below<uint32_t>, ascend};

}  // namespace lottery_sparse
