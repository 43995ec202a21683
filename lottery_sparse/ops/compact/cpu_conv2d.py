"""Compact convolutions: kept weights only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact import reference
from lottery_sparse.ops.compact.arguments import CompactArgs
from lottery_sparse.ops.limits import (
    FEW_IMAGES,
    MANY_LINES,
    MOST_LINES,
    MOST_STRIDE,
    kept_share,
    kernels_take,
    max_density,
)
from lottery_sparse.ops.masked.reference import conv2d, conv2d_backward

_ops = torch.ops.lottery_sparse_native


def why_not(a: CompactArgs, dy: Tensor | None = None, *rest: Any) -> str | None:
    found = {str(t.dtype) for t in (a.x, a.values, a.bias, dy) if t is not None}
    if found != {"torch.float32"}:
        return f"its kernels run float32, got {' and '.join(sorted(found))}."
    stride = tuple(a.geometry.stride)
    if not kernels_take(stride):
        return f"its kernels take strides of up to {MOST_STRIDE} pixels, got {stride}."
    if _lines(a) > MOST_LINES:
        return f"x has shape {tuple(a.x.shape)}, whose padded images are too large for its kernels."
    return None


def is_faster(a: CompactArgs, *backward: Any) -> bool:
    if a.x.shape[-4] < FEW_IMAGES and _lines(a) > MANY_LINES:
        return False
    return kept_share(a.kept.starts, a.effective) <= max_density(a.effective)


def _lines(a: CompactArgs) -> int:
    """What packing takes of x or dy at most: `lines_fit` of csrc/conv2d/sparse_conv2d.cpp."""
    stride, padding, dilation, groups = a.geometry
    image, (o, i, *kernel) = a.x.shape[-2:], a.effective.shape[-4:]
    lines = max(o, i * groups)
    for n, p, k, d, s in zip(image, padding, kernel, dilation, stride, strict=True):
        lines *= n + 2 * p + k * d + 16 * s
    return lines


@dispatch.limited(why_not, is_faster)
def compact_conv2d(a: CompactArgs) -> tuple[Tensor, Tensor]:
    """y, channels_last where x is, and nothing to carry.

    Dense where nothing can be skipped: pruned weights hold other values than zero, or x holds NaN
    or Inf, which make NaN of a pruned weight's zero.
    """
    if a.zero and not _finite(a.x):
        return reference.compact_conv2d(a)
    if not a.zero:
        return conv2d(a.x, a.effective, a.bias, a.geometry), a.x.new_empty(0)
    last = _channels_last(a.x)
    y = _ops.compact_conv2d(
        _inner(a.x, last), a.values, a.kept.starts, a.kept.columns, a.bias,
        a.effective.shape[-2:], *a.geometry, last,
    )  # fmt: skip
    return _outer(y, last), a.x.new_empty(0)


@dispatch.limited(why_not, is_faster)
def compact_conv2d_backward(
    a: CompactArgs, dy: Tensor, need_dx: bool, need_dv: bool, carried: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx, summed over networks for a shared x, and dvalues; empty where not needed."""
    x = a.x
    # NaN and Inf count in products with pruned weights, and with the zeros of a padding
    if not (_finite(dy) and _finite(x)):
        return reference.compact_conv2d_backward(a, dy, need_dx, need_dv)
    sparse_dx = need_dx and a.zero
    dx, dv = x.new_empty(0), x.new_empty(0)
    if sparse_dx or need_dv:
        last = _channels_last(x)
        dx, dv, _ = _ops.compact_conv2d_backward(
            _inner(dy, last), _inner(x, last), a.values, *a.kept,
            a.effective.shape[-2:], *a.geometry, last, sparse_dx, need_dv, False,
        )  # fmt: skip
        dx = _outer(dx, last) if sparse_dx else dx
    if need_dx and not a.zero:
        dx, _ = conv2d_backward(dy, x, a.effective, a.geometry, True, False)
    return dx, dv


def _finite(t: Tensor) -> bool:
    """Whether no number is NaN or Inf: one pass. A sum that overflows counts as not finite, too."""
    return math.isfinite(float(t.sum()))


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(-3, -1).is_contiguous()


def _inner(x: Tensor, last: bool) -> Tensor:
    """Channels as the last dimension for images that are channels_last in memory."""
    return x.movedim(-3, -1) if last else x


def _outer(x: Tensor, last: bool) -> Tensor:
    return x.movedim(-1, -3) if last else x
