// compact_conv2d on planes as they lie, for layers of few kept weights: an output plane is written
// once, from rows of input planes shifted by the place of a weight; nothing is transposed. A pass
// over a plane of dy, held in the first-level cache, gives what it adds to dx and dvalues.
#pragma once

#include "conv2d/sparse_conv2d.h"

namespace lottery_sparse {

constexpr int64_t kPlaneAlign = 16;     // floats: rows of padded planes start on a vector
constexpr int64_t kPlaneFloats = 8192;  // of a padded plane of dy
constexpr int64_t kImagesOfTask = 4;    // whose dvalues are added one after the other

inline int64_t whole_rows(int64_t floats) {
    return (floats + kPlaneAlign - 1) / kPlaneAlign * kPlaneAlign;
}

// A plane with zeros around: pixel (h, w) is float at(h, w). The zeros right of a row are those
// left of the next one.
struct PaddedPlane {
    Pair image;
    Pair pad;
    int64_t margin;  // floats before a row: at least pad.w
    int64_t pitch;

    PaddedPlane(const Pair& image, const Pair& pad)
        : image(image), pad(pad), margin(whole_rows(pad.w)), pitch(margin + whole_rows(image.w)) {}

    int64_t at(int64_t h, int64_t w) const { return (pad.h + h) * pitch + margin + w; }
    // Reading whole vectors stays inside.
    int64_t floats() const { return (image.h + 2 * pad.h) * pitch + margin + kPlaneAlign; }
};

// Whether these kernels take one network with `kept` weights, and are the faster ones.
bool planes_win(const Conv2dShape& shape, int64_t kept, bool backward);
// Whether these kernels take the shape. The two below run all networks of p, whatever planes_win
// says.
bool planes_fit(const Conv2dShape& shape);
void compact_conv2d_planes_forward(const CompactConv2dForward& p, const Parallel& parallel);
void compact_conv2d_planes_backward(const CompactConv2dBackward& p, const Parallel& parallel);

// ---- what kernels take -------------------------------------------------------------------------

// A kept weight, and where the padded plane holds what it reads for position (0, 0).
struct PlaneTap {
    float value;
    int32_t offset;
    int32_t channel;  // of the input
};

// Channels [begin, end) of y of one image. Taps count their offset from the first padded plane.
struct PlaneProduct {
    const PlaneTap* taps;
    const int64_t* starts;  // [O + 1]
    const float* source;    // padded planes of x
    int64_t pitch;
    const float* bias;  // [O], or nullptr
    float* y;           // [O, Ho, Wo]
    Pair output;
};

// What all channels of dy of one image give.
struct PlaneGradients {
    const PlaneTap* taps;
    const int64_t* starts;  // [O + 1]
    int64_t out_channels;
    int64_t in_channels;
    const PaddedPlane* padded;  // of dy
    const float* dy;            // [O, Ho, Wo]
    const float* x;             // [I, H, W]; unused if dvalues is nullptr
    Pair image;                 // of x
    float* dx;                  // [I, H, W], added to, or nullptr
    float* dvalues;             // by slot, added to, or nullptr
    float* dbias;               // [O], added to, or nullptr
};

struct SparseConv2dPlanesKernels {
    // [count, image] -> [count, padded]
    void (*pad)(const PaddedPlane& padded, const float* planes, int64_t count, float* out);
    void (*multiply)(const PlaneProduct& p, int64_t begin, int64_t end);
    void (*gradients)(const PlaneGradients& p);
};

LS_DECLARE_KERNELS(SparseConv2dPlanesKernels, sparse_conv2d_planes);

}  // namespace lottery_sparse
