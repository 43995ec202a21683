"""The one number of a machine that limits of dispatch scale with (design D19)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from lottery_sparse import measurements
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists

# A layer at about the density where dense and sparse products break even.
_FEATURES, _BATCH, _KEEP = 1024, 64, 0.4
_SECONDS = 1.0
# Repetitions agree if the third best of them is at most a tenth slower than the best.
_AGREEING, _MOST_SPREAD = 3, 0.1


class Rate(NamedTuple):
    """How many times as fast the dense library multiplies as the kernels, per multiply-add.

    A kernel wins up to a density of about 1 / ratio.
    """

    ratio: float
    spread: float  # the third best repetition over the best, less 1: the larger of both

    @property
    def reliable(self) -> bool:
        """Whether repetitions agree."""
        return self.spread <= _MOST_SPREAD


def measure() -> Rate:
    """The rate of this machine: y, dx and dW of a float32 layer, on one thread, in a second."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(_BATCH, _FEATURES, generator=generator) for _ in range(2))
    weight = torch.randn(_FEATURES, _FEATURES, generator=generator)
    mask = torch.rand(weight.shape, generator=generator) < _KEEP
    kept, values, dense = KeptLists.of(mask), weight[mask], torch.where(mask, weight, 0.0)
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(weight)
    native = torch.ops.lottery_sparse_native

    def library() -> None:
        torch.mm(x, dense.T, out=y)
        torch.mm(dy, dense, out=dx)
        torch.mm(dy.T, x, out=dw)

    def kernels() -> None:
        packed = native.compact_linear(x, values, kept.starts, kept.columns, None)[1]
        native.compact_linear_backward(dy, packed, values, *kept, True, True, True, False)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = _in_turns(library, kernels)
    finally:
        torch.set_num_threads(threads)
    best = [found[0] for found in times]
    spread = max(found[_AGREEING - 1] / found[0] - 1 for found in times)
    return Rate(best[1] / best[0] * mask.numel() / len(values), spread)


def _in_turns(*calls: Callable[[], None]) -> list[list[float]]:
    """The times of each call in seconds, ascending; each call runs four times at least."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or len(times[-1]) <= _AGREEING:
        for found, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return [sorted(found) for found in times]


def measure_once() -> None:
    """Measure the rate and keep it for the processes to come, unless that was done.

    Nothing is kept where repetitions do not agree, or LS_MACHINE=0.
    """
    file, key = measurements.RATE
    known = measurements.dense_rate() is not None
    if known or os.environ.get("LS_MACHINE") == "0" or not dispatch.built("cpu"):
        return
    dispatch.library_of("cpu")  # registers the kernels
    found = measure()
    if found.reliable:
        measurements.put(file, key, held=measurements.held(), **found._asdict())
