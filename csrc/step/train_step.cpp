#include "step/train_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/finite.h"
#include "linear/sparse_products.h"
#include "masks/sample_mask.h"
#include "step/dense_tiles.h"

namespace lottery_sparse {
namespace {

// Kept share of a row above which whole vectors of it are written.
constexpr double kPlaceShare = 0.2;

int64_t padded(int64_t features) {
    return divide_up(features, kTileBatch) * kTileBatch;
}

// What one network needs at a time. `activations[l]` are tiles of the input of layer l.
struct Workspace {
    std::vector<Buffer<float>> activations;
    std::vector<Buffer<float>> drawn;  // the effective weights of layers with a learned mask
    std::vector<int64_t> ones;         // how many of their weights are in use
    Buffer<float> dy, dx;              // tiles of the widest layer
    Buffer<float> by_column;           // values in the order of the lists by column
    Buffer<float> values_grad, bias_grad;
    Buffer<float> panels;      // the input by sample: [K / kTileBatch][B][kTileBatch]
    Buffer<float> dy_rows;     // [B][N]
    Buffer<float> dense_grad;  // kDenseRows rows of the gradient of a dense weight

    Workspace(const TrainStep& p, int64_t tiles) {
        int64_t widest = 1, capacity = 1;
        for (const StepLayer& layer : p.layers) {
            widest = std::max({widest, layer.in_features, layer.out_features});
            const int64_t rows = kDenseRows * layer.in_features;
            const bool all = !layer.plain || layer.frozen;
            capacity = std::max({capacity, rows, all ? layer.lists.capacity : 1});
            drawn.push_back(buffer<float>(layer.frozen ? layer.lists.capacity : 1));
            ones.push_back(0);
            // x of all networks lies elsewhere
            const bool own = !activations.empty() || !p.shared_x;
            activations.push_back(buffer<float>(own ? tiles * layer.in_features * kTileBatch : 1));
        }
        dy = buffer<float>(tiles * widest * kTileBatch);
        dx = buffer<float>(tiles * widest * kTileBatch);
        by_column = buffer<float>(capacity);
        values_grad = buffer<float>(capacity + kPickSlack);
        bias_grad = buffer<float>(widest);
        panels = buffer<float>(p.batch * padded(widest));
        dy_rows = buffer<float>(p.batch * widest);
        dense_grad = buffer<float>(kDenseRows * padded(widest));
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

    // The share of its weights that the network keeps in a layer.
    double density(const StepLayer& layer) const {
        if (layer.plain) return 1.0;
        const int64_t n = layer.out_features, size = n * layer.in_features;
        return size ? static_cast<double>(layer.lists.starts[e_ * (n + 1) + n]) / size : 0.0;
    }
    bool multiplies_dense(const StepLayer& layer) const {
        return !layer.zero || density(layer) > p_.dense_multiply;
    }
    bool samples_dense(const StepLayer& layer) const { return density(layer) > p_.dense_sample; }
    bool writes_effective(const StepLayer& layer) const {
        return !layer.plain && (layer.keep_effective || multiplies_dense(layer));
    }

    float* effective(const StepLayer& layer) const {
        return layer.effective + e_ * layer.out_features * layer.in_features;
    }
    const float* weight(size_t l) const {
        return p_.layers[l].frozen ? w_.drawn[l].get() : effective(p_.layers[l]);
    }

    // What the drawn weights of a layer are multiplied by.
    float factor(size_t l) const {
        const StepLayer& layer = p_.layers[l];
        if (!layer.rescale) return 1.0f;
        return static_cast<float>(layer.lists.capacity) /
               static_cast<float>(std::max<int64_t>(w_.ones[l], 1));
    }

    void draw(size_t l) {
        const StepLayer& layer = p_.layers[l];
        const int64_t size = layer.lists.capacity, at = e_ * size;
        const auto& kernels = LS_CHOSEN_KERNELS(sample_mask);
        w_.ones[l] = kernels.draw(layer.keys[e_], size, layer.values + at, layer.frozen + at,
                                  w_.drawn[l].get());
        if (layer.rescale) kernels.scale(factor(l), size, w_.drawn[l].get());
    }

    void forward(size_t l) {
        const StepLayer& layer = p_.layers[l];
        if (layer.frozen) draw(l);
        const int64_t n = layer.out_features, k = layer.in_features;
        const bool relu = l + 1 < p_.layers.size();
        float* out = relu ? w_.activations[l + 1].get() : w_.dy.get();
        const float* bias = layer.bias ? layer.bias + e_ * n : nullptr;
        if (multiplies_dense(layer)) {
            multiply_dense(n, {weight(l), k, 1, input(l), k, bias, nullptr, out, kTileBatch, relu});
            return;
        }
        with_lists(layer, [&](auto index) {
            using Index = decltype(index);
            for (int64_t t = 0; t < tiles_; ++t)
                chosen_kernels(index).multiply_packed(
                    {rows<Index>(layer), input(l) + t * k * kTileBatch, bias,
                     /*gate=*/nullptr, out + t * n * kTileBatch, relu},
                    0, n);
            spread_non_finite(rows<Index>(layer), n, input(l), k, /*gate=*/nullptr, out);
        });
    }

    // `rows` rows of the product `first` of the first tile, and of those of the others. A block of
    // the matrix meets all tiles while it is in the cache.
    void multiply_dense(int64_t rows, const DenseProduct& first) {
        const auto& kernels = LS_CHOSEN_KERNELS(dense_tiles);
        for (int64_t r = 0; r < rows; r += kDenseRows)
            for (int64_t t = 0; t < tiles_; ++t) {
                DenseProduct p = first;
                p.b += t * p.steps * kTileBatch;
                p.out += t * rows * kTileBatch;
                if (p.gate) p.gate += t * rows * kTileBatch;
                kernels.multiply(p, r, std::min(r + kDenseRows, rows));
            }
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
        const int64_t n = layer.out_features;
        const bool trains_bias = layer.bias && !layer.frozen;
        if (trains_bias)
            for (int64_t r = 0; r < n; ++r)
                w_.bias_grad[r] =
                    chosen_kernels(uint16_t{})
                        .sum_row(w_.dy.get() + r * kTileBatch, tiles_, n * kTileBatch);
        if (l > 0) input_gradient(l);
        if (samples_dense(layer)) {
            sample_dense(l);
        } else {
            with_lists(layer, [&](auto index) { sample<decltype(index)>(l); });
            update(l, 0, n);
        }
        if (trains_bias)
            apply(layer.bias_rule, layer.bias + e_ * n, w_.bias_grad.get(), layer.bias_state,
                  e_ * n, n);
        std::swap(w_.dy, w_.dx);
    }

    void input_gradient(size_t l) {
        const StepLayer& layer = p_.layers[l];
        const int64_t n = layer.out_features, k = layer.in_features, c = layer.lists.capacity;
        if (multiplies_dense(layer)) {
            multiply_dense(k, {weight(l), 1, k, w_.dy.get(), n, /*bias=*/nullptr, input(l),
                               w_.dx.get(), kTileBatch, /*relu=*/false});
            return;
        }
        const int64_t* column_starts = layer.lists.column_starts + e_ * (k + 1);
        for (int64_t i = 0; i < column_starts[k]; ++i)
            w_.by_column[i] = layer.values[e_ * c + layer.lists.positions[e_ * c + i]];
        with_lists(layer, [&](auto index) {
            using Index = decltype(index);
            const KeptRows<Index> columns = {column_starts,
                                             static_cast<const Index*>(layer.lists.rows) + e_ * c,
                                             w_.by_column.get()};
            for (int64_t t = 0; t < tiles_; ++t)
                chosen_kernels(index).multiply_packed(
                    {columns, w_.dy.get() + t * n * kTileBatch, /*bias=*/nullptr,
                     input(l) + t * k * kTileBatch, w_.dx.get() + t * k * kTileBatch,
                     /*relu=*/false},
                    0, k);
            spread_non_finite(columns, k, w_.dy.get(), n, input(l), w_.dx.get());
        });
    }

    // After a product over lists of tiles `source` [features]: NaN where a pruned weight meets NaN
    // or Inf, and the gate is open.
    template <class Index>
    void spread_non_finite(const KeptRows<Index>& kept, int64_t rows, const float* source,
                           int64_t features, const float* gate, float* out) const {
        if (all_finite(source, tiles_ * features * kTileBatch)) return;
        for (int64_t b = 0; b < p_.batch; ++b) {
            const int64_t tile = b / kTileBatch, lane = b % kTileBatch;
            const float* x = source + tile * features * kTileBatch + lane;
            int64_t all = 0;  // that are not finite
            for (int64_t f = 0; f < features; ++f) all += !is_finite(x[f * kTileBatch]);
            for (int64_t r = 0; all > 0 && r < rows; ++r) {
                int64_t met = 0;
                for (int64_t i = kept.starts[r]; i < kept.starts[r + 1]; ++i)
                    met += !is_finite(x[static_cast<int64_t>(kept.columns[i]) * kTileBatch]);
                const int64_t at = (tile * rows + r) * kTileBatch + lane;
                if (met < all && !(gate && gate[at] <= 0.0f))
                    out[at] = std::numeric_limits<float>::quiet_NaN();
            }
        }
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

    // The gradients of all weights, some rows at a time, and the step of those that are kept.
    void sample_dense(size_t l) {
        const StepLayer& layer = p_.layers[l];
        const int64_t n = layer.out_features, k = layer.in_features, stride = padded(k);
        const auto& kernels = LS_CHOSEN_KERNELS(dense_tiles);
        for (int64_t t = 0; t < tiles_; ++t) {
            const int64_t b = t * kTileBatch, count = std::min(kTileBatch, p_.batch - b);
            kernels.transpose(w_.dy.get() + b * n, n, count, w_.dy_rows.get() + b * n, n);
            for (int64_t c = 0; c < k; c += kTileBatch)
                kernels.transpose(input(l) + b * k + c * kTileBatch, std::min(kTileBatch, k - c),
                                  count, w_.panels.get() + c * p_.batch + b * kTileBatch,
                                  kTileBatch);
        }
        // the gradient of a rescaled weight depends on all of them
        const bool together = layer.frozen && layer.rescale;
        for (int64_t first = 0; first < n; first += kDenseRows) {
            const int64_t last = std::min(first + kDenseRows, n);
            for (int64_t c = 0; c < k; c += kTileBatch)
                kernels.multiply({w_.dy_rows.get() + first, 1, n, w_.panels.get() + c * p_.batch,
                                  p_.batch, /*bias=*/nullptr, /*gate=*/nullptr,
                                  w_.dense_grad.get() + c, stride, /*relu=*/false},
                                 0, last - first);
            for (int64_t r = first; r < last; ++r)
                gather(layer, r, w_.dense_grad.get() + (r - first) * stride,
                       w_.values_grad.get() + slot(layer, r) - slot(layer, together ? 0 : first));
            if (!together) update(l, first, last);
        }
        if (together) update(l, 0, n);
    }

    // The first slot of a row.
    int64_t slot(const StepLayer& layer, int64_t row) const {
        return layer.plain ? row * layer.in_features
                           : layer.lists.starts[e_ * (layer.out_features + 1) + row];
    }

    const uint8_t* mask(const StepLayer& layer, int64_t row) const {
        return layer.mask + (e_ * layer.out_features + row) * layer.in_features;
    }

    void gather(const StepLayer& layer, int64_t row, const float* dense, float* kept) const {
        const int64_t k = layer.in_features, count = slot(layer, row + 1) - slot(layer, row);
        if (count == k)
            std::memcpy(kept, dense, k * sizeof(float));
        else
            LS_CHOSEN_KERNELS(dense_tiles).pick(mask(layer, row), dense, k, count, kept);
    }

    void scatter(const StepLayer& layer, int64_t row, const float* kept, float* dense) const {
        const int64_t begin = slot(layer, row), count = slot(layer, row + 1) - begin;
        const int64_t k = layer.in_features;
        if (count == k) {
            std::memcpy(dense, kept, k * sizeof(float));
        } else if (count > kPlaceShare * k) {
            LS_CHOSEN_KERNELS(dense_tiles).place(mask(layer, row), kept, k, count, dense);
        } else {
            with_lists(layer, [&](auto index) {
                const auto* columns = rows<decltype(index)>(layer).columns + begin;
                for (int64_t i = 0; i < count; ++i) dense[columns[i]] = kept[i];
            });
        }
    }

    // The step of the kept weights of rows [first, last), whose gradients are in w_.values_grad.
    void update(size_t l, int64_t first, int64_t last) {
        const StepLayer& layer = p_.layers[l];
        const int64_t begin = slot(layer, first), size = slot(layer, last) - begin;
        const int64_t at = e_ * layer.lists.capacity + begin;
        if (layer.frozen) score_gradient(l, at, size);
        apply(layer.values_rule, layer.values + at, w_.values_grad.get(), layer.values_state, at,
              size);
        if (!writes_effective(layer)) return;
        for (int64_t r = first; r < last; ++r)
            scatter(layer, r, layer.values + at + slot(layer, r) - begin,
                    effective(layer) + r * layer.in_features);
    }

    // Straight through to the probability, and through the factor: each entry of m changes it.
    void score_gradient(size_t l, int64_t at, int64_t size) {
        const StepLayer& layer = p_.layers[l];
        const auto& kernels = LS_CHOSEN_KERNELS(sample_mask);
        float offset = 0.0f;
        if (layer.rescale)
            offset =
                static_cast<float>(-kernels.dot(w_.values_grad.get(), w_.drawn[l].get(), size) /
                                   static_cast<double>(std::max<int64_t>(w_.ones[l], 1)));
        kernels.score_gradient(factor(l), offset, layer.frozen + at, layer.values + at, size,
                               w_.values_grad.get());
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
