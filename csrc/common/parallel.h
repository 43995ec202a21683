// How a driver runs a loop on several threads without knowing torch: the rim passes the function.
#pragma once

#include <atomic>
#include <cstdint>

namespace lottery_sparse {

// Counts the threads that run ranges of loops. Tests ask for the count: a loop that should be
// parallel and is not gives the right numbers all the same.
inline std::atomic<int64_t> counting_round{0}, counted_threads{0};

inline void count_this_thread() {
    thread_local int64_t counted_in = -1;
    const int64_t round = counting_round.load(std::memory_order_relaxed);
    if (counted_in == round) return;
    counted_in = round;
    counted_threads.fetch_add(1, std::memory_order_relaxed);
}

// The count since the last call. No loop may run meanwhile.
inline int64_t threads_used() {
    counting_round.fetch_add(1);
    return counted_threads.exchange(0);
}

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
            count_this_thread();
            (*static_cast<const F*>(context))(begin, end);
        };
        run_(0, count, grain, body, const_cast<void*>(static_cast<const void*>(&f)));
    }

  private:
    Run run_;
};

}  // namespace lottery_sparse
