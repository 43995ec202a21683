"""The backend "dense": the dense library on the effective weight, selected bit by bit.

Same results as `reference`, bit for bit. torch.where on a CPU branches on every mask entry, and on
a half-pruned 784 x 300 weight that costs as much as the product (0.82 ms; this form 0.08 ms, one
Zen 4 core). An integer AND with 0 or -1 selects just as exactly, NaN included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse import reference
from lottery_sparse.reference import mask_as_bool

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def refuses(op: str, *args: Any) -> None:
    """Nothing: whatever `reference` runs, this runs."""
    return None


def wins(op: str, *args: Any) -> bool:
    return True


def select(kept: Tensor, values: Tensor, others: Tensor | None) -> Tensor:
    """where(kept, values, others or 0) for a bool mask and floating tensors of its shape.

    May return `values` itself. Looking for a pruned entry costs a tenth of the selection.
    """
    if kept.is_cpu and kept.numel() and kept.view(torch.uint8).min() > 0:
        return values
    integer = _INTEGERS[values.element_size()]
    # all bits set where kept: the sign of -byte, since a view as bool may hold other bytes than 1
    sign = 8 * values.element_size() - 1
    ones = kept.view(torch.uint8).to(integer).neg_().bitwise_right_shift_(sign)
    bits = values.view(integer)
    if others is None:
        return ones.bitwise_and_(bits).view(values.dtype)
    other_bits = others.view(integer)
    return ones.bitwise_and_(bits ^ other_bits).bitwise_xor_(other_bits).view(values.dtype)


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


# ---- learned masks -------------------------------------------------------------------------------


def sample_bits(score: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return reference.sample_bits(score, key)


def supermask_linear(
    x: Tensor,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    signs: Tensor | None,
) -> Tensor:
    return reference.linear(x, _supermask_weight(2, score, weight, bits, kept, signs), bias)


def supermask_linear_backward(
    dy: Tensor, x: Tensor, *network_and_needs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    network, (need_dx, need_dw, need_dscore) = network_and_needs[:-3], network_and_needs[-3:]
    w = _supermask_weight(2, *network) if need_dx else network[0]
    dx, d = reference.linear_backward(dy, x, w, need_dx, need_dw or need_dscore)
    return dx, *_supermask_gradients(2, need_dw, need_dscore, d, *network)


def supermask_conv2d(
    x: Tensor,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    signs: Tensor | None,
    *geometry: Any,
) -> Tensor:
    w = _supermask_weight(4, score, weight, bits, kept, signs)
    return reference.conv2d(x, w, bias, *geometry)


def supermask_conv2d_backward(
    dy: Tensor, x: Tensor, *network_geometry_and_needs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    network, geometry = network_geometry_and_needs[:5], network_geometry_and_needs[5:-3]
    need_dx, need_dw, need_dscore = network_geometry_and_needs[-3:]
    # its shape and dtype are asked for where no dx is
    w = _supermask_weight(4, *network) if need_dx else network[0].to(x.dtype)
    geometry_and_needs: Any = *geometry, need_dx, need_dw or need_dscore
    dx, d = reference.conv2d_backward(dy, x, w, *geometry_and_needs)
    return dx, *_supermask_gradients(4, need_dw, need_dscore, d, *network)


def _supermask_weight(
    rank: int,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    signs: Tensor | None,
) -> Tensor:
    w = _source_weight(score, weight, signs, rank)
    w = select(mask_as_bool(bits, score, rank), w, None)
    return w if kept is None else (w * reference.rescaling(score, kept, rank)).to(w.dtype)


def _source_weight(score: Tensor, weight: Tensor, signs: Tensor | None, rank: int) -> Tensor:
    if signs is None:
        return weight.contiguous()
    constant = weight.view(weight.shape + (1,) * rank).expand_as(score)
    return select(mask_as_bool(signs, score, rank), constant, -constant)


def _supermask_gradients(
    rank: int,
    need_dw: bool,
    need_dscore: bool,
    d: Tensor,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    signs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dw, dscore = weight.new_empty(0), score.new_empty(0)
    mask = mask_as_bool(bits, score, rank)
    r = None if kept is None else reference.rescaling(score, kept, rank)
    if need_dw:
        scaled = d if r is None else (d * r).to(d.dtype)
        dw = select(mask, scaled.contiguous(), None)
    if need_dscore:
        precise = score.to(torch.promote_types(score.dtype, torch.float32))
        dm = d.to(precise.dtype) * _source_weight(score, weight, signs, rank)
        if r is not None and kept is not None:
            own = tuple(range(-rank, 0))
            through_r = select(mask, dm, None).sum(own, keepdim=True)
            dm -= through_r / kept.clamp(min=1).view(through_r.shape)
            dm *= r
        dscore = torch.ops.aten.sigmoid_backward(dm, torch.sigmoid(precise)).to(score.dtype)
    return dw, dscore.contiguous()


# ---- compact products: by the effective weight, which lags only where kernels would have run ----


def compact_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, effective: Tensor, *kept: Any
) -> tuple[Tensor, Tensor]:
    return reference.linear(x, _filled(values, effective, *kept), bias), x.new_empty(0)


def compact_linear_backward(
    dy: Tensor, x: Tensor, values: Tensor, effective: Tensor, *kept_and_needs: Any
) -> tuple[Tensor, Tensor]:
    *kept, need_dx, need_dv, _ = kept_and_needs
    w = _filled(values, effective, *kept) if need_dx else effective
    dx, dw = reference.linear_backward(dy, x, w, need_dx, need_dv)
    return dx, reference.gather_kept(dw, *kept[:2]) if need_dv else dw


def compact_conv2d(
    x: Tensor, values: Tensor, bias: Tensor | None, effective: Tensor, *kept_and_geometry: Any
) -> tuple[Tensor, Tensor]:
    kept, geometry = kept_and_geometry[:6], kept_and_geometry[6:]
    y = reference.conv2d(x, _filled(values, effective, *kept), bias, *geometry)
    return y, x.new_empty(0)


def compact_conv2d_backward(
    dy: Tensor, x: Tensor, values: Tensor, effective: Tensor, *kept_and_geometry: Any
) -> tuple[Tensor, Tensor]:
    kept, (*geometry_and_needs, _) = kept_and_geometry[:6], kept_and_geometry[6:]
    need_dx, need_dv = geometry_and_needs[-2:]
    w = _filled(values, effective, *kept) if need_dx else effective
    dx, dw = reference.conv2d_backward(dy, x, w, *geometry_and_needs)
    return dx, reference.gather_kept(dw, *kept[:2]) if need_dv else dw


def _filled(values: Tensor, effective: Tensor, *kept: Any) -> Tensor:
    starts, columns, *_, zero = kept
    if reference.may_lag(effective, starts, zero):
        return reference.kept_weight(values, effective, starts, columns)
    return effective


def scatter_kept_(effective: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> None:
    reference.scatter_kept_(effective, values, starts, columns)
