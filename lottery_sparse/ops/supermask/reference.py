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


def supermask_linear(
    x: Tensor,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    signs: Tensor | None,
) -> Tensor:
    """y = x (w m r)ᵀ + b -> [B, N] or [E, B, N]."""
    return linear(x, supermask_weight(score, weight, bits, kept, signs, rank=2), bias)


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
    """dx, dweight and the straight-through dscore; empty where not needed."""
    w = supermask_weight(score, weight, bits, kept, signs, rank=2)
    dx, d = linear_backward(dy, x, w, need_dx, need_dw or need_dscore)
    return dx, *supermask_gradients(
        d, score, weight, bits, kept, signs, 2, need_dw, need_dscore
    )  # fmt: skip


def supermask_conv2d(
    x: Tensor,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    signs: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolution with w m r: [B, O, H', W'] or [E, B, O, H', W']."""
    w = supermask_weight(score, weight, bits, kept, signs, rank=4)
    return conv2d(x, w, bias, stride, padding, dilation, groups)


def supermask_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    signs: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_dx: bool,
    need_dw: bool,
    need_dscore: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and the straight-through dscore; empty where not needed."""
    w = supermask_weight(score, weight, bits, kept, signs, rank=4)
    needs = need_dx, need_dw or need_dscore
    dx, d = conv2d_backward(dy, x, w, stride, padding, dilation, groups, *needs)
    return dx, *supermask_gradients(
        d, score, weight, bits, kept, signs, 4, need_dw, need_dscore
    )  # fmt: skip


def supermask_weight(
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    signs: Tensor | None,
    rank: int,
) -> Tensor:
    """w m r."""
    w = source(weight, signs, score, rank)
    w = torch.where(mask_as_bool(bits, score, rank), w, 0.0)
    return w if kept is None else (w * rescaling(score, kept, rank)).to(w.dtype)


def rescaling(score: Tensor, kept: Tensor, rank: int) -> Tensor:
    """r = number of weights / number of ones, per network, to broadcast; a mask of zeros has 1."""
    ones = kept.clamp(min=1).view(kept.shape + (1,) * rank)
    return score.shape[-rank:].numel() / ones.to(_precise(score))


def supermask_gradients(
    d: Tensor,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    signs: Tensor | None,
    rank: int,
    need_dw: bool,
    need_dscore: bool,
) -> tuple[Tensor, Tensor]:
    """dweight and dscore from d, the gradient of w m r.

    dw = where(m, r d, 0); dm = r (d w − ⟨d, w m⟩ / ones), the second term through r; dscore =
    dm p (1 − p).
    """
    dw, dscore = weight.new_empty(0), score.new_empty(0)
    mask = mask_as_bool(bits, score, rank)
    r = None if kept is None else rescaling(score, kept, rank)
    if need_dw:
        scaled = d if r is None else (d * r).to(d.dtype)
        dw = torch.where(mask, scaled, 0.0).contiguous()
    if need_dscore:
        dm = d.to(_precise(score)) * source(weight, signs, score, rank)
        if r is not None and kept is not None:
            own = tuple(range(-rank, 0))
            through_r = torch.where(mask, dm, 0.0).sum(own, keepdim=True)
            ones = kept.clamp(min=1).view(kept.shape + (1,) * rank)
            dm = r * (dm - through_r / ones)
        p = torch.sigmoid(score.to(dm.dtype))
        dscore = (dm * p * (1 - p)).to(score.dtype).contiguous()
    return dw, dscore


def _precise(score: Tensor) -> torch.dtype:
    return torch.promote_types(score.dtype, torch.float32)
