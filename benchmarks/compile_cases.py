"""The calls that the compile gate compiles: every kernel, at shapes it is meant for.

A name says op, shapes and dtype; "product" in it asks for the matrix unit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def bits(*shape: int) -> Tensor:
    return meta(*shape[:-1], 4 * -(-shape[-1] // 128), dtype=torch.int32)


def call(op: str, *args: Any) -> Callable[[], Any]:
    """A call of the backend's function of that name."""
    return lambda: getattr(importlib.import_module("lottery_sparse.kernels"), op)(*args)


def linear_cases() -> dict[str, Callable[[], Any]]:
    cases = {}
    for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
        x, w, dy = (meta(*shape, dtype=dtype) for shape in ((256, 4096), (4096, 4096), (256, 4096)))
        constant = meta(dtype=dtype)
        sources = {
            "zero": (None, None),
            "tensor": (w, None),
            "signs": (constant, bits(4096, 4096)),
        }
        for source, frozen in sources.items():
            title = f"masked_linear product {source} 4096x4096 B256 {name}"
            cases[title] = call("masked_linear", x, w, bits(4096, 4096), None, *frozen)
            cases[f"{title}, backward"] = call(
                "masked_linear_backward", dy, x, w, bits(4096, 4096), *frozen, True, True
            )
    return cases


CASES: dict[str, Callable[[], Any]] = {**linear_cases()}
