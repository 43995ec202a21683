// How a driver runs a loop on several threads without knowing torch: the rim passes the function.
#pragma once

#include <cstdint>

namespace lottery_sparse {

class Parallel {
  public:
    using Body = void (*)(int64_t begin, int64_t end, void* context);
    using Run = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

    explicit Parallel(Run run) : run_(run) {}

    // Calls f(first, last) on disjoint ranges that cover [0, count). f must not throw: an exception
    // would lose its message on the way through torch's C interface.
    template <class F>
    void operator()(int64_t count, int64_t grain, const F& f) const {
        if (count == 0) return;
        const Body body = [](int64_t begin, int64_t end, void* context) {
            (*static_cast<const F*>(context))(begin, end);
        };
        run_(0, count, grain, body, const_cast<void*>(static_cast<const void*>(&f)));
    }

  private:
    Run run_;
};

}  // namespace lottery_sparse
