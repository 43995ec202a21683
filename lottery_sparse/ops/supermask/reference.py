"""Learned masks: sampled bits, and the products with them.

score is [N, K] or [E, N, K] (convolution [O, I, kh, kw] or [E, O, I, kh, kw]); bits are packed,
[..., N, W]. The weight is a tensor like the score, or a source of values and signs as frozen
values are. kept, [] or [E], is the number of ones that rescales, or None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lottery_sparse.ops.bits.reference import mask_as_bool, pack_mask
from lottery_sparse.ops.masked.reference import (
    conv2d,
    conv2d_backward,
    linear,
    linear_backward,
    source,
)
from lottery_sparse.ops.random.reference import words_of
from lottery_sparse.ops.supermask.arguments import SupermaskArgs


def sample_mask(score: Tensor, key: Tensor) -> Tensor:
    """Bernoulli(sigmoid(score)) as 0 / 1 in the score's dtype.

    An integer draw of 24 bits is compared with floor(sigmoid(score) 2^24), the score as a float32
    and the rest in float64, which leaves no doubt about the integer. key: int64 (seed, stream,
    step), [3], or [E, 3] for score [E, ...]; element indices count within a network.
    """
    networks = score if key.dim() == 2 else score.unsqueeze(0)
    count = networks[0].numel() if networks.shape[0] else 0
    draw = words_of(key, count).view_as(networks) >> 8
    probability = torch.sigmoid(networks.to(torch.float32).to(torch.float64))
    threshold = (probability * 2.0**24).nan_to_num(0.0).to(torch.int64)
    return (draw < threshold).to(score.dtype).view_as(score)


def sample_bits(score: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """sample_mask of [N, K] or, with a key each, [E, N, K], packed; and its ones, int64."""
    mask = sample_mask(score, key) != 0
    return pack_mask(mask), mask.flatten(-2).sum(-1)


def supermask_linear(a: SupermaskArgs) -> Tensor:
    """y = x (w m r)ᵀ + b -> [B, N] or [E, B, N]."""
    return linear(a.x, supermask_weight(a, rank=2), a.bias)


def supermask_linear_backward(
    a: SupermaskArgs, dy: Tensor, need_dx: bool, need_dw: bool, need_dscore: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and the straight-through dscore; empty where not needed."""
    w = supermask_weight(a, rank=2)
    dx, d = linear_backward(dy, a.x, w, need_dx, need_dw or need_dscore)
    return dx, *supermask_gradients(d, a, 2, need_dw, need_dscore)


def supermask_conv2d(a: SupermaskArgs) -> Tensor:
    """Convolution with w m r: [B, O, H', W'] or [E, B, O, H', W']."""
    return conv2d(a.x, supermask_weight(a, rank=4), a.bias, a.geometry)


def supermask_conv2d_backward(
    a: SupermaskArgs, dy: Tensor, need_dx: bool, need_dw: bool, need_dscore: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and the straight-through dscore; empty where not needed."""
    w = supermask_weight(a, rank=4)
    dx, d = conv2d_backward(dy, a.x, w, a.geometry, need_dx, need_dw or need_dscore)
    return dx, *supermask_gradients(d, a, 4, need_dw, need_dscore)


def supermask_weight(a: SupermaskArgs, rank: int) -> Tensor:
    """w m r."""
    w = source(a.weight, a.signs, a.score, rank)
    w = torch.where(mask_as_bool(a.bits, a.score, rank), w, 0.0)
    return w if a.kept is None else (w * rescaling(a, rank, w.dim())).to(w.dtype)


def rescaling(a: SupermaskArgs, rank: int, dim: int) -> Tensor:
    """r = number of weights / number of ones, per network, to multiply tensors of `dim` dimensions.

    A mask of zeros counts as one with a single one.
    """
    assert a.kept is not None
    precise = torch.promote_types(a.score.dtype, torch.float32)
    r = a.kept.clamp(min=1).to(precise).reciprocal() * a.score.shape[-rank:].numel()
    return r.view(r.shape + (1,) * (dim - r.dim()))


def supermask_gradients(
    d: Tensor, a: SupermaskArgs, rank: int, need_dw: bool, need_dscore: bool
) -> tuple[Tensor, Tensor]:
    """dweight and dscore from d, the gradient of w m r.

    dw = where(m, r d, 0); dm = r (d w − ⟨d, w m⟩ / ones), the second term through r; dscore =
    dm p (1 − p).
    """
    dw, dscore = a.weight.new_empty(0), a.score.new_empty(0)
    mask = mask_as_bool(a.bits, a.score, rank)
    r = None if a.kept is None else rescaling(a, rank, a.score.dim())
    if need_dw:
        scaled = d if r is None else (d * r).to(d.dtype)
        dw = torch.where(mask, scaled, 0.0).contiguous()
    if need_dscore:
        precise = torch.promote_types(a.score.dtype, torch.float32)
        dm = d.to(precise) * source(a.weight, a.signs, a.score, rank)
        if r is not None and a.kept is not None:
            own = tuple(range(-rank, 0))
            through_r = torch.where(mask, dm, 0.0).sum(own, keepdim=True)
            ones = a.kept.clamp(min=1).view(a.kept.shape + (1,) * rank)
            dm = r * (dm - through_r / ones)
        p = torch.sigmoid(a.score.to(dm.dtype))
        dscore = (dm * p * (1 - p)).to(a.score.dtype).contiguous()
    return dw, dscore
