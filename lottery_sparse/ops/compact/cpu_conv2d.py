"""Compact convolutions: kept weights only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops
from lottery_sparse.ops.compact import reference as compact_reference
from lottery_sparse.ops.masked.reference import conv2d, conv2d_backward

_ops = torch.ops.lottery_sparse_native


def kept_conv2d(
    x: Tensor,
    values: Tensor,
    starts: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """y of kept `values` [C] or [E, C] at lists of the mask [O, I / groups · kh · kw].

    x: [B, I, H, W] (shared by the networks) or [E, B, I, H, W]; y is channels_last where x is.
    """
    last = _channels_last(x)
    y = _ops.compact_conv2d(
        _inner(x, last), values, starts, columns, bias,
        kernel_size, stride, padding, dilation, groups, last,
    )  # fmt: skip
    return _outer(y, last)


def kept_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    positions: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_dx: bool,
    need_dvalues: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dvalues, dbias), empty where not needed; dx is summed over networks for a shared x."""
    last = _channels_last(x)
    dx, dvalues, dbias = _ops.compact_conv2d_backward(
        _inner(dy, last), _inner(x, last), values,
        starts, columns, column_starts, rows, positions,
        kernel_size, stride, padding, dilation, groups, last,
        need_dx, need_dvalues, need_dbias,
    )  # fmt: skip
    return _outer(dx, last) if need_dx else dx, dvalues, dbias


def compact_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    effective: Tensor,
    starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    positions: Tensor,
    zero: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """y, and nothing to carry.

    Dense where nothing can be skipped: pruned weights hold other values than zero, or x holds NaN
    or Inf, which make NaN of a pruned weight's zero.
    """
    geometry = stride, padding, dilation, groups
    if zero and not _finite(x):
        lists = starts, columns, column_starts, rows, positions
        return compact_reference.compact_conv2d(x, values, bias, effective, *lists, zero, *geometry)
    if zero:
        kernel_size = list(effective.shape[-2:])
        y = kept_conv2d(x, values, starts, columns, bias, kernel_size, *geometry)
    else:
        y = conv2d(x, effective, bias, *geometry)
    return y, x.new_empty(0)


def compact_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    effective: Tensor,
    starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    positions: Tensor,
    zero: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_dx: bool,
    need_dv: bool,
    carried: Tensor | None,
) -> tuple[Tensor, Tensor]:
    geometry = stride, padding, dilation, groups
    if not _finite(dy, x):  # in products with pruned weights, and with the zeros of a padding
        lists = starts, columns, column_starts, rows, positions
        args = dy, x, values, effective, *lists, zero, *geometry, need_dx, need_dv, carried
        return compact_reference.compact_conv2d_backward(*args)
    sparse_dx = need_dx and zero
    dx, dv = x.new_empty(0), x.new_empty(0)
    if sparse_dx or need_dv:
        dx, dv, _ = kept_conv2d_backward(
            dy, x, values, starts, columns, column_starts, rows, positions,
            list(effective.shape[-2:]), *geometry, sparse_dx, need_dv, False,
        )  # fmt: skip
    if need_dx and not zero:
        dx, _ = conv2d_backward(dy, x, effective, *geometry, True, False)
    return dx, dv


def _finite(*tensors: Tensor) -> bool:
    """Whether no number is NaN or Inf: one pass. Sums that overflow count as not finite, too."""
    return all(math.isfinite(float(t.sum())) for t in tensors)


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(-3, -1).is_contiguous()


def _inner(x: Tensor, last: bool) -> Tensor:
    """Channels as the last dimension for images that are channels_last in memory."""
    return x.movedim(-3, -1) if last else x


def _outer(x: Tensor, last: bool) -> Tensor:
    return x.movedim(-1, -3) if last else x
