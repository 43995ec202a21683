// Where the images and products of compact_conv2d lie: windows, packing, blocks and regions.
#pragma once

#include <algorithm>
#include <vector>

#include "conv2d/sparse_conv2d.h"
#include "linear/sparse_products.h"

namespace lottery_sparse {

constexpr int64_t kLineFloats = kLanes;
constexpr int64_t kCacheBytes = 768 << 10;  // of the source that a region reads
constexpr int64_t kGroupBytes = 8 << 20;    // packed at a time: in the last-level cache
constexpr int64_t kTaskChannels = 32;
constexpr int64_t kTapGrain = 64;

inline int64_t number_at(const void* numbers, bool wide, int64_t i) {
    return wide ? static_cast<const uint32_t*>(numbers)[i]
                : static_cast<const uint16_t*>(numbers)[i];
}

// Whether numbers [first, first + count) are below `bound`.
inline bool check_numbers(const char* name, const void* numbers, bool wide, int64_t first,
                          int64_t count, int64_t bound, ListCheck& check) {
    return wide ? check.numbers(name, static_cast<const uint32_t*>(numbers) + first, count, bound)
                : check.numbers(name, static_cast<const uint16_t*>(numbers) + first, count, bound);
}

// Calls f(matrix, first row, end) for the parts of rows [begin, end), counted over all matrices.
template <class F>
void for_matrices(int64_t begin, int64_t end, int64_t rows, const F& f) {
    for (int64_t e = begin / rows; e * rows < end; ++e)
        f(e, std::max<int64_t>(begin - e * rows, 0), std::min(end - e * rows, rows));
}

// Whether rows [begin, end), counted over all networks, are lists of columns below `bound`.
inline bool rows_fit(const CompactLists& lists, int64_t rows, int64_t begin, int64_t end,
                     int64_t bound, ListCheck& check) {
    bool fit = true;
    for_matrices(begin, end, rows, [&](int64_t e, int64_t first, int64_t last) {
        const int64_t* starts = lists.starts + e * (rows + 1);
        fit = fit && check.starts("kept.starts", starts, first, last, lists.capacity) &&
              check_numbers("kept.columns", lists.columns, lists.wide,
                            e * lists.capacity + starts[first], starts[last] - starts[first], bound,
                            check);
    });
    return fit;
}

inline int64_t round_up(int64_t a, int64_t b) {
    return divide_up(a, b) * b;
}

inline int64_t floor_divide(int64_t a, int64_t b) {
    return a >= 0 ? a / b : -divide_up(-a, b);
}

// The output positions of a product, cut into register blocks and regions.
struct Grid {
    Pair positions;
    Pair block;
    Pair rounded;  // positions, rounded up to whole blocks
};

inline Grid grid_of(const Pair& positions) {
    Grid best{};
    for (int64_t rows : {1, 2, 4}) {
        const Pair block = {rows, kBlock / rows};
        const Pair rounded = {round_up(positions.h, block.h), round_up(positions.w, block.w)};
        if (rows == 1 || rounded.h * rounded.w < best.rounded.h * best.rounded.w)
            best = {positions, block, rounded};
    }
    return best;
}

// One tile of the batch of one replicate.
struct Unit {
    int64_t tile;
    int64_t replicate;
};

// A part of the planes of an image, [low, low + size), with zeros outside the image.
struct Window {
    Pair low;
    Pair size;

    int64_t plane() const { return size.h * size.w; }  // lines
};

// How images become planes of this window.
class Packing {
  public:
    Packing(const Pair& image, const Window& window) : window_(window), lines_(image.h * image.w) {
        std::vector<bool> filled(window.plane());
        for (int64_t h = 0; h < image.h; ++h)
            for (int64_t w = 0; w < image.w; ++w) {
                const int64_t y = h - window.low.h, x = w - window.low.w;
                const bool inside = 0 <= y && y < window.size.h && 0 <= x && x < window.size.w;
                lines_[h * image.w + w] = static_cast<int32_t>(inside ? y * window.size.w + x : -1);
                if (inside) filled[y * window.size.w + x] = true;
            }
        for (int64_t i = 0; i < window.plane(); ++i) {
            if (filled[i]) continue;
            if (gaps_.empty() || gaps_.back() != i) {
                gaps_.push_back(static_cast<int32_t>(i));
                gaps_.push_back(static_cast<int32_t>(i));
            }
            gaps_.back() = static_cast<int32_t>(i + 1);
        }
    }

    // Tile `tile(i)` = (replicate, tile of its batch) of images [E, B, channels, ...] to
    // planes [i][channels][window][lane], for i < count.
    template <class F>
    void operator()(const float* images, int64_t count, const F& tile, int64_t batch,
                    int64_t channels, bool channels_last, float* planes,
                    const Parallel& parallel) const {
        const int64_t pixels = static_cast<int64_t>(lines_.size()), stride = channels * pixels;
        const int64_t blocks = divide_up(channels, kTaskChannels);
        const auto pack = LS_CHOSEN_KERNELS(sparse_conv2d).pack;
        parallel(count * blocks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t c = i % blocks * kTaskChannels;
                const Unit unit = tile(i / blocks);
                const int64_t first = unit.tile * kLanes;
                pack({images + (unit.replicate * batch + first) * stride, stride,
                      std::min(kLanes, batch - first), channels, pixels, channels_last,
                      lines_.data(), gaps_.data(), static_cast<int64_t>(gaps_.size()) / 2,
                      window_.plane(),
                      planes + i / blocks * channels * window_.plane() * kLineFloats},
                     c, std::min(c + kTaskChannels, channels));
            }
        });
    }

  private:
    Window window_;
    std::vector<int32_t> lines_;  // by pixel
    std::vector<int32_t> gaps_;
};

inline Window x_window(const Conv2dShape& s) {
    const Pair rounded = grid_of(s.output).rounded;
    const auto size = [](int64_t positions, int64_t stride, int64_t kernel, int64_t dilation) {
        return (positions - 1) * stride + (kernel - 1) * dilation + 1;
    };
    return {{-s.padding.h, -s.padding.w},
            {size(rounded.h, s.stride.h, s.kernel.h, s.dilation.h),
             size(rounded.w, s.stride.w, s.kernel.w, s.dilation.w)}};
}

// dx by phases: pixel = position * stride + phase. Along one axis, entry r of the kernel belongs to
// one phase and reads dy at position + shift.
struct Reads {
    int64_t phase;
    int64_t shift;
};

inline Reads reads_of(int64_t r, int64_t stride, int64_t padding, int64_t dilation) {
    const int64_t back = padding - r * dilation;  // dy position * stride = pixel + back
    const int64_t phase = -back - floor_divide(-back, stride) * stride;
    return {phase, floor_divide(phase + back, stride)};
}

inline Pair dx_positions(const Conv2dShape& s) {
    return {divide_up(s.image.h, s.stride.h), divide_up(s.image.w, s.stride.w)};
}

// The window of dy: all of dy, for dvalues, and all that dx reads.
inline Window dy_window(const Conv2dShape& s) {
    const Pair rounded = grid_of(dx_positions(s)).rounded;
    const auto along = [](int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                          int64_t output, int64_t positions) {
        Pair range = {0, output};
        for (int64_t r = 0; r < kernel; ++r) {
            const int64_t shift = reads_of(r, stride, padding, dilation).shift;
            range = {std::min(range.h, shift), std::max(range.w, shift + positions)};
        }
        return range;
    };
    const Pair h = along(s.kernel.h, s.stride.h, s.padding.h, s.dilation.h, s.output.h, rounded.h);
    const Pair w = along(s.kernel.w, s.stride.w, s.padding.w, s.dilation.w, s.output.w, rounded.w);
    return {{h.h, w.h}, {h.w - h.h, w.w - w.h}};
}

// Regions of a grid whose source stays in the second-level cache.
struct Regions {
    Pair size;
    Pair count;
    Pair all;  // the rounded grid: what lies beyond it has no source

    Regions(const Grid& grid, int64_t channels, const Pair& step, const Pair& span,
            int64_t pixels_a_position, bool channels_last) {
        const auto fits = [&](const Pair& r) {
            const int64_t bytes = channels * ((r.h - 1) * step.h + span.h) *
                                  ((r.w - 1) * step.w + span.w) * kLineFloats *
                                  static_cast<int64_t>(sizeof(float));
            const int64_t lines = r.h * r.w * pixels_a_position;
            return bytes <= kCacheBytes && lines * (channels_last ? kLanes : 1) <= kScratchLines;
        };
        size = {grid.block.h, std::max(grid.rounded.w, grid.block.w)};
        while (size.w > grid.block.w &&
               (!fits(size) || size.h * size.w * pixels_a_position > kScratchLines))
            size.w = round_up(size.w / 2, grid.block.w);
        while (size.h < grid.rounded.h && fits({size.h + grid.block.h, size.w}))
            size.h += grid.block.h;
        count = {divide_up(grid.rounded.h, size.h), divide_up(grid.rounded.w, size.w)};
        all = grid.rounded;
    }

    int64_t total() const { return count.h * count.w; }
    Pair first(int64_t i) const { return {i / count.w * size.h, i % count.w * size.w}; }
    Pair size_of(int64_t i) const {
        const Pair at = first(i);
        return {std::min(size.h, all.h - at.h), std::min(size.w, all.w - at.w)};
    }
};

}  // namespace lottery_sparse
