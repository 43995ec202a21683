"""masked_linear on kept weights."""

from __future__ import annotations

import torch
from torch import Tensor

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops
from lottery_sparse.ops.bits.cpu import as_bool

_ops = torch.ops.lottery_sparse_native


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    frozen: Tensor | None,
    signs: Tensor | None,
) -> Tensor:
    return _ops.masked_linear(x, weight, as_bool(mask, weight), bias)


def masked_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    frozen: Tensor | None,
    signs: Tensor | None,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    return _ops.masked_linear_backward(dy, x, weight, as_bool(mask, weight), need_dx, need_dw)
