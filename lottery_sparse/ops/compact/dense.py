"""Compact products by the effective weight, which lags only where kernels would have run."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops.compact import reference as compact_reference
from lottery_sparse.ops.limits import may_lag
from lottery_sparse.ops.masked.reference import conv2d, conv2d_backward, linear, linear_backward


def compact_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, effective: Tensor, *kept: Any
) -> tuple[Tensor, Tensor]:
    return linear(x, _filled(values, effective, *kept), bias), x.new_empty(0)


def compact_linear_backward(
    dy: Tensor, x: Tensor, values: Tensor, effective: Tensor, *kept_and_needs: Any
) -> tuple[Tensor, Tensor]:
    *kept, need_dx, need_dv, _ = kept_and_needs
    w = _filled(values, effective, *kept) if need_dx else effective
    dx, dw = linear_backward(dy, x, w, need_dx, need_dv)
    return dx, _gather(dw, *kept[:2]) if need_dv else dw


def compact_conv2d(
    x: Tensor, values: Tensor, bias: Tensor | None, effective: Tensor, *kept_and_geometry: Any
) -> tuple[Tensor, Tensor]:
    kept, geometry = kept_and_geometry[:6], kept_and_geometry[6:]
    w = _filled(values, effective, *kept, stride=geometry[0])
    y = conv2d(x, w, bias, *geometry)
    return y, x.new_empty(0)


def compact_conv2d_backward(
    dy: Tensor, x: Tensor, values: Tensor, effective: Tensor, *kept_and_geometry: Any
) -> tuple[Tensor, Tensor]:
    kept, (*geometry_and_needs, _) = kept_and_geometry[:6], kept_and_geometry[6:]
    need_dx, need_dv = geometry_and_needs[-2:]
    w = _filled(values, effective, *kept, stride=geometry_and_needs[0]) if need_dx else effective
    dx, dw = conv2d_backward(dy, x, w, *geometry_and_needs)
    return dx, _gather(dw, *kept[:2]) if need_dv else dw


def _gather(dw: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    if dw.is_cuda and _has_triton(dw.device):  # one launch instead of ten
        from lottery_sparse.ops.compact.triton import gather_kept

        return gather_kept(dw, starts, columns)
    return compact_reference.gather_kept(dw, starts, columns)


@cache
def _has_triton(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from lottery_sparse.ops.triton.limits import fails_on

    return fails_on(device) is None


def _filled(values: Tensor, effective: Tensor, *kept: Any, stride: Sequence[int] = ()) -> Tensor:
    starts, columns, *_, zero = kept
    if may_lag(effective, starts, zero, stride):
        return compact_reference.kept_weight(values, effective, starts, columns)
    return effective.to(values.dtype)


def scatter_kept_(effective: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> None:
    compact_reference.scatter_kept_(effective, values, starts, columns)
