// Whole steps, per kept weight and batch element: one compact layer, and train_step on a stack.
#include "instructions.h"
#include "step/train_step.h"

namespace lottery_sparse {
namespace {

constexpr int64_t kBatch = 60;
constexpr uint32_t kPercent = 10;

// A compact layer with Adam's state.
struct Layer {
    int64_t in, out;
    std::vector<uint8_t> mask;
    Kept kept;
    std::vector<float> values, bias, effective, first, second, bias_first, bias_second;

    Layer(int64_t in, int64_t out)
        : in(in),
          out(out),
          mask(mask_of(out * in, kPercent)),
          kept(mask, out, in),
          values(draws(kept.count())),
          bias(draws(out)),
          effective(out * in),
          first(kept.count()),
          second(kept.count()),
          bias_first(out),
          bias_second(out) {}
};

void compact_linear() {
    Layer layer(784, 300);
    const int64_t tiles = (kBatch + kTileBatch - 1) / kTileBatch;
    const SparseLinearShape shape = {1, kBatch, layer.in, layer.out, false};
    const std::vector<float> x = draws(kBatch * layer.in), dy = draws(kBatch * layer.out);
    std::vector<float> y(dy.size()), dx(x.size()), packed(tiles * layer.in * kTileBatch);
    std::vector<float> dvalues(layer.kept.count()), dbias(layer.out);
    const CompactLists lists = layer.kept.lists();
    begin();
    compact_linear_forward(
        {shape, lists, x.data(), layer.values.data(), layer.bias.data(), y.data(), packed.data()},
        kSerial);
    END("compact_linear.forward 10%", layer.kept.count() * kBatch);
    begin();
    compact_linear_backward({shape, lists, dy.data(), packed.data(), layer.values.data(), dx.data(),
                             dvalues.data(), dbias.data()},
                            kSerial);
    END("compact_linear.backward 10%", layer.kept.count() * kBatch);
}

StepRule adam_rule() {
    StepRule rule = {};
    rule.adam = true;
    rule.rates.first_weight = 0.1f;
    rule.rates.beta2 = 0.999f;
    rule.rates.second_weight = 1e-3f;
    rule.rates.eps = 1e-8f;
    rule.rates.shrink = 1.0f;
    rule.step_size = -1e-3f;
    rule.second_scale = 1.0f;
    return rule;
}

StepLayer step_layer(Layer& layer) {
    StepLayer out = {};
    out.in_features = layer.in;
    out.out_features = layer.out;
    out.lists = layer.kept.lists();
    out.mask = layer.mask.data();
    out.zero = true;
    out.values = layer.values.data();
    out.bias = layer.bias.data();
    out.effective = layer.effective.data();
    out.values_state[0] = layer.first.data();
    out.values_state[1] = layer.second.data();
    out.bias_state[0] = layer.bias_first.data();
    out.bias_state[1] = layer.bias_second.data();
    out.values_rule = out.bias_rule = adam_rule();
    return out;
}

void lenet_step() {
    Layer layers[] = {{784, 300}, {300, 100}, {100, 10}};
    const std::vector<float> x = draws(kBatch * layers[0].in);
    std::vector<int64_t> labels(kBatch);
    for (int64_t& label : labels) label = draw() % 10;
    float loss = 0.0f;
    TrainStep step = {};
    step.networks = 1;
    step.batch = kBatch;
    step.x = x.data();
    step.labels = labels.data();
    int64_t kept = 0;
    for (Layer& layer : layers) {
        step.layers.push_back(step_layer(layer));
        kept += layer.kept.count();
    }
    step.loss = &loss;
    step.threads = 1;
    step.dense_multiply = step.dense_sample = 1.0;  // sparse products only
    begin();
    train_step(step, kSerial);
    END("train_step 10%", kept * kBatch);
    if (!(loss > 0.0f)) std::puts("wrong: no loss");
}

}  // namespace

void count_steps() {
    compact_linear();
    lenet_step();
}

}  // namespace lottery_sparse
