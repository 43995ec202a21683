"""One training step of a compact layer, y = x Wᵀ, dx and dvalues, autograd included.

Contenders, without bias, x requiring grad, all float32 but the last:

    F.linear           dense; the gradient is allocated anew each step, torch's default
    F.linear kept      … zero_grad(set_to_none=False): gradients are zeroed and added to
    bare mm            dense; three torch.mm into memory allocated once, no autograd
    prune              torch.nn.utils.prune on nn.Linear
    sparseprop, sparselab   peers, see peers.py
    ls kernels         our two kernel calls, no module, no autograd, at every density
    ls compact         ls.nn.CompactLinear, as it dispatches by itself
    ls compact frozen  … with nonzero frozen values: forward and dx stay dense
    F.linear forward, CSR forward, ls forward   forward only, no autograd
    F.linear bf16, ls kernels bf16, ls compact bf16   everything in bfloat16, at two layers
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lottery_sparse as ls
from benchmarks.cpu import peers, steps
from benchmarks.cpu.layers import (
    BFLOAT16_COMPACT_LAYERS,
    BFLOAT16_DENSITIES,
    COMPACT_LAYERS,
    DENSITIES,
    LAYERS,
    QUICK_COMPACT_LAYERS,
    QUICK_DENSITIES,
)
from benchmarks.cpu.steps import Problem
from lottery_sparse.ops import dispatch


class Case(NamedTuple):
    layer: str
    batch: int
    density: float
    contender: str


def cases(quick: bool) -> list[Case]:
    densities = QUICK_DENSITIES if quick else DENSITIES
    found = []
    for layer, batch in QUICK_COMPACT_LAYERS if quick else COMPACT_LAYERS:
        found += [Case(layer, batch, densities[0], name) for name in ANY_DENSITY]
        found += [Case(layer, batch, d, name) for d in densities for name in SPARSE]
    for layer, batch in () if quick else BFLOAT16_COMPACT_LAYERS:
        found += [Case(layer, batch, densities[0], DENSE_BFLOAT16)]
        found += [Case(layer, batch, d, name) for d in BFLOAT16_DENSITIES for name in BFLOAT16]
    return found


def problem(case: Case) -> Problem:
    return steps.linear_problem(LAYERS[case.layer], case.batch, case.density)


def dense_forward(p: Problem) -> Callable:
    x, weight = p.x.detach(), p.weight.detach()
    return lambda: F.linear(x, weight)


def csr_forward(p: Problem) -> Callable:
    # F.linear takes a CSR weight too, but is five times slower
    csr, x = (p.weight.detach() * p.mask).to_sparse_csr(), p.x.detach()
    return lambda: (csr @ x.t()).t()


def peer(kind: type) -> Callable[[Problem], Callable]:
    def make(p: Problem) -> Callable:
        try:
            layer = peers.checked(kind, p.weight.detach(), p.mask, p.x, p.dy, F.linear)
        except peers.Unusable as reason:
            pytest.skip(str(reason))
        return steps.of_layer(layer, layer.values, p)

    return make


def compact(p: Problem, frozen="zero") -> Any:
    n, k = p.weight.shape
    layer = nn.Linear(k, n, bias=False, dtype=p.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(p.weight)
    model = ls.sparsify_(nn.Sequential(layer))
    ls.set_masks_(model, {"0.weight": p.mask}, frozen)
    return ls.compact_(model)[0]


def compact_step(p: Problem) -> Callable:
    layer = compact(p)
    return steps.of_layer(layer, layer.weight, p)


def frozen_step(p: Problem) -> Callable:
    layer = compact(p, ls.frozen.Constant())
    return steps.of_layer(layer, layer.weight, p)


def compact_forward(p: Problem) -> Callable:
    layer, x = compact(p), p.x.detach()

    def step():
        with torch.no_grad():
            layer(x)

    return step


def kernels(p: Problem) -> Callable:
    ops = torch.ops.lottery_sparse_native
    layer = compact(p)
    values, kept, x, dy = layer.weight.detach(), layer.kept, p.x.detach(), p.dy

    def step():
        _, packed = ops.compact_linear(x, values, kept.starts, kept.columns, None)
        ops.compact_linear_backward(dy, packed, values, *kept, True, True, True, False)

    return step


def bfloat16(make: Callable) -> Callable:
    """The same contender with everything in bfloat16."""

    def of(p: Problem) -> Callable:
        x, weight = (t.detach().bfloat16().requires_grad_() for t in (p.x, p.weight))
        return make(Problem(x, weight, p.mask, p.dy.bfloat16()))

    return of


ANY_DENSITY = {
    "F.linear": steps.dense,
    "F.linear kept": steps.dense_kept_gradients,
    "bare mm": steps.dense_bare,
    "prune": steps.pruned,
    "F.linear forward": dense_forward,
}
SPARSE = {
    "sparseprop": peer(peers.SparsepropLinear),
    "sparselab": peer(peers.SparselabLinear),
    "ls kernels": kernels,
    "ls compact": compact_step,
    "ls compact frozen": frozen_step,
    "CSR forward": csr_forward,
    "ls forward": compact_forward,
}

DENSE_BFLOAT16 = "F.linear bf16"
BFLOAT16 = {
    "ls kernels bf16": bfloat16(kernels),
    "ls compact bf16": bfloat16(compact_step),
}
CONTENDERS = ANY_DENSITY | SPARSE | {DENSE_BFLOAT16: bfloat16(steps.dense)} | BFLOAT16


def bench_compact_linear(benchmark, quick, case):
    if case.contender.startswith("ls ") and not dispatch.built("cpu"):
        pytest.skip("lottery_sparse._C is not built")
    step = CONTENDERS[case.contender](problem(case))
    benchmark.extra_info.update(case._asdict())
    benchmark.group = f"{case.layer}, batch {case.batch}"
    steps.measure(benchmark, step, quick)
