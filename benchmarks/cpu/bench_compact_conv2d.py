"""One training step of a compact 3x3 convolution (padding 1), dx and dvalues, autograd included.

Contenders, all float32 and without bias, x requiring grad:

    F.conv2d                dense, [B, C, H, W] contiguous
    F.conv2d channels_last  dense, oneDNN's other layout
    prune                   torch.nn.utils.prune on nn.Conv2d, contiguous
    sparseprop batch, sparseprop width   the peer's two ways to vectorise, see peers.py
    ls kernels, ls kernels channels_last   our two kernel calls, no module, no autograd
    ls compact, ls compact channels_last   ls.nn.CompactConv2d, as it dispatches by itself
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import lottery_sparse as ls
from benchmarks.cpu import peers, steps
from benchmarks.cpu.layers import CONV_DENSITIES, CONVS, QUICK_CONVS, QUICK_DENSITIES
from benchmarks.cpu.steps import Problem
from lottery_sparse.ops import dispatch


class Case(NamedTuple):
    layer: str
    batch: int
    density: float
    contender: str


def cases(quick: bool) -> list[Case]:
    densities = QUICK_DENSITIES if quick else CONV_DENSITIES
    found = []
    for layer in QUICK_CONVS if quick else CONVS:
        batch = CONVS[layer].batch
        found += [Case(layer, batch, densities[0], name) for name in ANY_DENSITY]
        found += [Case(layer, batch, d, name) for d in densities for name in SPARSE]
    return found


def problem(case: Case) -> Problem:
    conv = CONVS[case.layer]
    x = torch.randn(case.batch, conv.in_channels, conv.size, conv.size, requires_grad=True)
    weight = torch.randn(conv.out_channels, conv.in_channels, 3, 3, requires_grad=True)
    dy = torch.randn(case.batch, conv.out_channels, conv.size, conv.size)
    return Problem(x, weight, torch.rand(weight.shape) < case.density, dy)


def dense(p: Problem, layout: torch.memory_format = torch.contiguous_format) -> Callable:
    x, weight = (
        t.detach().contiguous(memory_format=layout).requires_grad_() for t in (p.x, p.weight)
    )
    dy = p.dy.contiguous(memory_format=layout)

    def step():
        x.grad = weight.grad = None
        F.conv2d(x, weight, padding=1).backward(dy)

    return step


def convolution(p: Problem) -> nn.Conv2d:
    o, i = p.weight.shape[:2]
    layer = nn.Conv2d(i, o, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(p.weight)
    return layer


def pruned(p: Problem) -> Callable:
    layer = prune.custom_from_mask(convolution(p), "weight", p.mask)
    return steps.of_layer(layer, layer.weight_orig, p)


def sparseprop(p: Problem, over_width: bool) -> Callable:
    make = partial(peers.SparsepropConv2d, padding=1, stride=1, over_width=over_width)
    try:
        layer = peers.checked(
            make, p.weight.detach(), p.mask, p.x, p.dy, partial(F.conv2d, padding=1)
        )
    except peers.Unusable as reason:
        pytest.skip(str(reason))
    return steps.of_layer(layer, layer.values, p)


def layer_of(p: Problem) -> Any:
    model = ls.sparsify_(nn.Sequential(convolution(p)))
    ls.set_masks_(model, {"0.weight": p.mask})
    return ls.compact_(model)[0]


def compact(p: Problem, layout: torch.memory_format = torch.contiguous_format) -> Callable:
    layer = layer_of(p)
    x = p.x.detach().contiguous(memory_format=layout).requires_grad_()
    dy = p.dy.contiguous(memory_format=layout)
    return steps.of_layer(layer, layer.weight, p._replace(x=x, dy=dy))


def kernels(p: Problem, layout: torch.memory_format = torch.contiguous_format) -> Callable:
    if not dispatch.built("cpu"):
        pytest.skip("lottery_sparse._C is not built")
    from lottery_sparse.ops.compact import cpu_conv2d as compact_cpu_conv2d
    from lottery_sparse.ops.compact.arguments import CompactArgs
    from lottery_sparse.ops.masked.arguments import Geometry

    layer = layer_of(p)
    x, dy = (t.detach().contiguous(memory_format=layout) for t in (p.x, p.dy))
    own = layer.weight.detach(), None, layer.weight_effective, layer.kept
    a = CompactArgs(x, *own, zero=True, geometry=Geometry([1, 1], [1, 1], [1, 1], 1))

    def step():
        _, carried = compact_cpu_conv2d.compact_conv2d(a)
        compact_cpu_conv2d.compact_conv2d_backward(a, dy, True, True, carried)

    return step


ANY_DENSITY = {
    "F.conv2d": dense,
    "F.conv2d channels_last": partial(dense, layout=torch.channels_last),
    "prune": pruned,
}
SPARSE = {
    "sparseprop batch": partial(sparseprop, over_width=False),
    "sparseprop width": partial(sparseprop, over_width=True),
    "ls kernels": kernels,
    "ls kernels channels_last": partial(kernels, layout=torch.channels_last),
    "ls compact": compact,
    "ls compact channels_last": partial(compact, layout=torch.channels_last),
}


def bench_compact_conv2d(benchmark, quick, case):
    step = (ANY_DENSITY | SPARSE)[case.contender](problem(case))
    benchmark.extra_info.update(case._asdict())
    benchmark.group = f"{case.layer}, batch {case.batch}"
    steps.measure(benchmark, step, quick)
