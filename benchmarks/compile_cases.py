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


def linear_case(
    n: int, k: int, batch: int, dtype: torch.dtype, source: str = "zero", networks: int = 0
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """masked_linear and its backward; networks side by side share their x."""
    lead = (networks,) if networks else ()
    x, w, dy = (
        meta(*shape, dtype=dtype) for shape in ((batch, k), (*lead, n, k), (*lead, batch, n))
    )
    mask = meta(*w.shape, dtype=torch.bool) if source == "bool" else bits(*w.shape)
    sources = {"tensor": (w, None), "signs": (meta(*lead, dtype=dtype), bits(*w.shape))}
    frozen = sources.get(source, (None, None))
    return (
        call("masked_linear", x, w, mask, meta(*lead, n, dtype=dtype), *frozen),
        call("masked_linear_backward", dy, x, w, mask, *frozen, True, True),
    )


def linear_cases() -> dict[str, Callable[[], Any]]:
    both = {
        "product zero 4096x4096 B64 bf16": (4096, 4096, 64, BF16),
        "product tensor 4096x4096 B128 bf16": (4096, 4096, 128, BF16, "tensor"),
        "product zero 4096x4096 B256 bf16": (4096, 4096, 256, BF16),
        "product tensor 4096x4096 B256 bf16": (4096, 4096, 256, BF16, "tensor"),
        "product signs 4096x4096 B256 bf16": (4096, 4096, 256, BF16, "signs"),
        "product zero, bool mask 4096x4096 B256 bf16": (4096, 4096, 256, BF16, "bool"),
        "product zero 45 of 300x784 B60 bf16": (300, 784, 60, BF16, "zero", 45),
        "product zero 45 of 300x784 B60 fp32": (300, 784, 60, FP32, "zero", 45),
        "product zero 4096x4096 B256 fp32": (4096, 4096, 256, FP32),
    }
    cases = {}
    for title, arguments in both.items():
        forward, backward = linear_case(*arguments)
        cases |= {f"masked_linear {title}": forward, f"masked_linear {title}, backward": backward}
    for batch in (64, 256):
        title = f"masked_linear product zero 4096x4096 B{batch} tf32"
        forward, backward = map(with_tf32, linear_case(4096, 4096, batch, FP32))
        cases |= {title: forward, f"{title}, backward": backward}
    return cases


def with_tf32(case: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return case()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def compact_cases() -> dict[str, Callable[[], Any]]:
    """What a compact layer runs of its own, at 5% kept."""
    shapes = {"4096x4096 B256": (4096, 4096, 256, 0), "45 of 300x784 B60": (300, 784, 60, 45)}
    cases = {}
    for title, (n, k, batch, networks) in shapes.items():
        lead, slots = (networks,) if networks else (), n * k // 20
        starts = meta(*lead, n + 1, dtype=torch.int64)
        columns = meta(*lead, slots, dtype=torch.int16)
        rest = meta(*lead, k + 1, dtype=torch.int64), columns, meta(*lead, slots, dtype=torch.int32)
        for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
            x, dy = meta(batch, k, dtype=dtype), meta(*lead, batch, n, dtype=dtype)
            w, values = meta(*lead, n, k, dtype=dtype), meta(*lead, slots, dtype=dtype)
            cases[f"compact_linear product {title} {name}, backward"] = call(
                "compact_linear_backward",
                *(dy, x, values, w, starts, columns, *rest, True, False, True, None),
            )
        w, values = meta(*lead, n, k), meta(*lead, slots, dtype=FP32)
        cases[f"scatter_kept_ {title}"] = call("scatter_kept_", w, values, starts, columns)
        cases[f"gather_kept {title}"] = call("gather_kept", w, starts, columns)
    return cases


def conv_cases() -> dict[str, Callable[[], Any]]:
    """masked_conv2d and its backward: channels, pixels of a side, batch, kernel, stride, frozen."""
    both = {
        "zero 128 ch 32x32 B256 3x3 bf16": (128, 32, 256, 3, 1, BF16, "zero"),
        "tensor 64 ch 32x32 B256 3x3 bf16": (64, 32, 256, 3, 1, BF16, "tensor"),
        "signs 256 ch 14x14 B64 1x1 bf16": (256, 14, 64, 1, 1, BF16, "signs"),
        "zero 128 ch 28x28 B64 3x3 stride 2 bf16": (128, 28, 64, 3, 2, BF16, "zero"),
        "zero 64 ch 32x32 B60 3x3 fp32": (64, 32, 60, 3, 1, FP32, "zero"),
        "zero 8 of 64 ch 32x32 B60 3x3 bf16": (64, 32, 60, 3, 1, BF16, "zero", 8),
    }
    cases = {}
    for title, arguments in both.items():
        forward, backward = conv_case(*arguments)
        name = f"masked_conv2d product {title}"
        cases |= {name: forward, f"{name}, backward": backward}
    return cases


def conv_case(
    channels: int,
    side: int,
    batch: int,
    kernel: int,
    stride: int,
    dtype: torch.dtype,
    source: str,
    networks: int = 0,
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """masked_conv2d and its backward; networks side by side share their x."""
    lead, last = (networks,) if networks else (), torch.channels_last
    x = meta(batch, channels, side, side, dtype=dtype).to(memory_format=last)
    small = (side - 1) // stride + 1
    dy = meta(*lead, batch, channels, small, small, dtype=dtype)
    dy = dy if networks else dy.to(memory_format=last)
    w = meta(*lead, channels, channels, kernel, kernel, dtype=dtype)
    mask = bits(*lead, channels, channels * kernel**2)
    sources = {"tensor": (w, None), "signs": (meta(*lead, dtype=dtype), mask)}
    geometry = [stride] * 2, [kernel // 2] * 2, [1, 1], 1
    rest = *sources.get(source, (None, None)), *geometry
    return (
        call("masked_conv2d", x, w, mask, meta(*lead, channels, dtype=dtype), *rest),
        call("masked_conv2d_backward", dy, x, w, mask, *rest, True, True),
    )


CASES: dict[str, Callable[[], Any]] = {**linear_cases(), **compact_cases(), **conv_cases()}
