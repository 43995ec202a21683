"""masked_linear, and compact_linear: kept weights only."""

from __future__ import annotations

import torch
from torch import Tensor

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops
from lottery_sparse.ops.common.cpu import MAX_DENSITY_COMPACT, MAX_DENSITY_SAMPLED, most_density
from lottery_sparse.ops.limits import kept_share
from lottery_sparse.ops.masked.reference import linear, linear_backward

_ops = torch.ops.lottery_sparse_native


def compact_linear(
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
) -> tuple[Tensor, Tensor]:
    """(y, packed x). With frozen values other than zero nothing is left to skip: dense, no x."""
    if zero:
        return _ops.compact_linear(x, values, starts, columns, bias)
    return linear(x, effective.to(x.dtype), bias), x.new_empty(0)


def compact_linear_backward(
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
    need_dx: bool,
    need_dv: bool,
    carried: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dx and dvalues, each by the kernel or, where too much is kept, by the dense library."""
    share = kept_share(starts, effective)
    most = most_density(x, MAX_DENSITY_COMPACT, effective)
    sparse_dx = need_dx and zero and share <= most
    sample = need_dv and share <= most_density(x, MAX_DENSITY_SAMPLED)
    dx, dv = x.new_empty(0), x.new_empty(0)
    if sparse_dx or sample:
        if carried is None or carried.numel() == 0:
            nothing = torch.empty(1, 1, x.shape[-1], 1)  # tiles are float32
            carried = _ops.pack_tiles(x) if sample else nothing
        dx, dv, _ = _ops.compact_linear_backward(
            dy, carried, values, starts, columns, column_starts, rows, positions,
            x.dim() == 2, sparse_dx, sample, False,
        )  # fmt: skip
    if need_dx and not sparse_dx:
        dx, _ = linear_backward(dy, x, effective.to(x.dtype), True, False)
    if need_dv and not sample:
        _, dw = linear_backward(dy, x, effective, False, True)
        dv = _ops.gather_kept(dw, starts, columns)
    return dx, dv


def scatter_kept_(effective: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> None:
    """Write kept values [C] or [E, C] into the effective weight."""
    _ops.scatter_kept_(effective, values, starts, columns)
