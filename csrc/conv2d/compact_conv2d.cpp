// compact_conv2d on the CPU: which networks take which kernels. A network's way depends on its own
// kept weights only: same bits alone or among others.
#include <cstddef>

#include "conv2d/sparse_conv2d_planes.h"

namespace lottery_sparse {
namespace {

// Calls f(first network, end, whether on planes) for runs of networks that take the same way.
template <class F>
void for_runs(const Conv2dShape& s, const CompactLists& lists, bool backward, const F& f) {
    const auto planes = [&](int64_t e) {
        return planes_win(s, lists.starts[e * (s.out_channels + 1) + s.out_channels], backward);
    };
    for (int64_t begin = 0, end; begin < s.replicates; begin = end) {
        const bool first = planes(begin);
        for (end = begin + 1; end < s.replicates && planes(end) == first;) ++end;
        f(begin, end, first);
    }
}

template <class T>
T* moved(T* p, int64_t count) {
    return p ? p + count : p;
}

CompactLists moved(const CompactLists& lists, const Conv2dShape& s, int64_t e) {
    const int64_t k = s.in_channels / s.groups * s.kernel.h * s.kernel.w;
    const int64_t bytes = e * lists.capacity * (lists.wide ? sizeof(uint32_t) : sizeof(uint16_t));
    const auto numbers = [&](const void* p) -> const void* {
        return moved(static_cast<const std::byte*>(p), bytes);
    };
    return {lists.starts + e * (s.out_channels + 1),
            numbers(lists.columns),
            moved(lists.column_starts, e * (k + 1)),
            numbers(lists.rows),
            moved(lists.positions, e * lists.capacity),
            lists.capacity,
            lists.wide};
}

int64_t x_floats(const Conv2dShape& s) {
    return s.shared_x ? 0 : s.batch * s.in_channels * s.image.h * s.image.w;
}

int64_t y_floats(const Conv2dShape& s) {
    return s.batch * s.out_channels * s.output.h * s.output.w;
}

}  // namespace

void compact_conv2d_forward(const CompactConv2dForward& p, const Parallel& parallel) {
    const Conv2dShape& s = p.shape;
    for_runs(s, p.lists, false, [&](int64_t e, int64_t end, bool planes) {
        CompactConv2dForward run = {s,
                                    moved(p.lists, s, e),
                                    p.x + e * x_floats(s),
                                    p.values + e * p.lists.capacity,
                                    moved(p.bias, e * s.out_channels),
                                    p.y + e * y_floats(s)};
        run.shape.replicates = end - e;
        (planes ? compact_conv2d_planes_forward : compact_conv2d_lanes_forward)(run, parallel);
    });
}

void compact_conv2d_backward(const CompactConv2dBackward& p, const Parallel& parallel) {
    const Conv2dShape& s = p.shape;
    for_runs(s, p.lists, true, [&](int64_t e, int64_t end, bool planes) {
        CompactConv2dBackward run = {s,
                                     moved(p.lists, s, e),
                                     p.dy + e * y_floats(s),
                                     p.x + e * x_floats(s),
                                     p.values + e * p.lists.capacity,
                                     moved(p.dx, e * x_floats(s)),
                                     moved(p.dvalues, e * p.lists.capacity),
                                     moved(p.dbias, e * s.out_channels),
                                     p.add_dx || (s.shared_x && e > 0)};
        run.shape.replicates = end - e;
        (planes ? compact_conv2d_planes_backward : compact_conv2d_lanes_backward)(run, parallel);
    });
}

}  // namespace lottery_sparse
