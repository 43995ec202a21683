"""model.apply(fn) over compact layers: initialisers see a dense weight, the rest the Parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from masked_layers import SOURCES, masked
from torch import nn
from torch.nn import init

import lottery_sparse as ls

INITIALISERS = {
    "xavier_uniform_": init.xavier_uniform_,
    "kaiming_normal_": lambda w: init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    "kaiming_uniform_": lambda w: init.kaiming_uniform_(tensor=w),
    "orthogonal_": init.orthogonal_,
    "trunc_normal_": lambda w: init.trunc_normal_(w, std=0.02),
    "constant_": lambda w: init.constant_(w, 0.5),
    "data.normal_": lambda w: w.data.normal_(0, 0.1),
    "data =": lambda w: setattr(w, "data", torch.randn(w.shape)),
    "by its fans": lambda w: w.data.uniform_(-1, 1).div_(w.size(1) * w[0, 0].numel()),
}


def pair(frozen="zero"):
    layers = nn.Sequential(
        masked(nn.Conv2d(3, 4, 3), frozen, 0.4), nn.Flatten(), masked(nn.Linear(16, 5), frozen, 0.4)
    )
    return layers, ls.compact_(copy.deepcopy(layers))


def each(fn):
    """Over layers of these types, as people write it."""
    return lambda module: fn(module) if isinstance(module, nn.Linear | nn.Conv2d) else None


def same(plain, compact):
    for i in (0, 2):
        assert torch.equal(compact[i].effective_weight, plain[i].effective_weight)
        assert torch.equal(compact[i].bias, plain[i].bias)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(compact(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", SOURCES)
@pytest.mark.parametrize("name", INITIALISERS)
def test_initialisers_draw_what_they_draw_for_the_masked_layer(name, frozen):
    plain, compact = pair(frozen)
    held = list(compact.parameters())

    def start(layer):
        INITIALISERS[name](layer.weight)
        init.zeros_(layer.bias)

    for model in (plain, compact):
        torch.manual_seed(5)
        assert model.apply(each(start)) is model
    assert all(a is b for a, b in zip(held, compact.parameters(), strict=True))
    same(plain, compact)
    assert all(not layer.weight[int(layer.kept.kept) :].any() for layer in compact[::2])


def test_what_is_done_to_layers_and_parameters_is_done_to_them():
    plain, compact = pair()
    for model in (plain, compact):
        torch.manual_seed(3)
        model.apply(each(lambda layer: layer.reset_parameters()))
    same(plain, compact)
    found = []
    compact.apply(lambda module: found.extend(module.parameters(recurse=False)))
    assert all(a is b for a, b in zip(found, compact.parameters(), strict=True))
    compact.apply(each(lambda layer: layer.weight.requires_grad_(False)))
    assert not compact[0].weight.requires_grad
    compact.apply(each(lambda layer: layer.half()))
    assert compact[2].weight.dtype == torch.float16
    assert compact[2].weight.dim() == 1
    compact.apply(each(lambda layer: layer.float()))
    before = [layer.effective_weight for layer in compact[::2]]
    compact.apply(each(ls.sparsify_))
    assert all(torch.equal(a.weight, b) for a, b in zip(compact[::2], before, strict=True))


def test_a_vector_has_no_fans_elsewhere():
    _, compact = pair()
    with pytest.raises(ValueError, match="fewer than 2 dimensions"):
        init.xavier_uniform_(compact[2].weight)
    assert compact[2].weight.dim() == 1, "and works as before"
    assert compact.apply(lambda module: None)[2].weight.shape == compact[2].weight.shape
