"""The backend "dense": the dense library on the effective weight, selected bit by bit.

Same results as `reference`, bit for bit. torch.where on a CPU branches on every mask entry, and on
a half-pruned 784 x 300 weight that costs as much as the product (0.82 ms; this form 0.08 ms, one
Zen 4 core). An integer AND with 0 or -1 selects just as exactly, NaN included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops.bits.reference import mask_as_bool
from lottery_sparse.ops.masked import reference

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def refuses(op: str, *args: Any) -> None:
    """Nothing: whatever `reference` runs, this runs."""
    return None


def select(kept: Tensor, values: Tensor, others: Tensor | None) -> Tensor:
    """where(kept, values, others or 0) for a bool mask and floating tensors of its shape.

    May return `values` itself. Looking for a pruned entry costs a tenth of the selection.
    """
    if kept.is_cpu and kept.numel() and kept.view(torch.uint8).min() > 0:
        return values
    integer = INTEGERS[values.element_size()]
    bits = values.view(integer)
    if others is None:
        return ones(kept, values).bitwise_and_(bits).view(values.dtype)
    other_bits = others.view(integer)
    selected = ones(kept, values).bitwise_and_(bits ^ other_bits).bitwise_xor_(other_bits)
    return selected.view(values.dtype)


def ones(kept: Tensor, like: Tensor) -> Tensor:
    """Integers as wide as the elements of `like`: all bits set where kept, else none.

    The sign of -byte, since a view as bool may hold other bytes than 1.
    """
    integer, sign = INTEGERS[like.element_size()], 8 * like.element_size() - 1
    return kept.view(torch.uint8).to(integer).neg_().bitwise_right_shift_(sign)


def effective_weight(
    weight: Tensor, mask: Tensor, frozen: Tensor | None, signs: Tensor | None, rank: int
) -> Tensor:
    if signs is not None and frozen is not None:
        plus = mask_as_bool(signs, weight, rank)
        constant = frozen.to(weight.dtype).view(frozen.shape + (1,) * rank)
        frozen = select(plus, constant.expand_as(weight), -constant.expand_as(weight))
    return select(mask_as_bool(mask, weight, rank), weight, frozen)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    frozen: Tensor | None,
    signs: Tensor | None,
) -> Tensor:
    return reference.linear(x, effective_weight(weight, mask, frozen, signs, rank=2), bias)


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
    w = effective_weight(weight, mask, frozen, signs, rank=2) if need_dx else weight
    dx, dw = reference.linear_backward(dy, x, w, need_dx, need_dw)
    kept = mask_as_bool(mask, weight, rank=2)
    return dx, select(kept, dw, None).contiguous() if need_dw else dw


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    frozen: Tensor | None,
    signs: Tensor | None,
    *geometry: Any,
) -> Tensor:
    w = effective_weight(weight, mask, frozen, signs, rank=4)
    return reference.conv2d(x, w, bias, *geometry)


def masked_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    frozen: Tensor | None,
    signs: Tensor | None,
    *geometry_and_needs: Any,
) -> tuple[Tensor, Tensor]:
    need_dx, need_dw = geometry_and_needs[-2:]
    w = effective_weight(weight, mask, frozen, signs, rank=4) if need_dx else weight
    dx, dw = reference.conv2d_backward(dy, x, w, *geometry_and_needs)
    return dx, select(mask_as_bool(mask, weight, rank=4), dw, None) if need_dw else dw
