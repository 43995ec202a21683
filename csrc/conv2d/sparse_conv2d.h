// compact_conv2d: a convolution by the kept weights only, and its gradients.
//
// Activations are packed so that the innermost dimension is kLanes images: [tile of the batch]
// [channel][row][column][lane], with zeros around the image. A kept weight is then one broadcast
// times whole lines, at any stride, padding and dilation. A line is kLanes floats.
//
// What is computed for an output element never depends on how the work is split: same bits for any
// thread count, and for a replicate alone or among others.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/variants.h"
#include "linear/sparse_linear.h"

namespace lottery_sparse {

constexpr int64_t kLanes = 16;           // images of a tile
constexpr int64_t kScratchLines = 2048;  // what a region may hold before it is unpacked
constexpr int64_t kMaxPhases = kScratchLines / kLanes;  // of stride_h * stride_w

struct Pair {
    int64_t h;
    int64_t w;
};

struct Conv2dShape {
    int64_t replicates;
    int64_t batch;
    int64_t in_channels;
    int64_t out_channels;
    int64_t groups;
    Pair image;   // of x
    Pair output;  // of y
    Pair kernel;
    Pair stride;
    Pair padding;
    Pair dilation;
    bool shared_x;       // one x for all replicates
    bool channels_last;  // images are [H, W, C], not [C, H, W]
};

// The lists are those of the mask seen as [O, I / groups * kh * kw].
struct CompactConv2dForward {
    Conv2dShape shape;
    CompactLists lists;
    const float* x;       // [E, B, I, H, W], or without E if shared_x
    const float* values;  // [E, C]
    const float* bias;    // [E, O], or nullptr
    float* y;             // [E, B, O, Ho, Wo], every element is written
};

struct CompactConv2dBackward {
    Conv2dShape shape;
    CompactLists lists;
    const float* dy;      // as y
    const float* x;       // as above; unused if dvalues is nullptr
    const float* values;  // unused if dx is nullptr
    float* dx;            // as x (the sum over replicates, in order, if shared_x), or nullptr
    float* dvalues;       // [E, C], 0 in unused slots, or nullptr
    float* dbias;         // [E, O], or nullptr
    bool add_dx = false;  // add to the dx of a shared x
};

// Whether kernels can number the lines of a tile in 32 bits.
bool lines_fit(const Conv2dShape& shape);
void compact_conv2d_forward(const CompactConv2dForward& p, const Parallel& parallel);
void compact_conv2d_backward(const CompactConv2dBackward& p, const Parallel& parallel);
// The same on lines of images, for any shape; sparse_conv2d_planes.h has the other way.
void compact_conv2d_lanes_forward(const CompactConv2dForward& p, const Parallel& parallel);
void compact_conv2d_lanes_backward(const CompactConv2dBackward& p, const Parallel& parallel);

// ---- what kernels take -------------------------------------------------------------------------

// A kept weight and where it reads: lines from the first one of an output element.
struct Tap {
    float value;
    int32_t line;
};

// Up to kLanes images to planes of lines: plane[c][lines[q]] = pixel q of channel c, gaps = 0.
struct PackPlanes {
    const float* images;
    int64_t image_stride;  // floats
    int64_t lanes;         // 1 to kLanes images; the other lanes become 0
    int64_t channels;
    int64_t pixels;  // of an image
    bool channels_last;
    const int32_t* lines;  // [pixels], -1 = not needed
    const int32_t* gaps;   // runs (first line, end) that no pixel fills
    int64_t gap_count;
    int64_t plane;  // lines of a channel
    float* planes;
};

// Register blocks of outputs: kBlock positions, in 1, 2 or 4 rows.
constexpr int64_t kBlock = 16;

// The outputs of one phase: position (h, w) reads `source` from line h * row_lines + w * step on,
// and is pixel (h * spread.h + phase.h, w * spread.w + phase.w).
struct Phase {
    const int64_t* starts;  // [channels + 1] into taps
    Pair phase;
};

// A region of the output of one tile: positions [first, first + size) of all phases, for channels
// [channel_begin, channel_end).
struct RegionProduct {
    const Tap* taps;
    const Phase* phases;
    int64_t phase_count;
    const float* source;
    int64_t row_lines;
    int64_t step;
    int64_t block_rows;
    Pair first;  // multiples of the block
    Pair size;   // multiples of the block
    Pair spread;
    int64_t channel_begin;
    int64_t channel_end;
    const float* bias;  // by channel, or nullptr
    float* images;
    int64_t image_stride;
    int64_t lanes;
    int64_t channels;  // of an image
    Pair image;
    bool channels_last;
    bool add;  // add to what is there
};

// For each kept entry of rows [begin, end): the sum over a band of dy times what the entry reads.
struct BandSample {
    const Tap* taps;
    const int64_t* starts;
    const float* dy;   // at the band's first position
    int64_t dy_plane;  // lines
    int64_t dy_row;    // lines
    const float* x;
    int64_t x_row;  // lines from a row of dy to the next one in x
    int64_t step;   // lines from a column of dy to the next one in x
    Pair size;
    float* dvalues;  // by slot, added to, or nullptr
    float* dbias;    // by row, added to, or nullptr
};

struct SparseConv2dKernels {
    void (*pack)(const PackPlanes& p, int64_t channel_begin, int64_t channel_end);
    void (*multiply)(const RegionProduct& p);
    void (*sample)(const BandSample& p, int64_t begin, int64_t end);
};

LS_DECLARE_KERNELS(SparseConv2dKernels, sparse_conv2d);

}  // namespace lottery_sparse
