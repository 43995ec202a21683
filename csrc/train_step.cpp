#include "train_step.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "sparse_products.h"

namespace lottery_sparse {
namespace {

// What one network needs at a time. `activations[l]` are tiles of the input of layer l.
struct Workspace {
    std::vector<Buffer<float>> activations;
    Buffer<float> dy, dx;     // tiles of the widest layer
    Buffer<float> by_column;  // values in the order of the lists by column
    Buffer<float> values_grad, bias_grad;

    Workspace(const TrainStep& p, int64_t tiles) {
        int64_t widest = 1, capacity = 1;
        for (const StepLayer& layer : p.layers) {
            widest = std::max({widest, layer.in_features, layer.out_features});
            capacity = std::max(capacity, layer.lists.capacity);
            // x of all networks lies elsewhere
            const bool own = !activations.empty() || !p.shared_x;
            activations.push_back(buffer<float>(own ? tiles * layer.in_features * kTileBatch : 1));
        }
        dy = buffer<float>(tiles * widest * kTileBatch);
        dx = buffer<float>(tiles * widest * kTileBatch);
        by_column = buffer<float>(capacity);
        values_grad = buffer<float>(capacity);
        bias_grad = buffer<float>(widest);
    }
};

// Calls f with an index of the type that the layer's lists have.
template <class F>
void with_lists(const StepLayer& layer, const F& f) {
    layer.lists.wide ? f(uint32_t{}) : f(uint16_t{});
}

class Network {
  public:
    Network(const TrainStep& p, int64_t e, int64_t tiles, const float* shared_x, Workspace& w)
        : p_(p), e_(e), tiles_(tiles), shared_x_(shared_x), w_(w) {}

    void step() {
        if (!p_.shared_x) pack_x();
        for (size_t l = 0; l < p_.layers.size(); ++l) forward(l);
        p_.loss[e_] = loss_and_gradient();
        for (size_t l = p_.layers.size(); l-- > 0;) backward(l);
    }

  private:
    const float* input(size_t l) const {
        return l == 0 && p_.shared_x ? shared_x_ : w_.activations[l].get();
    }

    template <class Index>
    KeptRows<Index> rows(const StepLayer& layer) const {
        const int64_t slots = e_ * layer.lists.capacity;
        return {layer.lists.starts + e_ * (layer.out_features + 1),
                static_cast<const Index*>(layer.lists.columns) + slots, layer.values + slots};
    }

    void pack_x() {
        const int64_t k = p_.layers[0].in_features;
        for (int64_t t = 0; t < tiles_; ++t)
            chosen_kernels(uint16_t{})
                .pack_tile(p_.x + (e_ * p_.batch + t * kTileBatch) * k,
                           std::min(kTileBatch, p_.batch - t * kTileBatch), k,
                           w_.activations[0].get() + t * k * kTileBatch);
    }

    void forward(size_t l) {
        const StepLayer& layer = p_.layers[l];
        const bool last = l + 1 == p_.layers.size();
        float* out = last ? w_.dy.get() : w_.activations[l + 1].get();
        with_lists(layer, [&](auto index) {
            using Index = decltype(index);
            for (int64_t t = 0; t < tiles_; ++t)
                chosen_kernels(index).multiply_packed(
                    {rows<Index>(layer), input(l) + t * layer.in_features * kTileBatch,
                     layer.bias ? layer.bias + e_ * layer.out_features : nullptr,
                     /*gate=*/nullptr, out + t * layer.out_features * kTileBatch, /*relu=*/!last},
                    0, layer.out_features);
        });
    }

    // From logits to their gradient, in place: (softmax - one-hot) / B; 0 beyond the batch.
    float loss_and_gradient() {
        const int64_t classes = p_.layers.back().out_features;
        const int64_t* labels = p_.labels + (p_.shared_labels ? 0 : e_ * p_.batch);
        double loss = 0.0;
        for (int64_t b = 0; b < tiles_ * kTileBatch; ++b) {
            float* logits = w_.dy.get() + b / kTileBatch * classes * kTileBatch + b % kTileBatch;
            if (b >= p_.batch) {
                for (int64_t c = 0; c < classes; ++c) logits[c * kTileBatch] = 0.0f;
                continue;
            }
            float most = logits[0];
            for (int64_t c = 1; c < classes; ++c) most = std::max(most, logits[c * kTileBatch]);
            const float own = logits[labels[b] * kTileBatch] - most;
            float total = 0.0f;
            for (int64_t c = 0; c < classes; ++c)
                total += logits[c * kTileBatch] = std::exp(logits[c * kTileBatch] - most);
            loss += std::log(total) - own;
            const float scale = 1.0f / (total * static_cast<float>(p_.batch));
            for (int64_t c = 0; c < classes; ++c) logits[c * kTileBatch] *= scale;
            logits[labels[b] * kTileBatch] -= 1.0f / static_cast<float>(p_.batch);
        }
        return static_cast<float>(loss / static_cast<double>(p_.batch));
    }

    // w_.dy holds the gradient of the layer's output; afterwards that of its input, if one is
    // needed.
    void backward(size_t l) {
        const StepLayer& layer = p_.layers[l];
        const int64_t n = layer.out_features, k = layer.in_features, c = layer.lists.capacity;
        with_lists(layer, [&](auto index) {
            using Index = decltype(index);
            const auto& kernels = chosen_kernels(index);
            sample<Index>(l);
            if (layer.bias)
                for (int64_t r = 0; r < n; ++r)
                    w_.bias_grad[r] =
                        kernels.sum_row(w_.dy.get() + r * kTileBatch, tiles_, n * kTileBatch);
            if (l == 0) return;
            const int64_t* column_starts = layer.lists.column_starts + e_ * (k + 1);
            for (int64_t i = 0; i < column_starts[k]; ++i)
                w_.by_column[i] = layer.values[e_ * c + layer.lists.positions[e_ * c + i]];
            const KeptRows<Index> columns = {column_starts,
                                             static_cast<const Index*>(layer.lists.rows) + e_ * c,
                                             w_.by_column.get()};
            for (int64_t t = 0; t < tiles_; ++t)
                kernels.multiply_packed(
                    {columns, w_.dy.get() + t * n * kTileBatch, /*bias=*/nullptr,
                     input(l) + t * k * kTileBatch, w_.dx.get() + t * k * kTileBatch,
                     /*relu=*/false},
                    0, k);
        });
        update(layer);
        std::swap(w_.dy, w_.dx);
    }

    template <class Index>
    void sample(size_t l) {
        const StepLayer& layer = p_.layers[l];
        const int64_t n = layer.out_features, k = layer.in_features;
        const int64_t tile_bytes = k * kTileBatch * static_cast<int64_t>(sizeof(float));
        const int64_t group = std::max<int64_t>(1, kSampleBytes / std::max<int64_t>(tile_bytes, 1));
        for (int64_t t = 0; t < tiles_; t += group)
            chosen_kernels(Index{}).sample(
                {rows<Index>(layer), w_.dy.get() + t * n * kTileBatch,
                 input(l) + t * k * kTileBatch, /*dw=*/nullptr, w_.values_grad.get(),
                 std::min(group, tiles_ - t), k, n, /*add=*/t > 0},
                0, n);
    }

    void update(const StepLayer& layer) {
        const int64_t n = layer.out_features, c = layer.lists.capacity;
        const int64_t* starts = layer.lists.starts + e_ * (n + 1);
        float* values = layer.values + e_ * c;
        apply(layer.values_rule, values, w_.values_grad.get(), layer.values_state, e_ * c,
              starts[n]);
        if (layer.bias)
            apply(layer.bias_rule, layer.bias + e_ * n, w_.bias_grad.get(), layer.bias_state,
                  e_ * n, n);
        float* effective = layer.effective + e_ * n * layer.in_features;
        with_lists(layer, [&](auto index) {
            const auto* columns = static_cast<const decltype(index)*>(layer.lists.columns) + e_ * c;
            for (int64_t r = 0; r < n; ++r, effective += layer.in_features)
                for (int64_t i = starts[r]; i < starts[r + 1]; ++i)
                    effective[columns[i]] = values[i];
        });
    }

    static void apply(const StepRule& rule, float* value, const float* grad, float* const states[2],
                      int64_t first, int64_t size) {
        const StepPart part = {
            value,
            grad,
            {states[0] ? states[0] + first : nullptr, states[1] ? states[1] + first : nullptr},
            size,
            rule.step_size,
            rule.second_scale,
            0,
            0};
        const auto& kernels = LS_CHOSEN_KERNELS(masked_optim);
        rule.adam ? kernels.adam(rule.rates, part, 0, size) : kernels.sgd(rule.sgd, part, 0, size);
    }

    const TrainStep& p_;
    const int64_t e_, tiles_;
    const float* shared_x_;
    Workspace& w_;
};

}  // namespace

void train_step(const TrainStep& p, const Parallel& parallel) {
    const int64_t tiles = divide_up(p.batch, kTileBatch);
    const int64_t parts = std::min<int64_t>(p.networks, std::max<int64_t>(p.threads, 1));
    Buffer<float> x;
    if (p.shared_x) {
        const int64_t k = p.layers[0].in_features;
        x = buffer<float>(tiles * k * kTileBatch);
        pack_tiles(p.x, 1, p.batch, k, x.get(), parallel);
    }
    std::vector<Workspace> workspaces;  // before the parallel region, where nothing may throw
    for (int64_t i = 0; i < parts; ++i) workspaces.emplace_back(p, tiles);
    parallel(parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part)
            for (int64_t e = part * p.networks / parts; e < (part + 1) * p.networks / parts; ++e)
                Network(p, e, tiles, x.get(), workspaces[part]).step();
    });
}

}  // namespace lottery_sparse
