"""drop_channels: the narrow model computes and trains as the model does."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lottery_sparse as ls

TOLERANCE = 1e-9  # float64, behind batch norms that divide by 0.003
# A bias before a batch norm has a gradient that is 0 but for rounding; Adam's usual 1e-8 would make
# steps of that.
EPS = 1e-3


def small_conv(width=16, bias=True, image=(3, 12, 12)):
    """As the Conv-4 of the paper, small, with strides and paddings."""
    features = 2 * width * (image[1] // 4) * (image[2] // 4)
    return nn.Sequential(
        nn.Conv2d(image[0], width, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 32, bias=bias),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def strided():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2),
        nn.LeakyReLU(),
        nn.AvgPool2d(2, stride=1, padding=1),
        nn.Conv2d(12, 12, 3, padding="same", padding_mode="reflect"),
        nn.ReLU6(),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(48, 24, bias=False),
        nn.Tanh(),
        nn.Linear(24, 16),
        nn.Sigmoid(),
        nn.Linear(16, 4),
    )


def normed(bias=False):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=bias),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, bias=bias),
        nn.BatchNorm2d(16, affine=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(16 * 25),
        nn.Linear(16 * 25, 24, bias=bias),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )


def linear_only():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(432, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)
    )


MODELS = {
    "conv": small_conv,
    "conv without biases": lambda: small_conv(bias=False),
    "strided": strided,
    "batch norm": normed,
    "batch norm, biases": lambda: normed(bias=True),
    "linear": linear_only,
}


def masked(name: str, density: float, biases: str = "mixed", seed: int = 0) -> nn.Module:
    """float64, with random masks, and the last layer at 10 times the density."""
    torch.manual_seed(seed)
    model = ls.sparsify_(MODELS[name]().double())
    masks = {n: torch.rand(m.shape) < density for n, m in ls.masks_of(model).items()}
    last = list(masks)[-1]
    masks[last] = torch.rand(masks[last].shape) < min(1.0, 10 * density)
    with torch.no_grad():
        for module in model.modules():
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                values = {"mixed": torch.randn_like(bias), "zero": torch.zeros_like(bias)}
                bias.copy_(values[biases])
                if name != "batch norm, biases":  # see CASES
                    bias.mul_(torch.rand(bias.shape) < 0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a layer that keeps nothing
        return ls.set_masks_(model, masks)


def batch(count=4):
    return torch.randn(count, 3, 12, 12, dtype=torch.float64)


def close(got, expected, note=""):
    torch.testing.assert_close(
        got, expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{note} {text}"
    )


def evaluated(model, x):
    return copy.deepcopy(model).eval()(x)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, eps=EPS),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=EPS, weight_decay=0.0),
}


def train(model, optimizer, steps=3):
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    torch.manual_seed(7)
    outputs = []
    for _ in range(steps):
        y = model(batch())
        loss = F.cross_entropy(y, torch.randint(y.shape[1], (len(y),)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


# Biases of 0 in front of batch norms become numbers of 1e-17 by rounding: those of a constant
# channel then decide what the ReLU at 0 behind it does, in either model.
CASES = [(name, "mixed") for name in MODELS] + [
    (name, "zero") for name in MODELS if name != "batch norm, biases"
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("density", [0.1, 0.02, 0.005, 0.0])
@pytest.mark.parametrize(("name", "biases"), CASES)
def test_the_narrow_model_trains_as_the_model(name, density, biases, optimizer):
    model = masked(name, density, biases)
    before, x = copy.deepcopy(model), batch()
    narrow, channels = ls.drop_channels(model, x)
    if 0 < density <= 0.02:
        assert channels.flop_ratio < 1
    close(evaluated(narrow, x), evaluated(model, x))
    for got, expected in zip(train(narrow, optimizer), train(model, optimizer), strict=True):
        close(got, expected)
    close(evaluated(narrow, x), evaluated(model, x))
    restored = channels.restore_(before, narrow)
    close(evaluated(restored, x), evaluated(model, x))
    for key, value in model.state_dict().items():  # what was dropped never moved
        if "running" not in key:
            close(restored.state_dict()[key], value, key)


@pytest.mark.parametrize("density", [0.1, 0.02, 0.005, 0.0])
@pytest.mark.parametrize("name", MODELS)
def test_for_inference_constants_fold(name, density):
    model = masked(name, density)
    train(model, "sgd")  # running statistics of their own
    model.eval()
    x = batch()
    narrow, channels = ls.drop_channels(model, x, training=False)
    _, trainable = ls.drop_channels(model, x)
    close(narrow(x), model(x))
    assert channels.flop <= trainable.flop
    dense, again = ls.drop_channels(ls.densify_(copy.deepcopy(model)), x, training=False)
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
        narrow, channels = ls.drop_channels(model, x, training)
        assert channels.outputs["0"].tolist() == channels.inputs["2"].tolist() == stay, options
        assert channels.inputs["0"].tolist() == [0, 1]
        assert channels.outputs["2"].tolist() == [0, 1, 2]
        close(narrow(x), model(x))


def test_a_bias_that_trains_stays_and_trains():
    model, x = two_convolutions(), torch.randn(2, 2, 7, 7, dtype=torch.float64)
    narrow, _ = ls.drop_channels(model, x)
    narrow(x).sum().backward()
    model(x).sum().backward()
    close(narrow[0].bias.grad, model[0].bias.grad[[0, 3]])
    assert model[0].bias.grad[3] != 0
    assert model[0].bias.grad[[1, 2]].tolist() == [0, 0]
    model[0].bias.requires_grad_(False)
    assert ls.drop_channels(model, x)[1].outputs["0"].tolist() == [0, 3]  # 0.5 is no 0


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
    narrow, channels = ls.drop_channels(model, batch())
    assert [m.weight.shape for m in narrow if hasattr(m, "weight")] == [(1, 432), (1, 1), (5, 1)]
    assert channels.flop_before == 2 * (432 * 40 + 40 * 30 + 30 * 5)
    assert channels.flop == 2 * (432 + 1 + 5)
    close(narrow(batch()[:0]), model(batch()[:0]))


def test_flop_of_convolutions_counts_positions():
    model, x = two_convolutions(stride=2), torch.zeros(2, 2, 7, 9)
    _, channels = ls.drop_channels(model, x)
    first, second = 9 * 5 * 7, 9 * 2 * 3
    assert channels.flop_before == 2 * (2 * 4 * first + 4 * 3 * second)
    assert channels.flop == 2 * (2 * 2 * first + 2 * 3 * second)


def test_without_masks_nothing_goes_and_nothing_is_shared():
    model, x = small_conv().double(), batch()
    before = copy.deepcopy(model.state_dict())
    narrow, channels = ls.drop_channels(model, x)
    assert channels.flop_ratio == 1
    assert torch.equal(narrow(x), model(x))
    train(narrow, "sgd")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    ls.densify_(channels.restore_(ls.sparsify_(model), ls.sparsify_(narrow)))
    close(model(x), narrow(x))


def test_masks_and_rounds_go_back():
    model, x = masked("conv", 0.02), batch()
    narrow, channels = ls.drop_channels(model, x)
    kept = {name: mask.clone() for name, mask in ls.masks_of(narrow).items()}
    for mask in kept.values():
        mask[mask.nonzero()[::2].unbind(1)] = False
    ls.set_masks_(narrow, kept)
    names = [id(p) for p in model.parameters()]
    channels.restore_(model, narrow)
    close(model(x), narrow(x))
    assert names == [id(p) for p in model.parameters()]
    assert sum(m.sum() for m in ls.masks_of(model).values()) >= sum(m.sum() for m in kept.values())


def test_compact_layers_stay_compact():
    model = masked("conv", 0.02).float()
    compact, x = ls.compact_(copy.deepcopy(model)), batch().float()
    narrow, channels = ls.drop_channels(compact, x)
    assert {type(m) for m in narrow if hasattr(m, "weight")} == {
        ls.CompactConv2d,
        ls.CompactLinear,
    }
    plain, other = ls.drop_channels(model, x)
    assert channels.flop == other.flop
    assert all(
        torch.equal(a, b)
        for a, b in zip(narrow.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    optimizer = torch.optim.SGD(narrow.parameters(), lr=0.1)
    narrow(x).square().sum().backward()
    optimizer.step()
    channels.restore_(compact, narrow)
    torch.testing.assert_close(compact(x), narrow(x), rtol=1e-4, atol=1e-5)


def test_a_single_layer_and_one_activation_used_twice():
    layer = ls.sparsify_(nn.Linear(3, 2))
    assert torch.equal(ls.drop_channels(layer, torch.ones(1, 3))[0].weight, layer.weight)
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
    narrow, _ = ls.drop_channels(model, torch.ones(1, 3))
    assert torch.equal(narrow(torch.ones(1, 3)), model(torch.ones(1, 3)))


class Residual(nn.Module):
    def forward(self, input):
        return input + 1


class OwnForward(nn.Sequential):
    def forward(self, input):
        return super().forward(input).flip(1)


def shared():
    one = nn.Linear(3, 3)
    return nn.Sequential(one, nn.ReLU(), one)


def hooked():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(lambda *_: None)
    return model


def frozen():
    model = ls.sparsify_(nn.Sequential(nn.Linear(3, 3)))
    masks = {"0.weight": torch.eye(3, dtype=torch.bool)}
    return ls.set_masks_(model, masks, ls.Constant(0.1))


IMAGE, ROW = torch.ones(1, 4, 5, 5), torch.ones(1, 3)


@pytest.mark.parametrize(
    ("make", "x", "error", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), Residual()), ROW, TypeError, "1 is a Residual"),
        (lambda: OwnForward(nn.Linear(3, 3)), ROW, TypeError, "the model is a OwnForward"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), ROW, TypeError, "1 is a Layer"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), IMAGE, ValueError, "0 has groups=2"),
        (lambda: nn.Sequential(nn.Flatten(2)), IMAGE, TypeError, "dimensions 1 to -1"),
        (lambda: nn.MaxPool2d(2, return_indices=True), IMAGE, TypeError, "indices"),
        (shared, ROW, TypeError, "2 shares a parameter with 0"),
        (hooked, ROW, TypeError, "0 has a forward hook"),
        (frozen, ROW, ValueError, "0 holds frozen values"),
        (lambda: nn.Linear(3, 3), torch.ones(1, 4), ValueError, r"\[B, 3\].*gets \[B, 4\]"),
        (lambda: nn.Linear(5, 3), IMAGE, ValueError, "needs"),
        (lambda: nn.Conv2d(3, 3, 3), IMAGE, ValueError, "H, W"),
        (lambda: nn.Linear(3, 3), torch.ones(3), ValueError, "input must be"),
        (lambda: nn.Linear(3, 3, device="meta"), ROW, ValueError, "meta"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            ROW,
            TypeError,
            "is a Para",
        ),
    ],
)
def test_refusals(make, x, error, words):
    with pytest.raises(error, match=words):
        ls.drop_channels(make(), x)


def test_the_way_back_refuses_other_models():
    model, x = masked("conv", 0.02), batch()
    narrow, channels = ls.drop_channels(model, x)
    with pytest.raises(ValueError, match="shape"):
        channels.restore_(model, model)
    with pytest.raises(ValueError, match="which the model does not"):
        channels.restore_(model, nn.Sequential(narrow))
