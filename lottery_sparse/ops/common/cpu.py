"""Which calls the C++ kernels take, and where they are the faster ones."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops
from lottery_sparse.ops.bits.cpu import as_bool, count_kept
from lottery_sparse.ops.limits import (
    MAX_DENSITY_LINEAR,
    MOST_STRIDE,
    kept_share,
    kernels_take,
    max_density,
)

# Called by dispatch.numerics.
numerics = torch.ops.lottery_sparse_native.numerics.default

# Integer and half-precision scores that a float32 holds exactly, so ranks stay what they were.
_EXACT_SCORES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16)

_PACKED = ("ternary_linear", "csr_linear", "bitmap_linear")
_MOST_COLUMNS_INT8 = 2**18  # kTernaryMostColumns
_LINEAR = (torch.float32, torch.bfloat16)  # all of a call's tensors alike


def refuses(op: str, *args: Any) -> str | None:
    """Why `op` cannot run here with these arguments, in a sentence; None if it can."""
    if op.startswith("masked_linear"):
        return _refuses_linear(*args[:6] if op == "masked_linear" else args[1:6])
    if op.startswith("compact_"):
        inputs = (*args[:3], *args[4:])  # not `effective`, which is converted where it is read
        dtypes = {a.dtype for a in inputs if isinstance(a, Tensor) and a.is_floating_point()}
        linear = op.startswith("compact_linear")
        if len(dtypes) > 1 or not dtypes.issubset(_LINEAR if linear else _LINEAR[:1]):
            runs = "float32 or bfloat16" if linear else "float32"
            return f"its kernels run {runs}, got {' and '.join(sorted(map(str, dtypes)))}."
        return None if linear else _refuses_conv2d(op, args)
    if op == "scatter_kept_" and not (
        args[0].dtype == args[1].dtype and args[0].dtype in _LINEAR and args[0].is_contiguous()
    ):
        return f"its kernel writes a contiguous float32 or bfloat16 tensor, got {args[0].dtype}."
    if op in _PACKED and any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args):
        return "its kernels run float32, got float64."
    if op == "ternary_linear" and args[5] and args[0].shape[1] > _MOST_COLUMNS_INT8:
        return f"its int8 sums hold up to {_MOST_COLUMNS_INT8} columns, got {args[0].shape[1]}."
    if op == "keep_top":
        dtypes = {score.dtype for score in args[0]} - set(_EXACT_SCORES)
        if dtypes:
            return f"scores are {min(map(str, dtypes))}, which a float32 cannot hold exactly."
    return None


def _refuses_linear(x: Tensor, weight: Tensor, *arguments: Any) -> str | None:
    *_, frozen, signs = arguments
    if frozen is not None or signs is not None:
        return "its sparse kernel takes pruned weights as zero, not as frozen values."
    if x.dtype not in _LINEAR or weight.dtype != x.dtype:
        return f"its kernels run float32 or bfloat16, got {x.dtype}."
    return None


# Images are packed 16 at a time, one line of 16 floats a pixel; kernels number lines in 32 bits.
_MOST_LINES = 2**31 - 1
# Beyond so many lines, 1 GiB, a few images are not worth it: the dense library makes no such copy.
_MANY_LINES, _FEW_IMAGES = 2**24, 4


def _images(op: str, args: tuple) -> Tensor:
    return args[1] if op.endswith("_backward") else args[0]


def _lines(op: str, args: tuple) -> int:
    """What packing takes of x or dy at most: `lines_fit` of csrc/conv2d/sparse_conv2d.cpp."""
    stride, padding, dilation, groups = args[10:14]
    image, (o, i, *kernel) = _images(op, args).shape[-2:], args[3].shape[-4:]
    axes = zip(image, padding, kernel, dilation, stride, strict=True)
    return max(o, i * groups) * math.prod(n + 2 * p + k * d + 16 * s for n, p, k, d, s in axes)


def _copies_too_much(op: str, args: tuple) -> bool:
    return _images(op, args).shape[-4] < _FEW_IMAGES and _lines(op, args) > _MANY_LINES


def _refuses_conv2d(op: str, args: tuple) -> str | None:
    stride = tuple(args[10])
    if not kernels_take(stride):
        return f"its kernels take strides of up to {MOST_STRIDE} pixels, got {stride}."
    if _lines(op, args) > _MOST_LINES:
        shape = tuple(_images(op, args).shape)
        return f"x has shape {shape}, whose padded images are too large for its kernels."
    return None


# Below this density listing and gathering kept weights beats the dense product; measured at
# batches 1 to 1000 of ten layers, benchmarks/results/cpu.md. With few rows the listing dominates.
_MAX_DENSITY = 0.25
_MAX_DENSITY_SMALL_BATCH = 0.15
_SMALL_BATCH = 32
NEVER = 2**62  # rows of x
# A compact layer has its lists already; the limits for forward and dx, for these where they are
# quick or dense is slow (csrc/linear/eager_compact.h, whose calls alone use it), and for dvalues.
MAX_DENSITY_COMPACT = MAX_DENSITY_LINEAR
MAX_DENSITY_QUICK = 0.52
MAX_DENSITY_SAMPLED = 0.45
# bfloat16, both ops, on a processor that multiplies it: 2.2 times as fast dense as float32. From
# this many rows of x on, up to this density.
MAX_DENSITY_BFLOAT16 = ((32, 0.18), (8, 0.12), (0, 0.06))
# Up to this size a call costs more than the product, and one kernel call is the cheapest.
_SMALL_WEIGHT = 4096


@cache
def _multiplies_bfloat16() -> tuple[bool, bool]:
    """Whether this processor multiplies bfloat16 by vectors, and by tiles (AMX)."""
    return torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()


def most_density(x: Tensor, most: float, effective: Tensor | None = None) -> float:
    """Up to which density sparse products of `x` win; `most` is that of float32.

    A float32 `effective` is one under autocast: up to `most` it may lag behind, and the dense
    product would first have to fill it and convert it.
    """
    if effective is not None and effective.dtype != x.dtype:
        return most
    return _most_density(x.dtype, x.shape[-2], most)


def _most_density(dtype: torch.dtype, rows: int, most: float) -> float:
    if dtype != torch.bfloat16:
        return most
    vectors, tiles = _multiplies_bfloat16()
    if tiles:
        return 0.0  # never measured
    if not vectors and rows >= _SMALL_BATCH:  # the dense library takes eight times as long
        return most
    return next(density for least, density in MAX_DENSITY_BFLOAT16 if rows >= least)


def wins(op: str, *args: Any) -> bool:
    """Whether this backend is the faster one for a call that it does not refuse."""
    if op == "compact_linear" or op.startswith("compact_conv2d"):
        x, (effective, starts) = args[0], args[3:5]
        if op != "compact_linear" and _copies_too_much(op, args):
            return False
        most = most_density(x, max_density(effective), effective)
        return kept_share(starts, effective) <= most
    if not op.startswith("masked_linear"):
        return True
    x, weight, mask = args[:3] if op == "masked_linear" else args[1:4]
    if weight.numel() <= _SMALL_WEIGHT:
        return True
    kept = count_kept(as_bool(mask, weight))
    return masked_linear_wins(x.dtype, x.shape[-2], kept, weight.numel())


def masked_linear_wins(dtype: torch.dtype, rows: int, kept: int, count: int) -> bool:
    """Whether the kernel is faster for `rows` of x and `kept` of `count` weights, zeros else."""
    return rows >= masked_linear_least_rows(dtype, kept, count)


def masked_linear_least_rows(dtype: torch.dtype, kept: int, count: int) -> int:
    """From so many rows of x on the kernel is faster, for `kept` of `count` weights, zeros else."""
    if count <= _SMALL_WEIGHT:
        return 0
    for rows in sorted({0, _SMALL_BATCH, *(least for least, _ in MAX_DENSITY_BFLOAT16)}):
        most = _MAX_DENSITY if rows >= _SMALL_BATCH else _MAX_DENSITY_SMALL_BATCH
        if kept <= _most_density(dtype, rows, most) * count:
            return rows
    return NEVER
