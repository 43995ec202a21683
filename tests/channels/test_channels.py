"""drop_channels: the narrow model computes and trains as the model does."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from channel_problems import (
    MODELS,
    OPTIMIZERS,
    batch,
    check_history,
    close,
    linear_only,
    masked,
    set_masks_,
    train,
)
from torch import nn

import lottery_sparse as ls


def evaluated(model, x):
    return copy.deepcopy(model).eval()(x)


# Biases of 0 in front of batch norms become numbers of 1e-17 by rounding: those of a constant
# channel then decide what the ReLU at 0 behind it does, in either model.
CASES = [(name, "mixed") for name in MODELS] + [
    (name, "zero") for name in MODELS if name != "batch norm, biases"
]


def check_training(model, x, optimizer="momentum", clip=None):
    """The narrow model trains as the model, and goes back into what the model was; -> channels."""
    before = copy.deepcopy(model)
    narrow, channels = ls.channels.drop_channels(model, x)
    close(evaluated(narrow, x), evaluated(model, x))
    check_history(train(narrow, optimizer, x, clip), train(model, optimizer, x, clip), channels)
    close(evaluated(narrow, x), evaluated(model, x))
    restored = channels.restore_(before, narrow)
    close(evaluated(restored, x), evaluated(model, x))
    if not {"nesterov", "adamw"} & {optimizer}:  # decay moves what was dropped, and nothing else
        for key, value in model.state_dict().items():
            if "running" not in key:
                close(restored.state_dict()[key], value, key)
    return channels


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("density", [0.1, 0.02, 0.005, 0.0])
@pytest.mark.parametrize(("name", "biases"), CASES)
def test_the_narrow_model_trains_as_the_model(name, density, biases, optimizer):
    channels = check_training(masked(name, density, biases), batch(), optimizer)
    if 0 < density <= 0.02:
        assert channels.flop_ratio < 1


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["conv", "batch norm"])
def test_under_any_optimizer(name, optimizer, clip):
    assert check_training(masked(name, 0.02), batch(), optimizer, clip).flop_ratio < 0.8


def test_batch_norms_may_stay_in_eval_mode_and_layers_dense():
    model = masked("batch norm, biases", 0.02)
    train(model, "sgd", batch())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    check_training(model, batch())
    torch.manual_seed(0)
    model = ls.sparsify_(linear_only().double(), lambda _, name: name != "3")
    masks = {name: torch.rand(m.shape) < 0.003 for name, m in ls.masks_of(model).items()}
    masks["5.weight"] = torch.arange(30).remainder(4).eq(1).expand(5, 30)
    with torch.no_grad():
        model[1].bias.abs_().add_(0.1)
        model[3].bias.abs_().add_(0.1)
    channels = check_training(set_masks_(model, masks), batch())
    assert len(channels.outputs["1"]) == 40  # the dense layer reads all
    assert channels.outputs["3"].tolist() == list(range(1, 30, 4))


def behind(*modules, bias=None, trains=True, features=1):
    """Layer 0 has channels 0: ordinary, 1 and 2: without kept weights, 3: not read.

    Channel 1 has the bias, or none has any; channel 2 one of 0.5.
    """
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, 3, bias=bias is not None)
    if bias is not None:
        with torch.no_grad():
            first.bias.copy_(torch.tensor([0.5, bias, 0.5, 0.5]))
        first.bias.requires_grad_(trains)
    last = nn.Conv2d(4, 3, 1) if features == 1 else nn.Linear(4 * features, 3)
    model = ls.sparsify_(nn.Sequential(first, *modules, last).double())
    kept, read = ls.masks_of(model).values()
    kept[1:3], read[:, 3 * features :] = False, False
    return set_masks_(model, dict(zip(ls.masks_of(model), (kept, read), strict=True)))


def norm(bias=0.0, mean=0.0, trains=True, kind=nn.BatchNorm2d, count=4, **options):
    module = kind(count, **options)
    with torch.no_grad():
        if module.bias is not None:
            module.bias.fill_(bias).requires_grad_(trains)
            module.weight.uniform_(0.5, 1.5)
        if module.running_mean is not None:
            module.running_mean.fill_(mean)
    return module


@pytest.mark.parametrize(
    ("make", "stay"),
    [
        (lambda: behind(nn.ReLU(), bias=-1.0), [0, 2]),
        (lambda: behind(nn.ReLU6(), bias=-1.0), [0, 2]),
        (lambda: behind(nn.ReLU(), bias=0.0), [0, 2]),
        (lambda: behind(nn.ReLU(), bias=0.1), [0, 1, 2]),
        (lambda: behind(nn.MaxPool2d(2, padding=1), nn.ReLU(), bias=-1.0), [0, 2]),
        (lambda: behind(nn.AdaptiveAvgPool2d(3), nn.ReLU(), bias=-1.0), [0, 2]),
        (lambda: behind(nn.AvgPool2d(2, padding=1), nn.ReLU(), bias=-1.0), [0, 1, 2]),
        (lambda: behind(nn.AvgPool2d(2, divisor_override=3), nn.ReLU(), bias=-1.0), [0, 1, 2]),
        (lambda: behind(nn.Hardtanh(-0.5, 0.5), nn.ReLU(), nn.GELU(), bias=-1.0), [0, 2]),
        (lambda: behind(nn.Hardtanh(0.1, 0.5), nn.ReLU(), bias=-1.0), [0, 1, 2]),
        (lambda: behind(nn.LeakyReLU(), bias=-1.0), [0, 1, 2]),
        (lambda: behind(nn.Tanh(), bias=0.0), [0, 1, 2]),  # it trains
        (lambda: behind(nn.Tanh(), bias=0.0, trains=False), [0, 2]),
        (lambda: behind(nn.Tanh(), bias=0.1, trains=False), [0, 1, 2]),
        (lambda: behind(nn.ReLU()), [0]),
        (lambda: behind(nn.AvgPool2d(2, padding=1), nn.SiLU()), [0]),
        (lambda: behind(nn.Sigmoid()), [0, 1, 2]),
        (lambda: behind(nn.Softplus(), nn.ReLU()), [0, 1, 2]),
        (lambda: behind(nn.ReLU(), nn.Flatten(), bias=-1.0, features=9), [0, 2]),
        (lambda: behind(nn.Flatten(), nn.ReLU(), nn.Flatten(), bias=-1.0, features=9), [0, 2]),
        # batch norms
        (lambda: behind(norm(), nn.ReLU()), [0]),
        (lambda: behind(norm(-1.0), nn.ReLU()), [0]),
        (lambda: behind(norm(0.1), nn.ReLU()), [0, 1, 2]),
        (lambda: behind(norm(mean=0.1), nn.ReLU()), [0, 1, 2]),  # in eval mode not 0
        (lambda: behind(norm(), nn.Tanh()), [0, 1, 2]),  # its bias trains
        (lambda: behind(norm(trains=False), nn.Tanh()), [0]),
        (lambda: behind(norm(affine=False), nn.Tanh()), [0]),
        (lambda: behind(norm(affine=False, track_running_stats=False)), [0]),
        (lambda: behind(norm(-1.0), nn.ReLU(), bias=0.0), [0, 2]),
        (lambda: behind(norm(-1.0), nn.ReLU(), bias=-1.0), [0, 1, 2]),  # less its mean, 0
        (lambda: behind(nn.ReLU(), norm(-1.0), nn.ReLU(), bias=-1.0), [0, 2]),
        (lambda: behind(nn.ReLU(), norm(-1.0), bias=-1.0), [0, 1, 2]),
        (
            lambda: behind(nn.Flatten(), norm(-1.0, 0.0, True, nn.BatchNorm1d, 36), nn.ReLU(),
                           features=9),
            [0],
        ),
    ],
)  # fmt: skip
def test_what_trains_stays_and_what_cannot_goes(make, stay):
    model, x = make(), torch.randn(4, 2, 5, 5, dtype=torch.float64)
    channels = check_training(model, x)
    assert channels.outputs["0"].tolist() == stay
    assert channels.inputs["0"].tolist() == [0, 1]


@pytest.mark.parametrize("name", ["bias", "running_mean"])
def test_one_feature_that_differs_keeps_the_channel(name):
    one = norm(-1.0, 0.0, True, nn.BatchNorm1d, 36)
    with torch.no_grad():
        getattr(one, name)[9 + 4] = 0.1  # of channel 1
    model = behind(nn.Flatten(), one, nn.ReLU(), features=9)
    channels = check_training(model, torch.randn(4, 2, 5, 5, dtype=torch.float64))
    assert channels.outputs["0"].tolist() == [0, 1]
    assert channels.outputs["2"].tolist() == channels.inputs["4"].tolist() == list(range(18))


def test_a_kept_weight_of_0_is_kept_in_training():
    model = behind(nn.Tanh())
    masks = ls.masks_of(model)
    masks["0.weight"][1, 0, 0, 0] = True
    set_masks_(model, masks)
    with torch.no_grad():
        model[0].weight[1] = 0.0
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    assert check_training(model, x).outputs["0"].tolist() == [0, 1]
    assert model[0].weight[1].any()  # it has learnt
    with torch.no_grad():
        model[0].weight[1] = 0.0
    assert ls.channels.drop_channels(model, x, training=False)[1].outputs["0"].tolist() == [0]


def test_a_norm_of_the_input_and_a_layer_of_no_channels():
    model = nn.Sequential(nn.BatchNorm2d(2), *behind(norm(), nn.ReLU()))
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    before = copy.deepcopy(model.double().state_dict())
    narrow, channels = ls.channels.drop_channels(model, x)
    assert (narrow[0].num_features, narrow[2].num_features) == (2, 1)
    assert channels.outputs["1"].tolist() == [0]
    train(narrow, "momentum", x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    close(evaluated(channels.restore_(model, narrow), x), evaluated(narrow, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a no-op"
        empty = nn.Sequential(nn.Linear(3, 0), nn.ReLU(), nn.Linear(0, 2))
    narrow, _ = ls.channels.drop_channels(empty, torch.ones(1, 3))
    assert torch.equal(narrow(torch.ones(1, 3)), empty(torch.ones(1, 3)))


def test_of_channels_that_all_could_go_the_cheapest_stays():
    torch.manual_seed(0)
    model = ls.sparsify_(nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)).double())
    masks = ls.masks_of(model)
    masks["0.weight"][1, 1:], masks["2.weight"][:] = False, False
    x = torch.randn(4, 5, dtype=torch.float64)
    assert check_training(set_masks_(model, masks), x).outputs["0"].tolist() == [1]
    # all constant, and read: the one that stays is not folded
    masks["0.weight"][:], masks["2.weight"][:] = False, True
    set_masks_(model, masks)
    with torch.no_grad():
        model[0].bias.fill_(0.3)
        model[2].weight.fill_(0.5)
    narrow, channels = ls.channels.drop_channels(model.eval(), x, training=False)
    assert channels.outputs["0"].tolist() == [0]
    close(narrow(x), model(x))


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), nn.Dropout2d(0.5)])
def test_dropout_keeps_constants_that_it_would_change(dropout):
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    for modules, bias, stay in [
        ((dropout, nn.ReLU()), None, [0]),
        ((nn.ReLU(), dropout), -1.0, [0, 2]),
        ((nn.Sigmoid(), dropout), None, [0, 1, 2]),
        ((dropout, nn.Sigmoid()), -800.0, [0, 1, 2]),  # of -800 it is 0, of 0 it is not
    ]:
        model = behind(*modules, bias=bias, trains=bias != -800.0)
        narrow, channels = ls.channels.drop_channels(model, x)
        assert channels.outputs["0"].tolist() == stay
        narrow, channels = ls.channels.drop_channels(model.eval(), x, training=False)
        assert channels.outputs["0"].tolist() == [0]
        close(narrow(x), model(x))


@pytest.mark.parametrize("density", [0.1, 0.02, 0.005, 0.0])
@pytest.mark.parametrize("name", MODELS)
def test_for_inference_constants_fold(name, density):
    model = masked(name, density)
    train(model, "momentum", batch())  # running statistics of their own
    model.eval()
    x = batch()
    narrow, channels = ls.channels.drop_channels(model, x, training=False)
    _, trainable = ls.channels.drop_channels(model, x)
    close(narrow(x), model(x))
    assert channels.flop <= trainable.flop
    dense, again = ls.channels.drop_channels(ls.densify_(copy.deepcopy(model)), x, training=False)
    close(dense(x), model(x))
    assert again.flop == channels.flop
    with pytest.raises(ValueError, match="training=True"):
        channels.restore_(model, narrow)


def two_convolutions(**options):
    """Of the first's 4 channels: 0 is ordinary, 1 is not read, 2 and 3 have no kept weight."""
    model = ls.sparsify_(
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, **options), nn.Flatten()
        ).double()
    )
    first, second = ls.masks_of(model).values()
    first[2:], second[:, 1] = False, False
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([0.5, 0.5, -0.5, 0.5]))
    return ls.set_masks_(model, {"0.weight": first, "2.weight": second})


def test_which_channels_go():
    x = torch.randn(2, 2, 7, 7, dtype=torch.float64)
    for options, training, stay in [
        ({}, True, [0, 3]),  # the bias of 3 trains
        ({}, False, [0]),  # and is folded
        ({"padding": 1}, False, [0, 3]),  # but not at a border of zeros
        ({"padding": 1, "padding_mode": "circular"}, False, [0]),
        ({"padding": "same"}, False, [0, 3]),
        ({"padding": "valid", "bias": False}, False, [0]),
    ]:
        model = two_convolutions(**options)
        narrow, channels = ls.channels.drop_channels(model, x, training)
        assert channels.outputs["0"].tolist() == channels.inputs["2"].tolist() == stay, options
        assert channels.inputs["0"].tolist() == [0, 1]
        assert channels.outputs["2"].tolist() == [0, 1, 2]
        close(narrow(x), model(x))


def test_a_bias_that_trains_stays_and_trains():
    model, x = two_convolutions(), torch.randn(2, 2, 7, 7, dtype=torch.float64)
    narrow, _ = ls.channels.drop_channels(model, x)
    narrow(x).sum().backward()
    model(x).sum().backward()
    close(narrow[0].bias.grad, model[0].bias.grad[[0, 3]])
    assert model[0].bias.grad[3] != 0
    assert model[0].bias.grad[[1, 2]].tolist() == [0, 0]
    model[0].bias.requires_grad_(False)
    assert ls.channels.drop_channels(model, x)[1].outputs["0"].tolist() == [0, 3]  # 0.5 is no 0


def test_channels_go_transitively():
    model = linear_only().double()
    ls.sparsify_(model)
    masks = ls.masks_of(model)
    for mask in masks.values():
        mask[:] = False
    masks["1.weight"][7, 3] = masks["3.weight"][5, 7] = masks["5.weight"][2, 5] = True
    masks["1.weight"][8] = masks["3.weight"][6, 8] = True  # ends at 6, which nothing reads
    with torch.no_grad():
        model[1].bias.zero_()
        model[3].bias.fill_(-1.0)
    ls.set_masks_(model, masks)
    narrow, channels = ls.channels.drop_channels(model, batch())
    assert [m.weight.shape for m in narrow if hasattr(m, "weight")] == [(1, 432), (1, 1), (5, 1)]
    assert channels.flop_before == 2 * (432 * 40 + 40 * 30 + 30 * 5)
    assert channels.flop == 2 * (432 + 1 + 5)
    close(narrow(batch()[:0]), model(batch()[:0]))


def test_flop_of_convolutions_counts_positions():
    model, x = two_convolutions(stride=2), torch.zeros(2, 2, 7, 9)
    _, channels = ls.channels.drop_channels(model, x)
    first, second = 9 * 5 * 7, 9 * 2 * 3
    assert channels.flop_before == 2 * (2 * 4 * first + 4 * 3 * second)
    assert channels.flop == 2 * (2 * 2 * first + 2 * 3 * second)
