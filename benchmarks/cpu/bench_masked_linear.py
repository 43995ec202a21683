"""One training step of a linear layer, y = x Wᵀ, dx and dW, autograd included, x requiring grad.

Contenders, all float32 and without bias:

    F.linear      dense; the gradient is allocated anew each step, torch's default
    bare mm       dense; three torch.mm into memory allocated once, no autograd
    prune         torch.nn.utils.prune on nn.Linear
    ls reference  ls.ops.masked_linear as reference defines it
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

import lottery_sparse as ls
from benchmarks.cpu import steps
from benchmarks.cpu.layers import BATCHES, DENSITIES, LAYERS, QUICK_DENSITIES, QUICK_LAYERS
from benchmarks.cpu.steps import Problem
from lottery_sparse.ops import dispatch

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


def masked(p: Problem) -> Callable:
    return lambda: steps.backward(ls.ops.masked_linear(p.x, p.weight, p.mask), p)


def count(p: Problem) -> Callable:
    from lottery_sparse.ops.bits import cpu as bits_cpu

    return lambda: bits_cpu.count_kept(p.mask)


STEPS = {
    "F.linear": steps.dense,
    "bare mm": steps.dense_bare,
    "prune": steps.pruned,
    "ls reference": masked,
    "ls dense": masked,
    "ls cpu": masked,
    "ls": masked,
    "count": count,
}


def bench_masked_linear(benchmark, quick, case):
    if case.contender in ("ls cpu", "count") and not dispatch.built("cpu"):
        pytest.skip("lottery_sparse._C is not built")
    problem = steps.linear_problem(LAYERS[case.layer], case.batch, case.density)
    step = STEPS[case.contender](problem)
    benchmark.extra_info.update(case._asdict())
    benchmark.group = f"{case.layer}, batch {case.batch}"
    forced = case.contender.removeprefix("ls ")
    with ls.use_backend(forced) if forced in dispatch.BACKENDS else contextlib.nullcontext():
        steps.measure(benchmark, step, quick)
