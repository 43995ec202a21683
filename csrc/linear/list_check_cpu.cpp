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

}  // namespace

const ListCheckKernels LS_KERNELS(list_check) = {below<uint16_t>, below<uint32_t>};

}  // namespace lottery_sparse
