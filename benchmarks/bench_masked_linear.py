"""One training step of a linear layer, y = x Wᵀ, dx and dW, autograd included, x requiring grad.

Contenders, all float32 and without bias:

    F.linear      dense; the gradient is allocated anew each step, torch's default
    bare mm       dense; three torch.mm into memory allocated once, no autograd
    prune         torch.nn.utils.prune on nn.Linear
    ls reference  ls.ops.masked_linear as reference.py defines it
    ls dense      … on the dense library, with the effective weight
    ls cpu        … on our kernel
    ls            … as it dispatches by itself
    count         counting the kept weights, which dispatch does twice a step
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import lottery_sparse as ls
from benchmarks.layers import BATCHES, DENSITIES, LAYERS, QUICK_DENSITIES, QUICK_LAYERS
from lottery_sparse import backends

ANY_DENSITY = ("F.linear", "bare mm", "prune")  # cost the same at every density
MASKED = ("ls reference", "ls dense", "ls cpu", "ls", "count")


class Case(NamedTuple):
    layer: str
    batch: int
    density: float
    contender: str


def cases(quick: bool) -> list[Case]:
    densities = QUICK_DENSITIES if quick else DENSITIES
    found = []
    for layer in QUICK_LAYERS if quick else LAYERS:
        for batch in BATCHES:
            found += [Case(layer, batch, densities[0], name) for name in ANY_DENSITY]
            found += [Case(layer, batch, d, name) for d in densities for name in MASKED]
    return found


class Problem(NamedTuple):
    x: Tensor  # [B, K]
    weight: Tensor  # [N, K]
    mask: Tensor  # [N, K]
    dy: Tensor  # [B, N]


def problem(case: Case) -> Problem:
    k, n = LAYERS[case.layer]
    x = torch.randn(case.batch, k, requires_grad=True)
    weight = torch.randn(n, k, requires_grad=True)
    return Problem(x, weight, torch.rand(n, k) < case.density, torch.randn(case.batch, n))


def backward(y: Tensor, p: Problem) -> None:
    p.x.grad = p.weight.grad = None
    y.backward(p.dy)


def dense(p: Problem) -> Callable:
    return lambda: backward(F.linear(p.x, p.weight), p)


def dense_bare(p: Problem) -> Callable:
    x, weight, dy = p.x.detach(), p.weight.detach(), p.dy
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(weight)

    def step():
        torch.mm(x, weight.T, out=y)
        torch.mm(dy, weight, out=dx)
        torch.mm(dy.T, x, out=dw)

    return step


def pruned(p: Problem) -> Callable:
    layer = nn.Linear(p.weight.shape[1], p.weight.shape[0], bias=False)
    prune.custom_from_mask(layer, "weight", p.mask)

    def step():
        p.x.grad = layer.weight_orig.grad = None
        layer(p.x).backward(p.dy)

    return step


def masked(p: Problem) -> Callable:
    return lambda: backward(ls.ops.masked_linear(p.x, p.weight, p.mask), p)


def count(p: Problem) -> Callable:
    from lottery_sparse import native

    return lambda: native.count_kept(p.mask)


STEPS = {
    "F.linear": dense,
    "bare mm": dense_bare,
    "prune": pruned,
    "ls reference": masked,
    "ls dense": masked,
    "ls cpu": masked,
    "ls": masked,
    "count": count,
}


def bench_step(benchmark, quick, case):
    if case.contender in ("ls cpu", "count") and not backends.built("cpu"):
        pytest.skip("lottery_sparse._C is not built")
    step = STEPS[case.contender](problem(case))
    benchmark.extra_info.update(case._asdict())
    benchmark.group = f"{case.layer}, batch {case.batch}"
    k, n = LAYERS[case.layer]
    rounds = max(4, min(100, 6_000_000_000 // (k * n * case.batch)) // (4 if quick else 1))
    forced = case.contender.removeprefix("ls ")
    with ls.use_backend(forced) if forced in backends.BACKENDS else contextlib.nullcontext():
        benchmark.pedantic(step, rounds=rounds, warmup_rounds=2)
