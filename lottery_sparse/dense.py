"""The backend "dense": the dense library on the effective weight, selected bit by bit.

Same results as `reference`, bit for bit. torch.where on a CPU branches on every mask entry, and on
a half-pruned 784 x 300 weight that costs as much as the product (0.82 ms; this form 0.08 ms, one
Zen 4 core). An integer AND with 0 or -1 selects just as exactly, NaN included.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lottery_sparse import reference
from lottery_sparse.reference import mask_as_bool

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def refuses(op: str, *args: Any) -> None:
    """Nothing: whatever `reference` runs, this runs."""
    return None


def wins(op: str, *args: Any) -> bool:
    """Not where a source is drawn from its key: other backends draw it where they need it."""
    at = 5 if op.startswith("masked_") else 6 if op.startswith("supermask_") else None
    at = 7 if op == "supermask_linear_sgd" else at
    return at is None or args[at] is None or args[at].dtype != torch.int64


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
        frozen = frozen.to(weight.dtype)
        if signs.dtype == torch.int64:
            frozen = reference.source(frozen, signs, weight, rank)
        else:
            plus = mask_as_bool(signs, weight, rank)
            constant = frozen.view(frozen.shape + (1,) * rank)
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
# r multiplies activations in linear layers and weights in convolutions, whichever are fewer.


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
    w = _masked_source(2, score, weight, bits, signs)[1]
    if kept is None:
        return reference.linear(x, w, bias)
    return _rescaled(reference.linear(x, w, None), score, kept, 2, bias)


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
    dx, d = reference.linear_backward(dy, x, masked, need_dx, need_dw or need_dscore)
    needs = need_dw, need_dscore
    return dx, *_score_gradients(2, d, score, source, masked, bits, kept, *needs)


def supermask_linear_sgd(
    dy: Tensor,
    x: Tensor,
    score: Tensor,
    velocity: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    signs: Tensor | None,
    lr: float,
    momentum: float,
    need_dx: bool,
) -> Tensor:
    network = score, weight, bits, kept, signs
    dx, _, dscore = supermask_linear_backward(dy, x, *network, need_dx, False, True)
    score.sub_(velocity.mul_(momentum).add_(dscore), alpha=lr)
    return dx


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
    return reference.conv2d(x, w, bias, *geometry)


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
    dx, d = reference.conv2d_backward(dy, x, w, *geometry_and_needs)
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
    r = reference.rescaling(score, kept, rank).to(torch.promote_types(t.dtype, torch.float32))
    scaled = t * r.view(kept.shape + (1,) * (t.dim() - kept.dim()))
    if bias is not None:
        scaled.add_(bias if bias.dim() == 1 else bias.unsqueeze(1))
    return scaled.to(t.dtype)


def _masked_source(
    rank: int, score: Tensor, weight: Tensor, bits: Tensor, signs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weight before the mask, and after it."""
    integer = INTEGERS[weight.element_size()]
    if signs is None or signs.dtype == torch.int64:
        source = reference.source(weight, signs, score, rank).contiguous().view(integer)
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
    return dx, _gather(dw, *kept[:2]) if need_dv else dw


def compact_conv2d(
    x: Tensor, values: Tensor, bias: Tensor | None, effective: Tensor, *kept_and_geometry: Any
) -> tuple[Tensor, Tensor]:
    kept, geometry = kept_and_geometry[:6], kept_and_geometry[6:]
    w = _filled(values, effective, *kept, stride=geometry[0])
    y = reference.conv2d(x, w, bias, *geometry)
    return y, x.new_empty(0)


def compact_conv2d_backward(
    dy: Tensor, x: Tensor, values: Tensor, effective: Tensor, *kept_and_geometry: Any
) -> tuple[Tensor, Tensor]:
    kept, (*geometry_and_needs, _) = kept_and_geometry[:6], kept_and_geometry[6:]
    need_dx, need_dv = geometry_and_needs[-2:]
    w = _filled(values, effective, *kept, stride=geometry_and_needs[0]) if need_dx else effective
    dx, dw = reference.conv2d_backward(dy, x, w, *geometry_and_needs)
    return dx, _gather(dw, *kept[:2]) if need_dv else dw


def _gather(dw: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    if dw.is_cuda and _has_triton(dw.device):  # one launch instead of ten
        from lottery_sparse.kernels import gather_kept

        return gather_kept(dw, starts, columns)
    return reference.gather_kept(dw, starts, columns)


@cache
def _has_triton(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from lottery_sparse.kernels import fails_on

    return fails_on(device) is None


def _filled(values: Tensor, effective: Tensor, *kept: Any, stride: Sequence[int] = ()) -> Tensor:
    starts, columns, *_, zero = kept
    if reference.may_lag(effective, starts, zero, stride):
        return reference.kept_weight(values, effective, starts, columns)
    return effective.to(values.dtype)


def scatter_kept_(effective: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> None:
    reference.scatter_kept_(effective, values, starts, columns)
