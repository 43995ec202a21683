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


def supermask_cases() -> dict[str, Callable[[], Any]]:
    shape, batch = (4096, 4096), 256
    score, key, kept = meta(*shape, dtype=FP32), meta(3, dtype=torch.int64), meta(dtype=torch.int64)
    cases = {
        "sample_bits 4096x4096": call("sample_bits", score, key),
        "sample_bits ragged 27": call("sample_bits", meta(64, 27, dtype=FP32), key),
    }
    for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
        x, dy = (meta(batch, 4096, dtype=dtype) for _ in range(2))
        weights = {"tensor": (meta(*shape, dtype=dtype), None), "signs": (meta(dtype=dtype), True)}
        for weight, (w, signs) in weights.items():
            plus = bits(*shape) if signs else None
            title = f"supermask_linear product {weight} 4096x4096 B256 {name}"
            network = score, w, bits(*shape), kept
            cases[title] = call("supermask_linear", x, *network, None, plus)
            cases[f"{title}, backward"] = call(
                "supermask_linear_backward", dy, x, *network, plus, True, False, True
            )
    image, shape = meta(60, 128, 32, 32), (128, 128, 3, 3)
    network = meta(*shape, dtype=FP32), meta(*shape), bits(128, 1152), kept
    options = [1, 1], [1, 1], [1, 1], 1
    cases["supermask_conv2d 128x128x3x3 bf16"] = call(
        "supermask_conv2d", image, *network, None, None, *options
    )
    cases["supermask_conv2d 128x128x3x3 bf16, backward"] = call(
        "supermask_conv2d_backward", image, image, *network, None, *options, True, False, True
    )
    return cases


CASES: dict[str, Callable[[], Any]] = {**linear_cases(), **supermask_cases()}
