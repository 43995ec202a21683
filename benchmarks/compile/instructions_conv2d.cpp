// Convolutions with all they pack and unpack, per kept weight, output pixel and image.
#include "conv2d/sparse_conv2d_planes.h"
#include "instructions.h"

namespace lottery_sparse {
namespace {

struct Names {
    const char *forward, *dx, *dvalues;
};

struct Convolution {
    Conv2dShape shape;
    Kept kept;
    std::vector<float> values, x, dy, dx, dvalues, y;

    // 3x3, padding 1, `percent` of the weights kept.
    Convolution(int64_t batch, int64_t in, int64_t out, int64_t size, uint32_t percent)
        : shape{1,      batch,  in,     out,    1,     {size, size}, {size, size},
                {3, 3}, {1, 1}, {1, 1}, {1, 1}, false, false},
          kept(mask_of(out * in * 9, percent), out, in * 9),
          values(draws(kept.count())),
          x(draws(batch * in * size * size)),
          dy(draws(batch * out * size * size)),
          dx(x.size()),
          dvalues(kept.count()),
          y(dy.size()) {}

    template <class Forward, class Backward>
    void count(const Forward& forward, const Backward& backward, const Names& names) {
        const CompactLists lists = kept.lists();
        const int64_t units = kept.count() * shape.batch * shape.output.h * shape.output.w;
        begin();
        forward({shape, lists, x.data(), values.data(), nullptr, y.data()}, kSerial);
        END(names.forward, units);
        begin();
        backward({shape, lists, dy.data(), x.data(), values.data(), dx.data(), nullptr, nullptr},
                 kSerial);
        END(names.dx, units);
        begin();
        backward(
            {shape, lists, dy.data(), x.data(), values.data(), nullptr, dvalues.data(), nullptr},
            kSerial);
        END(names.dvalues, units);
    }
};

}  // namespace

void count_convolutions() {
    Convolution(16, 32, 32, 8, 10)
        .count(compact_conv2d_lanes_forward, compact_conv2d_lanes_backward,
               {"sparse_conv2d.forward 10%", "sparse_conv2d.dx 10%", "sparse_conv2d.dvalues 10%"});
    // 16 rows in regions of 3: the last one holds one
    Convolution(16, 128, 128, 16, 5)
        .count(compact_conv2d_lanes_forward, compact_conv2d_lanes_backward,
               {"sparse_conv2d.forward 5% 128 channels", "sparse_conv2d.dx 5% 128 channels",
                "sparse_conv2d.dvalues 5% 128 channels"});
    Convolution few(4, 3, 32, 28, 5);
    few.count(compact_conv2d_planes_forward, compact_conv2d_planes_backward,
              {"sparse_conv2d_planes.forward 5%", "sparse_conv2d_planes.dx 5%",
               "sparse_conv2d_planes.dvalues 5%"});
    begin();
    compact_conv2d_planes_backward({few.shape, few.kept.lists(), few.dy.data(), few.x.data(),
                                    few.values.data(), few.dx.data(), few.dvalues.data(), nullptr},
                                   kSerial);
    END("sparse_conv2d_planes.backward 5%",
        few.kept.count() * few.shape.batch * few.shape.output.h * few.shape.output.w);
}

}  // namespace lottery_sparse
