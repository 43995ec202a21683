// compact_conv2d on lines of images: where things lie and in which order; kernels in
// sparse_conv2d_cpu.cpp.
#include "conv2d/sparse_conv2d.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "conv2d/sparse_conv2d_geometry.h"

namespace lottery_sparse {
namespace {

// The taps of all replicates.
struct Taps {
    Buffer<Tap> taps;             // [E, C]
    std::vector<int64_t> starts;  // [E, phases, channels + 1]
};

// Units are worked on in groups: those of one tile follow each other, replicates ascending.
struct Group {
    int64_t begin;
    int64_t end;
    int64_t replicates;

    Unit unit(int64_t i) const { return {i / replicates, i % replicates}; }
    int64_t first_tile() const { return begin / replicates; }
    int64_t tiles() const { return (end - 1) / replicates + 1 - first_tile(); }
    // Replicates of a tile that are in this group.
    Pair of_tile(int64_t tile) const {
        return {std::max(begin - tile * replicates, int64_t{0}),
                std::min(end - tile * replicates, replicates)};
    }
};

class Conv2d {
  public:
    Conv2d(const Conv2dShape& shape, const CompactLists& lists, const Parallel& parallel)
        : s_(shape),
          lists_(lists),
          parallel_(parallel),
          tiles_(divide_up(shape.batch, kLanes)),
          group_in_(shape.in_channels / shape.groups),
          group_out_(shape.out_channels / shape.groups),
          x_window_(x_window(shape)),
          x_tile_(shape.in_channels * x_window_.plane() * kLineFloats) {}

    void forward(const CompactConv2dForward& p) const;
    void backward(const CompactConv2dBackward& p) const;

  private:
    int64_t most_units(int64_t floats) const {
        const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
        const int64_t fit = std::max<int64_t>(kGroupBytes / std::max<int64_t>(bytes, 1), 1);
        return std::min(fit, std::max<int64_t>(tiles_ * s_.replicates, 1));
    }
    Pair span() const {
        return {(s_.kernel.h - 1) * s_.dilation.h + 1, (s_.kernel.w - 1) * s_.dilation.w + 1};
    }
    // Calls f(group) for all units, as many at a time as `floats` a unit allow.
    template <class F>
    void for_groups(int64_t floats, const F& f) const {
        const int64_t units = tiles_ * s_.replicates, size = most_units(floats);
        for (int64_t u = 0; u < units; u += size)
            f(Group{u, std::min(u + size, units), s_.replicates});
    }
    // Packs the x of a group; x_at says where that of a unit lies.
    void pack_x(const Packing& packing, const float* x, const Group& group, float* planes) const {
        packing(
            x, s_.shared_x ? group.tiles() : group.end - group.begin,
            [&](int64_t i) {
                return s_.shared_x ? Unit{group.first_tile() + i, 0} : group.unit(group.begin + i);
            },
            s_.batch, s_.in_channels, s_.channels_last, planes, parallel_);
    }
    int64_t x_at(const Group& group, int64_t i) const {
        return (s_.shared_x ? group.unit(i).tile - group.first_tile() : i - group.begin) * x_tile_;
    }
    void check_columns() const;
    Taps taps_by_row(const float* values) const;
    Taps taps_by_column(const float* values, const Window& dy) const;
    void dx(const CompactConv2dBackward& p, const Group& group, const Taps& taps, const float* dy,
            const Window& window) const;
    void sample(const CompactConv2dBackward& p, const Group& group, const Taps& taps,
                const float* dy, const Window& window, const float* x) const;

    // Slots by column of (group, column).
    Pair column_range(int64_t e, int64_t group, int64_t column) const {
        const int64_t k = group_in_ * s_.kernel.h * s_.kernel.w;
        const int64_t* starts = lists_.column_starts + e * (k + 1) + column;
        if (s_.groups == 1) return {starts[0], starts[1]};
        const auto first_of = [&](int64_t row) {
            int64_t begin = starts[0], end = starts[1];
            while (begin < end) {
                const int64_t middle = (begin + end) / 2;
                if (number_at(lists_.rows, lists_.wide, e * lists_.capacity + middle) < row)
                    begin = middle + 1;
                else
                    end = middle;
            }
            return begin;
        };
        return {first_of(group * group_out_), first_of((group + 1) * group_out_)};
    }

    const Conv2dShape s_;
    const CompactLists lists_;
    const Parallel& parallel_;
    const int64_t tiles_, group_in_, group_out_;
    const Window x_window_;
    const int64_t x_tile_;  // floats
};

// Checks the lists by column. With groups, rows must ascend: column_range searches them.
void Conv2d::check_columns() const {
    const int64_t k = group_in_ * s_.kernel.h * s_.kernel.w;
    ListCheck check;
    parallel_(s_.replicates * k, kTapGrain, [&](int64_t begin, int64_t end) {
        for_matrices(begin, end, k, [&](int64_t e, int64_t first, int64_t last) {
            const int64_t* starts = lists_.column_starts + e * (k + 1);
            if (!check.starts("kept.column_starts", starts, first, last, lists_.capacity)) return;
            const int64_t slots = e * lists_.capacity, count = starts[last] - starts[first];
            if (!check_numbers("kept.rows", lists_.rows, lists_.wide, slots + starts[first], count,
                               s_.out_channels, check) ||
                !check.numbers("kept.positions", lists_.positions + slots + starts[first], count,
                               lists_.capacity))
                return;
            for (int64_t c = first; s_.groups > 1 && c < last; ++c)
                for (int64_t i = slots + starts[c] + 1; i < slots + starts[c + 1]; ++i)
                    if (number_at(lists_.rows, lists_.wide, i) <
                        number_at(lists_.rows, lists_.wide, i - 1))
                        check.refuse("kept.rows", "must ascend within a column");
        });
    });
    check.done();
}

// The taps of y and dvalues: what each kept weight reads of the packed x. Without `values`, a tap
// has the value 0.
Taps Conv2d::taps_by_row(const float* values) const {
    const int64_t rows = s_.out_channels, kernel = s_.kernel.h * s_.kernel.w;
    std::vector<int64_t> line(group_in_ * kernel);
    for (int64_t c = 0; c < group_in_ * kernel; ++c)
        line[c] = c / kernel * x_window_.plane() +
                  c % kernel / s_.kernel.w * s_.dilation.h * x_window_.size.w +
                  c % s_.kernel.w * s_.dilation.w;
    const int64_t all = s_.replicates * lists_.capacity;
    Taps taps{buffer<Tap>(all), {lists_.starts, lists_.starts + s_.replicates * (rows + 1)}};
    ListCheck check;
    parallel_(s_.replicates * rows, kTapGrain, [&](int64_t begin, int64_t end) {
        if (!rows_fit(lists_, rows, begin, end, group_in_ * kernel, check)) return;
        for (int64_t r = begin; r < end; ++r) {
            const int64_t e = r / rows, first = e * lists_.capacity,
                          *starts = lists_.starts + r + e;
            const int64_t base = r % rows / group_out_ * group_in_ * x_window_.plane();
            for (int64_t i = first + starts[0]; i < first + starts[1]; ++i)
                taps.taps[i] = {
                    values ? values[i] : 0.0f,
                    static_cast<int32_t>(base + line[number_at(lists_.columns, lists_.wide, i)])};
        }
    });
    check.done();
    return taps;
}

// The taps of dx, by phase and input channel: what each kept weight reads of the packed dy.
Taps Conv2d::taps_by_column(const float* values, const Window& dy) const {
    check_columns();
    const int64_t channels = s_.in_channels, phases = s_.stride.h * s_.stride.w;
    const int64_t kernel = s_.kernel.h * s_.kernel.w, plane = dy.plane();
    std::vector<std::vector<Pair>> reads(phases);  // (entry of the kernel, line)
    for (int64_t r = 0; r < s_.kernel.h; ++r)
        for (int64_t c = 0; c < s_.kernel.w; ++c) {
            const Reads h = reads_of(r, s_.stride.h, s_.padding.h, s_.dilation.h);
            const Reads w = reads_of(c, s_.stride.w, s_.padding.w, s_.dilation.w);
            reads[h.phase * s_.stride.w + w.phase].push_back(
                {r * s_.kernel.w + c, (h.shift - dy.low.h) * dy.size.w + w.shift - dy.low.w});
        }
    const int64_t runs = s_.replicates * phases;
    Taps taps{buffer<Tap>(s_.replicates * lists_.capacity),
              std::vector<int64_t>(runs * (channels + 1))};
    // Calls f(first slot by column, end, line) for the lists of a channel in a phase.
    const auto for_lists = [&](int64_t run, int64_t channel, const auto& f) {
        const int64_t e = run / phases, group = channel / group_in_;
        for (const Pair& read : reads[run % phases]) {
            const Pair range = column_range(e, group, channel % group_in_ * kernel + read.h);
            f(range.h, range.w, read.w);
        }
    };
    for (int64_t run = 0; run < runs; ++run) {
        int64_t* starts = taps.starts.data() + run * (channels + 1);
        starts[0] = run % phases ? starts[-1] : 0;
        for (int64_t c = 0; c < channels; ++c) {
            starts[c + 1] = starts[c];
            for_lists(run, c, [&](int64_t i, int64_t end, int64_t) { starts[c + 1] += end - i; });
        }
    }
    parallel_(runs * channels, kTapGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t run = i / channels, c = i % channels;
            const int64_t first = run / phases * lists_.capacity;
            Tap* tap = taps.taps.get() + first + taps.starts[run * (channels + 1) + c];
            for_lists(run, c, [&](int64_t slot, int64_t last, int64_t line) {
                for (int64_t j = first + slot; j < first + last; ++j)
                    *tap++ = {values[first + lists_.positions[j]],
                              static_cast<int32_t>(number_at(lists_.rows, lists_.wide, j) * plane +
                                                   line)};
            });
        }
    });
    return taps;
}

void Conv2d::forward(const CompactConv2dForward& p) const {
    const Taps taps = taps_by_row(p.values);
    const Packing packing(s_.image, x_window_);
    const Grid grid = grid_of(s_.output);
    const Regions regions(grid, group_in_, s_.stride, span(), 1, s_.channels_last);
    const int64_t channels = s_.out_channels, blocks = divide_up(channels, kTaskChannels);
    const int64_t image = channels * s_.output.h * s_.output.w;
    const auto multiply = LS_CHOSEN_KERNELS(sparse_conv2d).multiply;
    const Buffer<float> x = buffer<float>(most_units(x_tile_) * x_tile_);
    for_groups(x_tile_, [&](const Group& group) {
        pack_x(packing, p.x, group, x.get());
        const int64_t tasks = (group.end - group.begin) * regions.total() * blocks;
        parallel_(tasks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t c = i % blocks * kTaskChannels, region = i / blocks % regions.total();
                const int64_t u = group.begin + i / blocks / regions.total();
                const auto [tile, e] = group.unit(u);
                const int64_t first = tile * kLanes;
                const Phase phase = {taps.starts.data() + e * (channels + 1), {0, 0}};
                multiply({taps.taps.get() + e * lists_.capacity,
                          &phase,
                          1,
                          x.get() + x_at(group, u),
                          s_.stride.h * x_window_.size.w,
                          s_.stride.w,
                          grid.block.h,
                          regions.first(region),
                          regions.size_of(region),
                          {1, 1},
                          c,
                          std::min(c + kTaskChannels, channels),
                          p.bias ? p.bias + e * channels : nullptr,
                          p.y + (e * s_.batch + first) * image,
                          image,
                          std::min(kLanes, s_.batch - first),
                          channels,
                          s_.output,
                          s_.channels_last,
                          /*add=*/false});
            }
        });
    });
}

void Conv2d::dx(const CompactConv2dBackward& p, const Group& group, const Taps& taps,
                const float* dy, const Window& window) const {
    const Grid grid = grid_of(dx_positions(s_));
    const Pair span = {window.size.h - grid.rounded.h + 1, window.size.w - grid.rounded.w + 1};
    const int64_t phases = s_.stride.h * s_.stride.w;
    const Regions regions(grid, group_out_, {1, 1}, span, phases, s_.channels_last);
    const int64_t channels = s_.in_channels, blocks = divide_up(channels, kTaskChannels);
    const int64_t image = channels * s_.image.h * s_.image.w;
    const int64_t dy_tile = s_.out_channels * window.plane() * kLineFloats;
    const auto multiply = LS_CHOSEN_KERNELS(sparse_conv2d).multiply;
    parallel_(group.tiles() * regions.total() * blocks, 1, [&](int64_t begin, int64_t end) {
        Phase phase[kMaxPhases];
        for (int64_t i = begin; i < end; ++i) {
            const int64_t c = i % blocks * kTaskChannels, region = i / blocks % regions.total();
            const int64_t tile = group.first_tile() + i / blocks / regions.total();
            const int64_t first = tile * kLanes;
            const Pair replicates = group.of_tile(tile);
            // those that share x add to the same dx, one after the other
            for (int64_t e = replicates.h; e < replicates.w; ++e) {
                for (int64_t f = 0; f < phases; ++f)
                    phase[f] = {taps.starts.data() + (e * phases + f) * (channels + 1),
                                {f / s_.stride.w, f % s_.stride.w}};
                multiply({taps.taps.get() + e * lists_.capacity,
                          phase,
                          phases,
                          dy + (tile * s_.replicates + e - group.begin) * dy_tile,
                          window.size.w,
                          1,
                          grid.block.h,
                          regions.first(region),
                          regions.size_of(region),
                          s_.stride,
                          c,
                          std::min(c + kTaskChannels, channels),
                          nullptr,
                          p.dx + ((s_.shared_x ? 0 : e) * s_.batch + first) * image,
                          image,
                          std::min(kLanes, s_.batch - first),
                          channels,
                          s_.image,
                          s_.channels_last,
                          /*add=*/s_.shared_x && (e > 0 || p.add_dx)});
            }
        }
    });
}

void Conv2d::sample(const CompactConv2dBackward& p, const Group& group, const Taps& taps,
                    const float* dy, const Window& window, const float* x) const {
    const int64_t rows = s_.out_channels, blocks = divide_up(rows, kTaskChannels);
    const Regions regions(grid_of(s_.output), group_in_, s_.stride, span(), 1, false);
    const int64_t dy_tile = rows * window.plane() * kLineFloats;
    const auto sample = LS_CHOSEN_KERNELS(sparse_conv2d).sample;
    // the first units of a group, as many as replicates, hold each of its replicates once
    const int64_t networks = std::min(group.end - group.begin, s_.replicates);
    parallel_(networks * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t r = i % blocks * kTaskChannels;
            for (int64_t u = group.begin + i / blocks; u < group.end; u += s_.replicates) {
                const int64_t e = group.unit(u).replicate;
                for (int64_t region = 0; region < regions.total(); ++region) {
                    const Pair at = regions.first(region);
                    const int64_t dy_line =
                        (at.h - window.low.h) * window.size.w + at.w - window.low.w;
                    const int64_t x_line =
                        at.h * s_.stride.h * x_window_.size.w + at.w * s_.stride.w;
                    sample({taps.taps.get() + e * lists_.capacity,
                            taps.starts.data() + e * (rows + 1),
                            dy + (u - group.begin) * dy_tile + dy_line * kLineFloats,
                            window.plane(),
                            window.size.w,
                            x ? x + x_at(group, u) + x_line * kLineFloats : nullptr,
                            s_.stride.h * x_window_.size.w,
                            s_.stride.w,
                            {std::min(regions.size.h, s_.output.h - at.h),
                             std::min(regions.size.w, s_.output.w - at.w)},
                            p.dvalues ? p.dvalues + e * lists_.capacity : nullptr,
                            p.dbias ? p.dbias + e * rows : nullptr},
                           r, std::min(r + kTaskChannels, rows));
                }
            }
        }
    });
}

void Conv2d::backward(const CompactConv2dBackward& p) const {
    const int64_t rows = s_.out_channels;
    const Window window = dy_window(s_);
    const Packing pack_dy(s_.output, window), x_packing(s_.image, x_window_);
    Taps for_dx, for_dvalues;
    if (p.dx) for_dx = taps_by_column(p.values, window);
    if (p.dvalues || p.dbias) for_dvalues = taps_by_row(nullptr);
    if (p.dvalues) std::memset(p.dvalues, 0, s_.replicates * lists_.capacity * sizeof(float));
    if (p.dbias) std::memset(p.dbias, 0, s_.replicates * rows * sizeof(float));
    const int64_t dy_tile = rows * window.plane() * kLineFloats;
    const int64_t unit_floats = dy_tile + (p.dvalues ? x_tile_ : 0);
    const Buffer<float> dy = buffer<float>(most_units(unit_floats) * dy_tile);
    const Buffer<float> x = buffer<float>(p.dvalues ? most_units(unit_floats) * x_tile_ : 0);
    for_groups(unit_floats, [&](const Group& group) {
        pack_dy(
            p.dy, group.end - group.begin, [&](int64_t i) { return group.unit(group.begin + i); },
            s_.batch, rows, s_.channels_last, dy.get(), parallel_);
        if (p.dx) dx(p, group, for_dx, dy.get(), window);
        if (p.dvalues) pack_x(x_packing, p.x, group, x.get());
        if (p.dvalues || p.dbias)
            sample(p, group, for_dvalues, dy.get(), window, p.dvalues ? x.get() : nullptr);
    });
}

}  // namespace

bool lines_fit(const Conv2dShape& s) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    // at least what x_window and dy_window span, whose grids end with whole blocks
    const auto span = [](int64_t image, int64_t padding, int64_t kernel, int64_t dilation,
                         int64_t stride) {
        return image + 2 * padding + kernel * dilation + kBlock * stride;
    };
    const int64_t h = span(s.image.h, s.padding.h, s.kernel.h, s.dilation.h, s.stride.h);
    const int64_t w = span(s.image.w, s.padding.w, s.kernel.w, s.dilation.w, s.stride.w);
    return h <= kMost && w <= kMost &&
           h * w <= kMost / std::max<int64_t>({s.in_channels, s.out_channels, 1});
}

void compact_conv2d_lanes_forward(const CompactConv2dForward& p, const Parallel& parallel) {
    Conv2d(p.shape, p.lists, parallel).forward(p);
}

void compact_conv2d_lanes_backward(const CompactConv2dBackward& p, const Parallel& parallel) {
    Conv2d(p.shape, p.lists, parallel).backward(p);
}

}  // namespace lottery_sparse
