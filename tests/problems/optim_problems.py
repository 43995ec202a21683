"""What the tests of ls.optim share: cases, Parameters, gradients and closeness."""

from __future__ import annotations

import pytest
import torch
from tolerances import after
from torch import nn

import lottery_sparse as ls
from lottery_sparse.ops import dispatch

PAIRS = {
    "SGD": (ls.optim.SGD, torch.optim.SGD),
    "Adam": (ls.optim.Adam, torch.optim.Adam),
    "AdamW": (ls.optim.AdamW, torch.optim.AdamW),
}
CASES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.03, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.03}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.03, "maximize": True}),
    ("Adam", {"lr": 0.02}),
    ("Adam", {"lr": 0.02, "betas": (0.3, 0.4), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.02, "maximize": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.02}),
    ("AdamW", {"lr": 0.02, "weight_decay": 0.2, "maximize": True, "betas": (0.0, 0.9)}),
]
# none, one, around the widths of vectors, more than one chunk
SIZES = [(0,), (1,), (3, 5), (16,), (31,), (33,), (2, 8193)]
STEPS = 20
PER_STEP = 2  # roundings: of the sum with an update, and those of the update, which is smaller
needs_kernel = pytest.mark.skipif(not dispatch.built("cpu"), reason="no native kernels")


def parameters(sizes=SIZES, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in sizes]


def set_grads(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer, params, steps=STEPS, first=0):
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()
    return params


def states(optimizer):
    return optimizer.state_dict()["state"]


def assert_close(params, expected, steps=STEPS):
    """Within the roundings of so many steps of the largest number that an element has seen."""
    for p, e in zip(params, expected, strict=True):
        scale = e.detach().abs().double() + 1
        error = (p.detach().double() - e.detach().double()).abs()
        assert (error <= 2 * after(PER_STEP * steps, torch.float32) * scale).all()


def by_kernel(monkeypatch):
    """Fails if anything goes through torch's own step."""
    for ours, _ in PAIRS.values():
        monkeypatch.setattr(ours, "_torch_step", lambda self: pytest.fail("by torch"))
