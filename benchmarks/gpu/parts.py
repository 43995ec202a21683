"""The kernels of a training step alone, against cuBLAS and the time predicted from their bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import lottery_sparse as ls
from benchmarks.gpu.rows import BANDWIDTH, RATES, Case, Row
from benchmarks.gpu.timing import Device, Skip, Work, timed
from benchmarks.gpu.train import compact, dense
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists


def kernel(op: str) -> Callable:
    if dispatch.module_of(op, "triton") is None:
        raise Skip(f"there is no triton {op}")
    return partial(dispatch.run_on, "triton", op)


class Part:
    """What the kernels of one layer take."""

    def __init__(self, d: Device, n: int, k: int, batch: int, density: float):
        mask = d.mask(n, k, density=density)
        self.x, self.dy, self.w = d.randn(batch, k), d.randn(batch, n), d.randn(n, k)
        self.bits = ls.ops.pack_mask(mask)
        self.kept = KeptLists.of(mask)
        self.values = self.w[mask].contiguous()
        self.w = torch.where(mask, self.w, 0.0)
        self.score = self.w.float()
        self.key = torch.tensor([0, 1, 2], device=d.name)

    def masked(self, *needs: bool) -> tuple:
        run = kernel("masked_linear_backward")
        return run(self.dy, self.x, self.w, self.bits, None, None, *needs)

    def dvalues(self, run: Callable) -> tuple:
        rest = (*self.kept, True, False, True)
        return run(self.dy, self.x, self.values, self.w, *rest)


# part -> contender -> call
PARTS: dict[str, dict[str, Callable[[Part], Any]]] = {
    "forward": {
        "cuBLAS": lambda p: torch.mm(p.x, p.w.T),
        "triton": lambda p: kernel("masked_linear")(p.x, p.w, p.bits, None, None, None),
    },
    "dx": {
        "cuBLAS": lambda p: torch.mm(p.dy, p.w),
        "triton": lambda p: p.masked(True, False),
    },
    "dw": {
        "cuBLAS": lambda p: torch.mm(p.dy.T, p.x),
        "triton": lambda p: p.masked(False, True),
    },
    "dvalues": {
        "cuBLAS and gather": lambda p: p.dvalues(
            partial(dispatch.run_on, "dense", "compact_linear_backward")
        ),
        "triton": lambda p: p.dvalues(kernel("compact_linear_backward")),
    },
    "scatter": {
        "triton": lambda p: kernel("scatter_kept_")(p.w, p.values, p.kept.starts, p.kept.columns),
    },
    "sample": {"triton": lambda p: kernel("sample_bits")(p.score, p.key)},
}
WITHOUT_BATCH = ("scatter", "sample")


def part_row(
    part: str, call: Callable, n: int, k: int, batch: int, density: float, d: Device
) -> Row:
    def work() -> Work:
        size = 2.0 * n * k
        parts = [Part(d, n, k, batch, density) for _ in range(d.copies(size))]
        activations, kept = 2.0 * batch * (n + k), density * n * k
        moved = {
            "dvalues": activations + 4 * kept,
            "scatter": 4 * kept + 32 * kept,  # a sector for each write
            "sample": 4.125 * n * k,
        }.get(part, size + n * k / 8 + activations)
        flops = 0.0 if part in WITHOUT_BATCH else 2.0 * batch * n * k

        def run() -> None:
            for p in parts:
                call(p)

        predicted = max(moved / BANDWIDTH, flops / RATES["bf16"]) * 1e6
        return Work(run, len(parts), moved, flops, predicted)

    return timed(d, work)


def part_cases(dry: bool) -> list[Case]:
    n, k, batches = (64, 64, (8,)) if dry else (4096, 4096, (64, 256, 512, 4096))
    return [
        Case(
            "train",
            part,
            name,
            f"{n}x{k} B{batch}",
            partial(part_row, part, call, n, k, batch, 0.05),
            None if name == "cuBLAS" else 0.05,
            peer=name.startswith("cuBLAS"),
        )
        for batch in batches
        for part, contenders in PARTS.items()
        for name, call in contenders.items()
        if batch == batches[0] or part not in WITHOUT_BATCH
    ]


def update_row(make: Callable, moved: float, n: int, k: int, density: float, d: Device) -> Row:
    """An optimizer step alone, and with it what keeps an effective weight fresh."""

    def work() -> Work:
        layer = nn.Linear(k, n, bias=False, device=d.name)
        layer, update = make(d, layer, d.mask(n, k, density=density))
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        return Work(update, 1, moved * n * k, 0.0, moved * n * k / BANDWIDTH * 1e6)

    return timed(d, work)


def update_cases(dry: bool) -> list[Case]:
    n, k, density = 64 if dry else 4096, 64 if dry else 4096, 0.05
    contenders = {
        "fused Adam, dense": (dense, 28.0, True),
        "ls.optim": (partial(compact, kind=ls.optim.Adam), 32 * density, False),
        "fused Adam and scatter": (compact, 32 * density, False),
    }
    return [
        Case(
            "train",
            "update",
            name,
            f"{n}x{k}",
            partial(update_row, make, moved, n, k, density),
            None if peer else density,
            dtype="fp32",
            peer=peer,
        )
        for name, (make, moved, peer) in contenders.items()
    ]


def cases(dry: bool) -> list[Case]:
    return part_cases(dry) + update_cases(dry)
