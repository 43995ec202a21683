"""Inference with packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.limits import MOST_COLUMNS_INT8
from lottery_sparse.ops.packed.arguments import BitmapArgs, CsrArgs, TernaryArgs

_ops = torch.ops.lottery_sparse_native


def why_not(a: TernaryArgs | CsrArgs | BitmapArgs) -> str | None:
    if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in a):
        return "its kernels run float32, got float64."
    return None


def _why_not_ternary(a: TernaryArgs) -> str | None:
    if a.int8 and a.x.shape[1] > MOST_COLUMNS_INT8:
        return f"its int8 sums hold up to {MOST_COLUMNS_INT8} columns, got {a.x.shape[1]}."
    return why_not(a)


@dispatch.limited(_why_not_ternary)
def ternary_linear(a: TernaryArgs) -> Tensor:
    scale, bias = _float(a.scale), _float(a.bias)
    y = _ops.ternary_linear(_float(a.x), a.codes, scale, bias, a.rows, a.int8)
    return y.to(a.x.dtype)


@dispatch.limited(why_not)
def csr_linear(a: CsrArgs) -> Tensor:
    values, bias = _stored(a.values), _float(a.bias)
    y = _ops.csr_linear(_float(a.x), values, a.starts, a.columns, bias)
    return y if y.dtype == a.x.dtype else y.to(a.x.dtype)


@dispatch.limited(why_not)
def bitmap_linear(a: BitmapArgs) -> Tensor:
    values, bias = _stored(a.values), _float(a.bias)
    y = _ops.bitmap_linear(_float(a.x), values, a.starts, a.bits, bias)
    return y if y.dtype == a.x.dtype else y.to(a.x.dtype)


def _float(values: Any) -> Any:
    if values is None or values.dtype == torch.float32:  # half a microsecond less than .to
        return values
    return values.to(torch.float32)


def _stored(values: Tensor) -> Tensor:
    return values if values.dtype == torch.bfloat16 else _float(values)
