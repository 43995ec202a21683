"""One training step of a layer by other means than ours, and how long a step is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

SECONDS, QUICK_SECONDS = 0.3, 0.05  # per case
ROUNDS, FEWEST_ROUNDS, QUICK_FEWEST_ROUNDS = 300, 4, 2


def measure(benchmark, step: Callable[[], object], quick: bool) -> None:
    """As many rounds as fit into the time of a case, after two that warm up."""
    step()
    start = time.perf_counter()
    step()
    once = time.perf_counter() - start
    seconds, fewest = (QUICK_SECONDS, QUICK_FEWEST_ROUNDS) if quick else (SECONDS, FEWEST_ROUNDS)
    fit = int(seconds / max(once, 1e-6))
    benchmark.pedantic(step, rounds=max(fewest, min(ROUNDS, fit)))


class Problem(NamedTuple):
    x: Tensor  # [B, K], or [B, I, H, W]
    weight: Tensor  # [N, K], or [O, I, kh, kw]
    mask: Tensor  # as weight
    dy: Tensor  # [B, N], or [B, O, H, W]


@lru_cache(maxsize=1)  # cases of one problem follow each other
def linear_problem(layer: tuple[int, int], batch: int, density: float) -> Problem:
    k, n = layer
    x = torch.randn(batch, k, requires_grad=True)
    weight = torch.randn(n, k, requires_grad=True)
    return Problem(x, weight, torch.rand(n, k) < density, torch.randn(batch, n))


def backward(y: Tensor, p: Problem) -> None:
    p.x.grad = p.weight.grad = None
    y.backward(p.dy)


def dense(p: Problem) -> Callable:
    """torch's default: the gradient is allocated anew each step."""
    return lambda: backward(F.linear(p.x, p.weight), p)


def dense_kept_gradients(p: Problem) -> Callable:
    """zero_grad(set_to_none=False): gradients are zeroed and added to."""
    p.x.grad, p.weight.grad = torch.zeros_like(p.x), torch.zeros_like(p.weight)

    def step():
        p.x.grad.zero_()
        p.weight.grad.zero_()
        F.linear(p.x, p.weight).backward(p.dy)

    return step


def dense_bare(p: Problem) -> Callable:
    """Three torch.mm into memory allocated once, no autograd."""
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


def of_layer(layer: Callable, values: Any, p: Problem) -> Callable:
    """A layer of ours or of a peer: `values` is its Parameter."""

    def step():
        p.x.grad = values.grad = None
        layer(p.x).backward(p.dy)

    return step
