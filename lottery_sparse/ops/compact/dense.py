"""Compact products by the effective weight, which lags only where kernels would have run."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from lottery_sparse.ops.compact import reference
from lottery_sparse.ops.compact.arguments import CompactArgs
from lottery_sparse.ops.compact.reference import filled
from lottery_sparse.ops.compact.reference import scatter_kept_ as scatter_kept_
from lottery_sparse.ops.masked.reference import conv2d, conv2d_backward, linear, linear_backward


def compact_linear(a: CompactArgs) -> tuple[Tensor, Tensor]:
    """y, and the weight where it was converted: the backward reads it again."""
    w = filled(a)
    return linear(a.x, w, a.bias), a.x.new_empty(0) if w is a.effective else w


def compact_linear_backward(
    a: CompactArgs, dy: Tensor, need_dx: bool, need_dv: bool, carried: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx and dvalues; empty where not needed."""
    if carried is not None and carried.shape == a.effective.shape:
        w = carried
    else:
        w = filled(a) if need_dx else a.effective
    dx, dw = linear_backward(dy, a.x, w, need_dx, need_dv)
    return dx, _gathered(dw, a) if need_dv else dw


def compact_conv2d(a: CompactArgs) -> tuple[Tensor, Tensor]:
    """y, and nothing to carry to the backward."""
    return conv2d(a.x, filled(a), a.bias, a.geometry), a.x.new_empty(0)


def compact_conv2d_backward(
    a: CompactArgs, dy: Tensor, need_dx: bool, need_dv: bool, carried: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx and dvalues; empty where not needed."""
    w = filled(a) if need_dx else a.effective
    dx, dw = conv2d_backward(dy, a.x, w, a.geometry, need_dx, need_dv)
    return dx, _gathered(dw, a) if need_dv else dw


def _gathered(dw: Tensor, a: CompactArgs) -> Tensor:
    if dw.is_cuda and _has_triton(dw.device):  # one launch instead of ten
        from lottery_sparse.ops.compact.triton import gather_kept
    else:
        gather_kept = reference.gather_kept
    return gather_kept(dw, a.kept.starts, a.kept.columns)


@cache
def _has_triton(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from lottery_sparse.ops.triton.limits import fails_on

    return fails_on(device) is None
