#include "linear/list_below.h"
#include "linear/list_check.h"

namespace lottery_sparse {
namespace {

template <class Index>
bool all_below(const Index* numbers, int64_t count, int64_t bound) {
    return below(numbers, count, bound);
}

}  // namespace

const ListCheckKernels LS_KERNELS(list_check) = {all_below<uint16_t>, all_below<uint32_t>, ascend};

}  // namespace lottery_sparse
