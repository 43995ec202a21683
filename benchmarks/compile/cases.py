"""The calls that the compile gate compiles: every kernel, at shapes it is meant for.

A name says op, shapes and dtype; "product" in it asks for the matrix unit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.tools.doctor import tf32

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def bits(*shape: int) -> Tensor:
    return meta(*shape[:-1], 4 * -(-shape[-1] // 128), dtype=torch.int32)


def call(op: str, *args: Any) -> Callable[[], Any]:
    """A call of the backend's function of that name."""
    return lambda: dispatch.run_on("triton", op, *args)


def linear_case(
    n: int, k: int, batch: int, dtype: torch.dtype, source: str = "zero", networks: int = 0
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """masked_linear and its backward; networks side by side share their x."""
    lead = (networks,) if networks else ()
    x, w, dy = (
        meta(*shape, dtype=dtype) for shape in ((batch, k), (*lead, n, k), (*lead, batch, n))
    )
    mask = meta(*w.shape, dtype=torch.bool) if source == "bool" else bits(*w.shape)
    sources = {
        "tensor": (w, None),
        "signs": (meta(*lead, dtype=dtype), bits(*w.shape)),
    }
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


def supermask_cases() -> dict[str, Callable[[], Any]]:
    shape, batch = (4096, 4096), 256
    score, key, kept = meta(*shape, dtype=FP32), meta(3, dtype=torch.int64), meta(dtype=torch.int64)
    cases = {
        "sample_bits 4096x4096": call("sample_bits", score, key),
        "sample_bits ragged 27": call("sample_bits", meta(64, 27, dtype=FP32), key),
    }
    for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
        x, dy = (meta(batch, 4096, dtype=dtype) for _ in range(2))
        weights = {
            "tensor": (meta(*shape, dtype=dtype), None),
            "signs": (meta(dtype=dtype), bits(*shape)),
        }
        for weight, (w, plus) in weights.items():
            title = f"supermask_linear product {weight} 4096x4096 B256 {name}"
            network = score, w, bits(*shape), kept
            cases[title] = call("supermask_linear", x, *network, None, plus)
            cases[f"{title}, backward"] = call(
                "supermask_linear_backward", dy, x, *network, plus, True, False, True
            )
    title = "supermask_linear product tensor 4096x4096 B256"
    for part in ("", ", backward"):
        cases[f"{title} tf32{part}"] = with_tf32(cases[f"{title} fp32{part}"])
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


def with_tf32(case: Callable[[], Any], allowed: bool = True) -> Callable[[], Any]:
    def run() -> Any:
        with tf32(allowed):
            return case()

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
                *(dy, x, values, w, starts, columns, *rest, True, False, True),
            )
        w, values = meta(*lead, n, k), meta(*lead, slots, dtype=FP32)
        cases[f"scatter_kept_ {title}"] = call("scatter_kept_", w, values, starts, columns)
        cases[f"gather_kept {title}"] = call("gather_kept", w, starts, columns)
    return cases


def step_cases() -> dict[str, Callable[[], Any]]:
    """A step of the optimizers: 4096 x 4096 at 5% kept, and its bias."""
    n, k = 4096, 4096
    params, grads, *states = (
        [meta(n * k // 20, dtype=FP32), meta(n, dtype=FP32)] for _ in range(4)
    )
    starts, columns = meta(n + 1, dtype=torch.int64), meta(n * k // 20, dtype=torch.int16)
    targets = [meta(n, k)], [starts], [columns], [0]
    counts = [meta(dtype=FP32), meta(dtype=FP32)]
    rates = 0.9, 0.999, 1e-8, 0.01
    return {
        "adam_step 4096x4096": call(
            "adam_step", params, grads, *states, counts, *targets, 1e-3, *rates, True, False
        ),
        "sgd_step 4096x4096": call(
            "sgd_step", params, grads, states[0], *targets, 0.1, 0.9, 0.0, 1e-4, True, False, False
        ),
    }


def ternary_cases() -> dict[str, Callable[[], Any]]:
    n, k = 28672, 8192
    codes, scale = meta(n // 16, k // 16, 16, dtype=torch.int32), meta(n, dtype=FP32)
    cases = {}
    for batch, dtype in ((16, BF16), (64, BF16), (128, BF16), (512, BF16), (64, FP32)):
        args = meta(batch, k, dtype=dtype), codes, scale, None, n, False
        title = f"ternary_linear product 28672x8192 B{batch} {'bf16' if dtype == BF16 else 'fp32'}"
        cases[title] = call("ternary_linear", *args)
    # where the dense library multiplies: what writes its weight
    args = meta(4096, k), meta(128, k // 16, 16, dtype=torch.int32), meta(2048), None, 2048, False
    return cases | {"ternary_linear 2048x8192 B4096 bf16": call("ternary_linear", *args)}


def kernels_of(op: str, *args: Any) -> Callable[[], Any]:
    """A call that reads a result back at its end, which meta tensors do not have."""

    def run() -> None:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            call(op, *args)()

    return run


def small_cases() -> dict[str, Callable[[], Any]]:
    mask, table = meta(4096, 4096, dtype=torch.bool), meta(2**15, dtype=torch.int32)
    key = 2**24, 2**40, 2**31, 0
    values, starts = meta(4096 * 410), meta(4097, dtype=torch.int64)
    packed = meta(16, 4096), values, starts, bits(4096, 4096), None
    selection = [meta(4096, 4096, dtype=FP32)], [mask], 2**20, 2**40, [2**31]
    return {
        "pack_mask 4096x4096": call("pack_mask", mask),
        "unpack_mask 4096x4096": call("unpack_mask", bits(4096, 4096), 4096),
        "random_words": call("random_words", *key, "meta"),
        "random_signs": call("random_signs", *key, "meta"),
        "random_normal": call("random_normal", *key, table, "meta"),
        "bitmap_linear 4096x4096": call("bitmap_linear", *packed),
        "keep_top 4096x4096": kernels_of("keep_top", *selection),
    }


def conv_cases() -> dict[str, Callable[[], Any]]:
    """masked_conv2d and its backward: channels, pixels of a side, batch, kernel, stride, frozen."""
    both = {
        "zero 128 ch 32x32 B256 3x3 bf16": (128, 32, 256, 3, 1, BF16, "zero"),
        "tensor 64 ch 32x32 B256 3x3 bf16": (64, 32, 256, 3, 1, BF16, "tensor"),
        "signs 256 ch 14x14 B64 1x1 bf16": (256, 14, 64, 1, 1, BF16, "signs"),
        "zero 128 ch 28x28 B64 3x3 stride 2 bf16": (128, 28, 64, 3, 2, BF16, "zero"),
        "zero 64 ch 32x32 B60 3x3 fp32": (64, 32, 60, 3, 1, FP32, "zero"),
        "zero 64 ch 32x32 B60 3x3 tf32": (64, 32, 60, 3, 1, FP32, "zero"),
        "zero 128 ch 32x32 B256 3x3 tf32": (128, 32, 256, 3, 1, FP32, "zero"),
        "zero 8 of 64 ch 32x32 B60 3x3 bf16": (64, 32, 60, 3, 1, BF16, "zero", 8),
    }
    cases = {}
    for title, arguments in both.items():
        # torch allows TF32 in convolutions unless told otherwise, and so do our kernels
        forward, backward = (with_tf32(case, "tf32" in title) for case in conv_case(*arguments))
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
    sources = {
        "tensor": (w, None),
        "signs": (meta(*lead, dtype=dtype), mask),
    }
    geometry = [stride] * 2, [kernel // 2] * 2, [1, 1], 1
    rest = *sources.get(source, (None, None)), *geometry
    return (
        call("masked_conv2d", x, w, mask, meta(*lead, channels, dtype=dtype), *rest),
        call("masked_conv2d_backward", dy, x, w, mask, *rest, True, True),
    )


CASES: dict[str, Callable[[], Any]] = {
    **linear_cases(),
    **compact_cases(),
    **conv_cases(),
    **supermask_cases(),
    **step_cases(),
    **ternary_cases(),
    **small_cases(),
}
