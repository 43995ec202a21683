"""drop_channels: the way back, compact layers, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lottery_sparse as ls
from tests.channel_problems import batch, close, masked, small_conv, train


def test_without_masks_nothing_goes_and_nothing_is_shared():
    model, x = small_conv().double(), batch()
    before = copy.deepcopy(model.state_dict())
    narrow, channels = ls.drop_channels(model, x)
    assert channels.flop_ratio == 1
    assert torch.equal(narrow(x), model(x))
    train(narrow, "sgd", x)
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
