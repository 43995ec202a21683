"""Learned masks by the dense library.

r multiplies activations in linear layers and weights in convolutions, whichever are fewer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_sparse.ops.masked.dense import INTEGERS
from lottery_sparse.ops.masked.reference import conv2d, conv2d_backward, linear, linear_backward
from lottery_sparse.ops.supermask.arguments import SupermaskArgs
from lottery_sparse.ops.supermask.reference import rescaling
from lottery_sparse.ops.supermask.reference import sample_bits as sample_bits


def supermask_linear(a: SupermaskArgs) -> Tensor:
    _, w = _masked_source(2, a)
    bias = a.bias if a.kept is None else None
    y = F.linear(a.x, w, bias) if w.dim() == 2 else linear(a.x, w, bias)
    if a.kept is None:
        return y
    wide = torch.promote_types(y.dtype, torch.float32)
    scaled = y * rescaling(a, 2, y.dim()).to(wide)
    if a.bias is not None:
        scaled.add_(a.bias if a.bias.dim() == 1 else a.bias.unsqueeze(1))
    return scaled.to(y.dtype)


def supermask_linear_backward(
    a: SupermaskArgs, dy: Tensor, need_dx: bool, need_dw: bool, need_dscore: bool
) -> tuple[Tensor, Tensor, Tensor]:
    source, masked = _masked_source(2, a)
    if a.kept is not None:
        wide = torch.promote_types(dy.dtype, torch.float32)
        dy = (dy * rescaling(a, 2, dy.dim()).to(wide)).to(dy.dtype)
    dx, d = linear_backward(dy, a.x, masked, need_dx, need_dw or need_dscore)
    return dx, *_score_gradients(2, d, a, source, masked, need_dw, need_dscore)


def supermask_conv2d(a: SupermaskArgs) -> Tensor:
    _, w = _masked_source(4, a)
    w = w if a.kept is None else _rescaled(w, a)
    return conv2d(a.x, w, a.bias, a.geometry)


def supermask_conv2d_backward(
    a: SupermaskArgs, dy: Tensor, need_dx: bool, need_dw: bool, need_dscore: bool
) -> tuple[Tensor, Tensor, Tensor]:
    source, masked = _masked_source(4, a)
    w = masked if a.kept is None else _rescaled(masked, a)
    dx, d = conv2d_backward(dy, a.x, w, a.geometry, need_dx, need_dw or need_dscore)
    d = d if a.kept is None or not d.numel() else _rescaled(d, a)
    return dx, *_score_gradients(4, d, a, source, masked, need_dw, need_dscore)


def _rescaled(w: Tensor, a: SupermaskArgs) -> Tensor:
    """w r of a convolution's weight, or of its gradient."""
    wide = torch.promote_types(w.dtype, torch.float32)
    return (w * rescaling(a, 4, w.dim()).to(wide)).to(w.dtype)


def _score_gradients(
    rank: int,
    d: Tensor,
    a: SupermaskArgs,
    source: Tensor,
    masked: Tensor,
    need_dw: bool,
    need_dscore: bool,
) -> tuple[Tensor, Tensor]:
    """dw and dscore from d = r dW, the weight and the masked weight."""
    score, bits, kept = a.score, a.bits, a.kept
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


def _masked_source(rank: int, a: SupermaskArgs) -> tuple[Tensor, Tensor]:
    """The weight before the mask, and after it."""
    score, weight, bits, signs = a.score, a.weight, a.bits, a.signs
    integer = INTEGERS[weight.element_size()]
    if signs is None:
        source = weight.contiguous().view(integer)
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
