"""Inference with packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops

_ops = torch.ops.lottery_sparse_native


def ternary_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, rows: int, int8: bool
) -> Tensor:
    return _ops.ternary_linear(_float(x), codes, _float(scale), _float(bias), rows, int8).to(
        x.dtype
    )


def csr_linear(
    x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None
) -> Tensor:
    y = _ops.csr_linear(_float(x), _stored(values), starts, columns, _float(bias))
    return y if y.dtype == x.dtype else y.to(x.dtype)


def bitmap_linear(
    x: Tensor, values: Tensor, starts: Tensor, bits: Tensor, bias: Tensor | None
) -> Tensor:
    y = _ops.bitmap_linear(_float(x), _stored(values), starts, bits, _float(bias))
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _float(values: Any) -> Any:
    if values is None or values.dtype == torch.float32:  # half a microsecond less than .to
        return values
    return values.to(torch.float32)


def _stored(values: Tensor) -> Tensor:
    return values if values.dtype == torch.bfloat16 else _float(values)
