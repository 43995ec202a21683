"""Masked layers for the tests of modules, and what it means that one trains like its dense twin."""

from __future__ import annotations

import copy

import torch
from tolerances import close

import lottery_sparse as ls

SOURCES = {
    "zero": "zero",
    "tensor": lambda weight: torch.randn_like(weight),
    "constant": ls.frozen.Constant(0.25),
    "seeded": ls.frozen.Seeded("normal", seed=3),
}


def masked(layer, frozen="zero", density=0.5, mask=None):
    """A masked layer with a random mask and a frozen source of `SOURCES`."""
    ls.sparsify_(layer)
    source = SOURCES[frozen]
    source = source(layer.weight.detach()) if callable(source) else source
    mask = torch.rand(layer.weight.shape) < density if mask is None else mask
    ls.set_masks_(layer, {"weight": mask}, source)
    return layer


def dense_twin(layer):
    """The dense layer that holds the effective weight."""
    twin = ls.densify_(copy.deepcopy(layer))
    assert type(twin) is layer.dense_type
    return twin


def assert_trains_like(layer, twin, x):
    """Same output, input gradient, bias gradient; weight gradient the twin's where kept, else 0."""
    xs = [x.detach().clone().requires_grad_() for _ in range(2)]
    ys = [layer(xs[0]), twin(xs[1])]
    close(*ys)
    assert ys[0].dtype == ys[1].dtype
    assert ys[0].stride() == ys[1].stride()
    dy = torch.randn_like(ys[0])
    for y in ys:
        y.backward(dy)
    close(xs[0].grad, xs[1].grad)
    mask = layer.weight_mask
    close(layer.weight.grad, twin.weight.grad * mask)
    assert (layer.weight.grad[~mask] == 0).all()
    if twin.bias is not None:
        close(layer.bias.grad, twin.bias.grad)
