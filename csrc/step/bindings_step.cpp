// The rim of train_step: a stack of compact layers and their optimizer's state, as lists of
// tensors.
#include <cmath>
#include <limits>
#include <utility>

#include "rim/rim.h"
#include "step/train_step.h"

namespace lottery_sparse {
namespace {

constexpr size_t kLists = 6;  // tensors in `lists` per layer
constexpr size_t kRates = 7;  // numbers per parameter, see rule()

// Adam: lr, beta1, beta2, eps, weight_decay, decoupled, maximize.
// SGD: lr, momentum, dampening, weight_decay, nesterov, maximize, first.
StepRule rule(bool adam, const double* r, double t) {
    StepRule found = {};
    found.adam = adam;
    if (adam) {
        const bool decoupled = r[5] != 0;
        found.rates = {static_cast<float>(1 - r[1]),
                       static_cast<float>(r[2]),
                       static_cast<float>(1 - r[2]),
                       static_cast<float>(r[3]),
                       decoupled ? 0.0f : static_cast<float>(r[4]),
                       decoupled ? static_cast<float>(1 - r[0] * r[4]) : 1.0f,
                       r[6] != 0};
        found.step_size = static_cast<float>(-(r[0] / (1 - std::pow(r[1], t))));
        found.second_scale = static_cast<float>(std::sqrt(1 - std::pow(r[2], t)));
    } else {
        found.sgd = {static_cast<float>(-r[0]),
                     static_cast<float>(r[1]),
                     static_cast<float>(1 - r[2]),
                     static_cast<float>(r[3]),
                     r[4] != 0,
                     r[5] != 0,
                     r[6] != 0};
    }
    return found;
}

// A tensor of `count` elements that kernels write in place, or nullptr where there is none.
template <class T>
T* in_place(const char* name, const Tensor& t, ScalarType dtype, int64_t count) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous(), name,
                    " must be a contiguous ", toString(dtype), " CPU tensor.");
    if (t.numel() == 0 && count > 0) return nullptr;
    STD_TORCH_CHECK(t.numel() == count, name, " has ", t.numel(), " elements, expected ", count,
                    ".");
    return output<T>(t);
}

std::vector<PhiloxKey> keys_of(const Tensor& keys, int64_t networks) {
    constexpr int64_t kMax = std::numeric_limits<uint32_t>::max();
    const int64_t* key = in_place<int64_t>("keys", keys, ScalarType::Long, 3 * networks);
    std::vector<PhiloxKey> found;
    for (int64_t e = 0; e < networks; ++e, key += 3) {
        STD_TORCH_CHECK(0 <= key[1] && key[1] <= kMax && 0 <= key[2] && key[2] <= kMax,
                        "stream and step of a key must fit 32 bits.");
        found.push_back({static_cast<uint64_t>(key[0]), static_cast<uint32_t>(key[1]),
                         static_cast<uint32_t>(key[2])});
    }
    return found;
}

// Each layer has, where an empty tensor says that there is none:
//
//   parameters     values and bias; a layer with a learned mask has scores for values
//   first, second  the states of its parameters; `steps` their counters, `rates` kRates numbers
//   each effective      its effective weight, unless it neither reads nor keeps one lists starts,
//   columns, column_starts, rows, positions and mask; a plain layer has none,
//                  and its values are `effective`, too
//   zero           whether pruned weights hold zero
//   frozen, keys   the weights under a learned mask, and the key of its draws, which goes on by a
//                  step
Tensor train_step_op(Tensor x, Tensor labels, std::vector<Tensor> parameters,
                     std::vector<Tensor> first, std::vector<Tensor> second,
                     std::vector<Tensor> steps, std::vector<Tensor> effective,
                     std::vector<Tensor> lists, std::vector<int64_t> zero,
                     std::vector<int64_t> keep_effective, std::vector<Tensor> frozen,
                     std::vector<Tensor> keys, std::vector<int64_t> rescale,
                     std::vector<double> rates, bool adam, int64_t networks, int64_t threads,
                     std::vector<double> limits) {
    x = checked("x", x, ScalarType::Float);
    labels = checked("labels", labels, ScalarType::Long);
    const size_t layers = effective.size();
    STD_TORCH_CHECK(
        layers > 0 && parameters.size() == 2 * layers && lists.size() == kLists * layers &&
            first.size() == 2 * layers && second.size() == 2 * layers &&
            steps.size() == 2 * layers && zero.size() == layers &&
            keep_effective.size() == layers && frozen.size() == layers && keys.size() == layers &&
            rescale.size() == layers && limits.size() == 2 && rates.size() == 2 * layers * kRates,
        "the lists of tensors do not fit each other.");
    check_rank("x", x, 2, 3);
    check_rank("labels", labels, 1, 2);
    TrainStep p = {networks,
                   x.size(x.dim() - 2),
                   floats(x),
                   x.dim() == 2,
                   static_cast<const int64_t*>(labels.const_data_ptr()),
                   labels.dim() == 1,
                   {},
                   nullptr,
                   threads,
                   limits[0],
                   limits[1]};
    STD_TORCH_CHECK(networks > 0 && (x.dim() == 2 || x.size(0) == networks) &&
                        (labels.dim() == 1 || labels.size(0) == networks) &&
                        labels.size(labels.dim() - 1) == p.batch && p.batch > 0,
                    "x ", shape_text(x), " and labels ", shape_text(labels), " do not fit ",
                    networks, " networks with a batch of at least 1.");
    int64_t features = x.size(x.dim() - 1);
    bool several = false;
    for (size_t l = 0; l < layers; ++l) {
        const Tensor* list = &lists[kLists * l];
        const bool learned = keys[l].numel() > 0;
        const bool unread = list[0].numel() > 0 && effective[l].dim() == 1;
        const Tensor& shaped = learned ? frozen[l] : unread ? list[kLists - 1] : effective[l];
        check_rank("effective", shaped, 2, 3);
        several = shaped.dim() == 3;
        const int64_t k = features, n = shaped.size(shaped.dim() - 2);
        const int64_t slots = parameters[2 * l].numel();
        StepLayer layer = {};
        layer.in_features = k;
        layer.out_features = n;
        layer.plain = list[0].numel() == 0;
        layer.zero = zero[l];
        layer.keep_effective = keep_effective[l];
        layer.values = in_place<float>("values", parameters[2 * l], ScalarType::Float, slots);
        layer.effective = learned ? nullptr
                                  : in_place<float>("effective", effective[l], ScalarType::Float,
                                                    networks * n * k);
        layer.bias =
            in_place<float>("bias", parameters[2 * l + 1], ScalarType::Float, networks * n);
        STD_TORCH_CHECK(!unread || (layer.zero && !layer.keep_effective),
                        "effective is missing for a layer that reads it.");
        if (learned) {
            STD_TORCH_CHECK(layer.plain && slots == networks * n * k,
                            "scores and weights must have one shape.");
            layer.frozen =
                in_place<float>("frozen", frozen[l], ScalarType::Float, networks * n * k);
            layer.rescale = rescale[l];
            layer.keys = keys_of(keys[l], networks);
        } else if (layer.plain) {
            STD_TORCH_CHECK(layer.values == layer.effective && slots == networks * n * k,
                            "starts are missing.");
        } else {
            const bool wide = list[1].scalar_type() == ScalarType::Int;
            const ScalarType numbers = wide ? ScalarType::Int : ScalarType::Short;
            layer.lists = {
                in_place<int64_t>("starts", list[0], ScalarType::Long, networks * (n + 1)),
                wide ? static_cast<void*>(in_place<int32_t>("columns", list[1], numbers, slots))
                     : in_place<int16_t>("columns", list[1], numbers, slots),
                in_place<int64_t>("column_starts", list[2], ScalarType::Long, networks * (k + 1)),
                wide ? static_cast<void*>(in_place<int32_t>("rows", list[3], numbers, slots))
                     : in_place<int16_t>("rows", list[3], numbers, slots),
                in_place<int32_t>("positions", list[4], ScalarType::Int, slots),
                /*capacity=*/0,
                wide};
            layer.mask = in_place<uint8_t>("mask", list[5], ScalarType::Bool, networks * n * k);
            for (int64_t e = 1; unread && e <= networks; ++e)
                STD_TORCH_CHECK(
                    n * k == 0 || static_cast<double>(layer.lists.starts[e * (n + 1) - 1]) /
                                          static_cast<double>(n * k) <=
                                      limits[0],
                    "effective is missing for a network that keeps too much.");
        }
        layer.lists.capacity = slots / networks;
        for (size_t i = 2 * l; i < 2 * l + 2; ++i) {
            const int64_t count = parameters[i].numel();
            float** state = i == 2 * l ? layer.values_state : layer.bias_state;
            state[0] = in_place<float>("a state", first[i], ScalarType::Float, count);
            state[1] = in_place<float>("a state", second[i], ScalarType::Float, count);
            STD_TORCH_CHECK(!adam || count == 0 || (learned && i % 2) || (state[0] && state[1]),
                            "Adam needs two states per parameter.");
            in_place<float>("step", steps[i], ScalarType::Float, 1);
        }
        p.layers.push_back(std::move(layer));
        features = n;
    }
    for (int64_t i = 0; i < labels.numel(); ++i)
        STD_TORCH_CHECK(0 <= p.labels[i] && p.labels[i] < features, "labels must be in [0, ",
                        features, "), got ", p.labels[i], ".");
    for (size_t i = 0; i < steps.size(); ++i) {
        double t = 0;
        if (float* counter = in_place<float>("step", steps[i], ScalarType::Float, 1))
            t = *counter + 1.0f;
        StepLayer& layer = p.layers[i / 2];
        (i % 2 ? layer.bias_rule : layer.values_rule) = rule(adam, &rates[i * kRates], t);
    }
    Tensor loss = several ? empty({networks}, ScalarType::Float) : empty({}, ScalarType::Float);
    p.loss = output<float>(loss);
    train_step(p, kParallel);
    // last, so that a step for which there is no memory does not count
    for (const Tensor& taken : steps)
        if (taken.numel()) *output<float>(taken) += 1;
    for (const Tensor& key : keys)
        for (int64_t e = 0; e < key.numel() / 3; ++e) ++output<int64_t>(key)[3 * e + 2];
    return loss;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lottery_sparse_native, CPU, m) {
    m.impl("train_step", TORCH_BOX(&train_step_op));
}

}  // namespace lottery_sparse
