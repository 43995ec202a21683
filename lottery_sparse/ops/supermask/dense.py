"""Learned masks by the dense library.

r multiplies activations in linear layers and weights in convolutions, whichever are fewer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops.masked import reference as masked_reference
from lottery_sparse.ops.masked.dense import INTEGERS
from lottery_sparse.ops.supermask import reference as supermask_reference


def sample_bits(score: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return supermask_reference.sample_bits(score, key)


def supermask_linear(
    x: Tensor,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    signs: Tensor | None,
) -> Tensor:
    w = _masked_source(2, score, weight, bits, signs)[1]
    if kept is None:
        return masked_reference.linear(x, w, bias)
    return _rescaled(masked_reference.linear(x, w, None), score, kept, 2, bias)


def supermask_linear_backward(
    dy: Tensor,
    x: Tensor,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    signs: Tensor | None,
    need_dx: bool,
    need_dw: bool,
    need_dscore: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    source, masked = _masked_source(2, score, weight, bits, signs)
    dy = dy if kept is None else _rescaled(dy, score, kept, 2)
    dx, d = masked_reference.linear_backward(dy, x, masked, need_dx, need_dw or need_dscore)
    needs = need_dw, need_dscore
    return dx, *_score_gradients(2, d, score, source, masked, bits, kept, *needs)


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
    w = _masked_source(4, score, weight, bits, signs)[1]
    w = w if kept is None else _rescaled(w, score, kept, 4)
    return masked_reference.conv2d(x, w, bias, *geometry)


def supermask_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    signs: Tensor | None,
    *geometry_and_needs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *geometry, need_dx, need_dw, need_dscore = geometry_and_needs
    source, masked = _masked_source(4, score, weight, bits, signs)
    w = masked if kept is None else _rescaled(masked, score, kept, 4)
    geometry_and_needs = *geometry, need_dx, need_dw or need_dscore
    dx, d = masked_reference.conv2d_backward(dy, x, w, *geometry_and_needs)
    d = d if kept is None or not d.numel() else _rescaled(d, score, kept, 4)
    needs = need_dw, need_dscore
    return dx, *_score_gradients(4, d, score, source, masked, bits, kept, *needs)


def _score_gradients(
    rank: int,
    d: Tensor,
    score: Tensor,
    source: Tensor,
    masked: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    need_dw: bool,
    need_dscore: bool,
) -> tuple[Tensor, Tensor]:
    """dw and dscore from d = r dW, the weight and the masked weight."""
    dw, dscore = d.new_empty(0), score.new_empty(0)
    if need_dw:
        integer = INTEGERS[d.element_size()]
        dw = (_spread(bits, score, rank, integer) & d.contiguous().view(integer)).view(d.dtype)
    if need_dscore:
        precise = torch.promote_types(score.dtype, torch.float32)
        d, source = d.to(precise), source.to(precise)
        if kept is None:
            dm = d * source
        else:
            own = tuple(range(-rank, 0))
            through_r = (d * masked.to(precise)).sum(own, keepdim=True)
            through_r /= kept.clamp(min=1).view(through_r.shape)
            dm = torch.addcmul(-through_r, d, source)
        p = torch.sigmoid(score.to(precise))
        dscore = torch.ops.aten.sigmoid_backward(dm, p).to(score.dtype).contiguous()
    return dw, dscore


def _rescaled(
    t: Tensor, score: Tensor, kept: Tensor, rank: int, bias: Tensor | None = None
) -> Tensor:
    """t r + bias for t [...] or [E, ...]."""
    r = supermask_reference.rescaling(score, kept, rank).to(
        torch.promote_types(t.dtype, torch.float32)
    )
    scaled = t * r.view(kept.shape + (1,) * (t.dim() - kept.dim()))
    if bias is not None:
        scaled.add_(bias if bias.dim() == 1 else bias.unsqueeze(1))
    return scaled.to(t.dtype)


def _masked_source(
    rank: int, score: Tensor, weight: Tensor, bits: Tensor, signs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weight before the mask, and after it."""
    integer = INTEGERS[weight.element_size()]
    if signs is None:
        source = masked_reference.source(weight, signs, score, rank).contiguous().view(integer)
    else:
        sign_bit = torch.iinfo(integer).min
        minus = _spread(signs, score, rank, integer).bitwise_not_().bitwise_and_(sign_bit)
        source = minus.bitwise_xor_(
            weight.contiguous().view(integer).view(weight.shape + (1,) * rank)
        )
    masked = _spread(bits, score, rank, integer).bitwise_and_(source)
    return source.view(weight.dtype), masked.view(weight.dtype)


def _spread(bits: Tensor, score: Tensor, rank: int, integer: torch.dtype) -> Tensor:
    """Packed bits as integers of the weight's width and shape: all bits set where 1."""
    columns = score.shape[1 - rank :].numel()
    up = torch.arange(31, -1, -1, dtype=torch.int32, device=bits.device)
    filled = (bits.unsqueeze(-1) << up).bitwise_right_shift_(31)  # with the sign, which was the bit
    return filled.flatten(-2)[..., :columns].to(integer).reshape(score.shape)
