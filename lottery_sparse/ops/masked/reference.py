"""The effective weight, and masked products, in plain PyTorch.

A file reference.py is the definition of its ops. Tests compare kernels to it; it is not tuned.

Shapes: weight [N, K] or [E, N, K] (convolution: [O, I, kh, kw] or [E, O, I, kh, kw]), E networks
side by side; x [B, K], shared by all of them, or [E, B, K]; a mask is bool like the weight, or
packed int32 [..., N, W] (see `pack_mask`). Frozen values are given by two arguments:

    frozen None,  signs None    zero
    frozen like weight          a tensor
    frozen [] or [E], signs     sign x constant; signs are packed like a mask, bit 1 = plus
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_sparse.ops.bits.reference import mask_as_bool
from lottery_sparse.ops.limits import rounds
from lottery_sparse.ops.masked.arguments import Geometry, MaskedArgs

# ---- the effective weight ------------------------------------------------------------------------


def effective_weight(
    weight: Tensor, mask: Tensor, frozen: Tensor | None, signs: Tensor | None, rank: int
) -> Tensor:
    """where(m, w, f): selection, not arithmetic, so nothing a pruned entry holds can leak."""
    kept = mask_as_bool(mask, weight, rank)
    if frozen is None:
        return torch.where(kept, weight, 0.0)
    return torch.where(kept, weight, source(frozen.to(weight.dtype), signs, weight, rank))


def source(values: Tensor, signs: Tensor | None, like: Tensor, rank: int) -> Tensor:
    """The tensor, of the shape of `like`, that a source's two arguments stand for."""
    if signs is None:
        return values
    constant = values.view(values.shape + (1,) * rank)
    return torch.where(mask_as_bool(signs, like, rank), constant, -constant)


# ---- masked_linear -------------------------------------------------------------------------------


def masked_linear(a: MaskedArgs) -> Tensor:
    """y = x where(m, w, f)ᵀ + b -> [B, N] or [E, B, N]."""
    return linear(a.x, effective_weight(a.weight, a.mask, a.frozen, a.signs, rank=2), a.bias)


def masked_linear_backward(
    a: MaskedArgs, dy: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """dx = dy where(m, w, f), summed over E for a shared x; dw = where(m, dyᵀ x, 0)."""
    w = effective_weight(a.weight, a.mask, a.frozen, a.signs, rank=2)
    dx, dw = linear_backward(dy, a.x, w, need_dx, need_dw)
    kept = mask_as_bool(a.mask, a.weight, rank=2)
    return dx, torch.where(kept, dw, 0.0).contiguous() if need_dw else dw


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x wᵀ + b of one network or E of them."""
    if w.dim() == 2:
        return F.linear(x, w, bias)
    if rounds(x) and bias is not None:
        return torch.baddbmm(bias.unsqueeze(1), x.expand(w.shape[0], -1, -1), w.mT)
    y = torch.matmul(x, w.mT)
    return y if bias is None else y + bias.unsqueeze(1)


def linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """dx and the dense dw; empty where not needed."""
    dx, dw = x.new_empty(0), x.new_empty(0)
    if need_dx:
        shared = dy.dim() > x.dim()
        if shared and rounds(x):  # one network with the outputs of all
            dx = torch.matmul(dy.movedim(0, 1).flatten(1), w.flatten(0, 1))
        else:
            dx = torch.matmul(dy, w)
            dx = dx.sum(0) if shared else dx
    if need_dw:
        dw = torch.matmul(dy.mT, x)
    return dx, dw


# ---- masked_conv2d -------------------------------------------------------------------------------


def masked_conv2d(a: MaskedArgs) -> Tensor:
    """Convolution with where(m, w, f): [B, O, H', W'] or [E, B, O, H', W']."""
    w = effective_weight(a.weight, a.mask, a.frozen, a.signs, rank=4)
    return conv2d(a.x, w, a.bias, a.geometry)


def masked_conv2d_backward(
    a: MaskedArgs, dy: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """dx through where(m, w, f), summed over E for a shared x; dw zero at pruned entries."""
    w = effective_weight(a.weight, a.mask, a.frozen, a.signs, rank=4)
    dx, dw = conv2d_backward(dy, a.x, w, a.geometry, need_dx, need_dw)
    return dx, torch.where(mask_as_bool(a.mask, a.weight, rank=4), dw, 0.0) if need_dw else dw


def conv2d(x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """F.conv2d of one network, or of E of them as one grouped convolution."""
    if w.dim() == 4:
        return F.conv2d(x, w, bias, *geometry)
    networks = w.shape[0]
    x, bias = _side_by_side(x, networks), None if bias is None else bias.flatten()
    y = F.conv2d(x, w.flatten(0, 1), bias, *geometry._replace(groups=geometry.groups * networks))
    return _one_by_one(y, networks)


def conv2d_backward(
    dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """dx and the dense dw; empty where not needed."""
    stride, padding, dilation, groups = geometry
    if w.dim() == 5 and x.dim() == 4 and rounds(x):  # one network with the outputs of all
        by_group = w.unflatten(1, (groups, -1)).transpose(0, 1)
        dy = dy.unflatten(2, (groups, -1)).permute(1, 2, 0, 3, 4, 5).flatten(1, 3)
        dx, dw = conv2d_backward(dy, x, by_group.flatten(0, 2), geometry, need_dx, need_dw)
        return dx, dw.view(by_group.shape).transpose(0, 1).flatten(1, 2) if need_dw else dw
    networks = w.shape[0] if w.dim() == 5 else 0
    shared, shape = x.dim() == 4, w.shape
    if networks:
        dy, x, w = _side_by_side(dy, networks), _side_by_side(x, networks), w.flatten(0, 1)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, False, [0, 0], groups * max(networks, 1),
        [need_dx, need_dw, False],
    )  # fmt: skip
    if need_dx and networks:
        dx = _one_by_one(dx, networks)
        dx = dx.sum(0) if shared else dx
    return dx if need_dx else x.new_empty(0), dw.view(shape) if need_dw else x.new_empty(0)


def _side_by_side(x: Tensor, networks: int) -> Tensor:
    """[E, B, C, H, W] or shared [B, C, H, W] -> [B, E C, H, W], the form of a grouped conv."""
    x = x if x.dim() == 5 else x.expand(networks, *x.shape)
    return x.transpose(0, 1).flatten(1, 2)


def _one_by_one(y: Tensor, networks: int) -> Tensor:
    """[B, E C, H, W] -> [E, B, C, H, W]."""
    return y.unflatten(1, (networks, -1)).transpose(0, 1).contiguous()
