"""compact_linear on kept weights only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.cpu import DTYPES, most_density
from lottery_sparse.ops.compact.arguments import CompactArgs
from lottery_sparse.ops.compact.reference import filled
from lottery_sparse.ops.limits import (
    MAX_DENSITY_LINEAR,
    MAX_DENSITY_SAMPLED,
    kept_share,
)
from lottery_sparse.ops.masked.reference import linear, linear_backward

_ops = torch.ops.lottery_sparse_native


def why_not(a: CompactArgs, dy: Tensor | None = None, *rest: Any) -> str | None:
    dtype, bias = a.x.dtype, a.bias  # of all but `effective`, which is converted where it is read
    if (
        dtype in DTYPES
        and a.values.dtype == dtype
        and (bias is None or bias.dtype == dtype)
        and (dy is None or dy.dtype == dtype)
    ):
        return None
    found = {str(t.dtype) for t in (a.x, a.values, bias, dy) if t is not None}
    return f"its kernels run float32 or bfloat16, got {' and '.join(sorted(found))}."


def is_faster(a: CompactArgs) -> bool:
    most = most_density(a.x, MAX_DENSITY_LINEAR, a.effective)
    return kept_share(a.kept.starts, a.effective) <= most


@dispatch.limited(why_not, is_faster)
def compact_linear(a: CompactArgs) -> tuple[Tensor, Tensor]:
    """(y, packed x). With frozen values other than zero nothing is left to skip: dense, no x."""
    if a.zero:
        return _ops.compact_linear(a.x, a.values, a.kept.starts, a.kept.columns, a.bias)
    return linear(a.x, a.effective.to(a.x.dtype), a.bias), a.x.new_empty(0)


@dispatch.limited(why_not)
def compact_linear_backward(
    a: CompactArgs, dy: Tensor, need_dx: bool, need_dv: bool, carried: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx and dvalues, each by the kernel or, where too much is kept, by the dense library."""
    x, effective = a.x, a.effective
    share = kept_share(a.kept.starts, effective)
    sparse_dx = need_dx and a.zero and share <= most_density(x, MAX_DENSITY_LINEAR, effective)
    sample = need_dv and share <= most_density(x, MAX_DENSITY_SAMPLED)
    dx, dv = x.new_empty(0), x.new_empty(0)
    if sparse_dx or sample:
        if carried is None or carried.dim() != 4:  # tiles are; the dense forward makes none
            nothing = torch.empty(1, 1, x.shape[-1], 1)  # tiles are float32
            carried = _ops.pack_tiles(x) if sample else nothing
        dx, dv, _ = _ops.compact_linear_backward(
            dy, carried, a.values, *a.kept, x.dim() == 2, sparse_dx, sample, False
        )
    dense_dx, dense_dv = need_dx and not sparse_dx, need_dv and not sample
    if dense_dx or dense_dv:
        w = effective  # in its own dtype it is up to date where dx is dense
        if dense_dx and effective.dtype != x.dtype:
            w = carried if carried is not None and carried.shape == effective.shape else filled(a)
        found, dw = linear_backward(dy, x, w, dense_dx, dense_dv)
        dx = found if dense_dx else dx
        dv = _ops.gather_kept(dw, a.kept.starts, a.kept.columns) if dense_dv else dv
    return dx, dv


def _why_not_scatter(effective: Tensor, values: Tensor, *lists: Tensor) -> str | None:
    fits = effective.dtype == values.dtype and effective.dtype in DTYPES
    if fits and effective.is_contiguous():
        return None
    return f"its kernel writes a contiguous float32 or bfloat16 tensor, got {effective.dtype}."


@dispatch.limited(_why_not_scatter)
def scatter_kept_(effective: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> None:
    """Write kept values [C] or [E, C] into the effective weight."""
    _ops.scatter_kept_(effective, values, starts, columns)
