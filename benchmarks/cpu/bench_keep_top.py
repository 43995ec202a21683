"""Selecting the top scores as a mask: our kernel, and the op around it, against torch.topk.

torch.topk gives indices in any order (sorted=False), which are then written into a mask; its ties
fall as they fall, ours by the seeded order.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import lottery_sparse as ls
from benchmarks.cpu.layers import QUICK_SELECTION_SIZE, SELECTION_SIZE
from lottery_sparse.ops import dispatch

SCORES = {
    "abs(normal)": lambda n: torch.randn(n).abs_(),
    "two values": lambda n: torch.randint(0, 2, (n,), dtype=torch.int8).float(),
    "all equal": lambda n: torch.ones(n),
}


class Case(NamedTuple):
    scores: str
    keep: float
    threads: int
    contender: str


def cases(quick: bool) -> list[Case]:
    found = []
    for keep in (0.2, 0.5):
        found.append(Case("abs(normal)", keep, 1, "topk"))
        found += [Case("abs(normal)", keep, threads, "kernel") for threads in (1, 2)]
        found.append(Case("abs(normal)", keep, 1, "ls cpu"))
    return found + [Case(scores, 0.5, 1, "kernel") for scores in ("two values", "all equal")]


def topk(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    chosen = torch.zeros_like(mask)
    chosen[torch.topk(scores, count, sorted=False).indices] = True
    return chosen


def kernel(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    from lottery_sparse.ops.selection import cpu as selection_cpu

    return selection_cpu.keep_top([scores], [mask], count, 0, [0])[0]


SELECT = {"topk": topk, "kernel": kernel, "ls cpu": ls.ops.keep_top}


def bench_keep_top(benchmark, quick, case):
    if case.contender != "topk" and not dispatch.built("cpu"):
        pytest.skip("lottery_sparse._C is not built")
    size = QUICK_SELECTION_SIZE if quick else SELECTION_SIZE
    scores = SCORES[case.scores](size)
    mask = torch.ones(size, dtype=torch.bool)
    torch.set_num_threads(case.threads)
    benchmark.extra_info.update(case._asdict(), size=size)
    benchmark.group = f"keep_top, {case.scores}"
    rounds = 2 if case.contender == "topk" else 5
    with ls.use_backend("cpu" if case.contender == "ls cpu" else "reference"):
        chosen = benchmark.pedantic(
            SELECT[case.contender],
            args=(scores, mask, round(case.keep * size)),
            rounds=rounds,
            warmup_rounds=1,
        )
    assert int(chosen.sum()) == round(case.keep * size)
