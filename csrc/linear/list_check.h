// Whether lists of kept weights stay within what they number. Kernels index with them, so each call
// checks what it reads, right before it does: then the lists are in the cache for both.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/variants.h"

namespace lottery_sparse {

struct ListCheckKernels {
    // Whether all of `count` numbers are below `bound`.
    bool (*below_16)(const uint16_t* numbers, int64_t count, int64_t bound);
    bool (*below_32)(const uint32_t* numbers, int64_t count, int64_t bound);
    // Whether none of the first `count` + 1 numbers is negative, or below the one before it.
    bool (*ascend)(const int64_t* numbers, int64_t count);
};

LS_DECLARE_KERNELS(ListCheckKernels, list_check);

// Of one call, shared by its threads.
class ListCheck {
  public:
    // Whether `starts` ascend within [0, slots] over rows [begin, end).
    bool starts(const char* name, const int64_t* starts, int64_t begin, int64_t end,
                int64_t slots) {
        const bool fit = starts[end] <= slots && kernels_.ascend(starts + begin, end - begin);
        return fit || refuse(name, "must ascend from 0 to at most the number of slots");
    }
    // Whether numbers [0, count) are below `bound`.
    template <class Index>
    bool numbers(const char* name, const Index* numbers, int64_t count, int64_t bound) {
        bool fit;
        if constexpr (sizeof(Index) == 2)
            fit = kernels_.below_16(reinterpret_cast<const uint16_t*>(numbers), count, bound);
        else
            fit = kernels_.below_32(reinterpret_cast<const uint32_t*>(numbers), count, bound);
        return fit || refuse(name, "must be at least 0 and below what they number");
    }
    bool refuse(const char* name, const char* wanted) {
        const char* none = nullptr;
        if (name_.compare_exchange_strong(none, name)) wanted_.store(wanted);
        return false;
    }
    bool refused() const { return name_.load(); }
    // After the threads are done: throws if one of them refused its part.
    void done() const {
        if (const char* name = name_.load())
            throw std::runtime_error(std::string(name) + " " + wanted_.load() +
                                     "; make the lists with KeptLists.of, or pack them again.");
    }

  private:
    const ListCheckKernels& kernels_ = LS_CHOSEN_KERNELS(list_check);
    std::atomic<const char*> name_{nullptr}, wanted_{nullptr};
};

}  // namespace lottery_sparse
