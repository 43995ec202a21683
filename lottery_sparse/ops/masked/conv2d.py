"""masked_conv2d: 2-D convolution with where(m, w, f)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.checks import Frozen, check_masked, split_frozen
from lottery_sparse.ops.masked.arguments import GEOMETRY, Geometry
from lottery_sparse.ops.masked.product import masked_product

Pair = int | Sequence[int]


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    frozen: Frozen = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution on the kept weights and frozen values: F.conv2d with where(m, w, f).

    >>> kernels = torch.randn(16, 3, 3, 3)
    >>> ls.ops.masked_conv2d(images, kernels, kernels > 0, padding=1).shape
    torch.Size([4, 16, 8, 8])

    Args:
        x: [B, C, H, W] or [C, H, W], any floating dtype; for E networks [B, C, H, W], shared by
            all, or [E, B, C, H, W].
        weight: [O, C / groups, kh, kw] or [E, O, C / groups, kh, kw], dtype and device of `x`.
        mask: bool like `weight`, True = kept; or packed int32 [O, W], its columns the flattened
            [C / groups, kh, kw].
        bias: [O] or [E, O], or None. Never masked.
        frozen: what pruned weights hold: None = zero, a tensor like `weight` or a
            `SignConstant`. Constants: no gradient flows to them.
        stride, padding, dilation, groups: as in F.conv2d; padding also "same" or "valid".

    Returns:
        [B, O, H', W'], [O, H', W'] or [E, B, O, H', W']; dtype of `x`.

    Gradients: those of F.conv2d through where(m, w, f), dw exactly zero at pruned entries; a NaN
    in a pruned entry reaches neither y nor dx. Differentiable any number of times.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    constant, signs = split_frozen(frozen, weight, rank=4)
    check_masked(x, weight, mask, bias, constant, signs, rank=4)
    x, geometry = checked_images("weight", weight, x, stride, padding, dilation, groups)
    batched = x.unsqueeze(0) if x.dim() == 3 else x
    y = _forward(batched, weight, mask, bias, constant, signs, *geometry)
    return y.squeeze(0) if x.dim() == 3 else y


def checked_images(
    name: str, weight: Tensor, x: Tensor, stride: Pair, padding: Pair | str, dilation: Pair,
    groups: int,
) -> tuple[Tensor, Geometry]:  # fmt: skip
    """x, padded where an uneven "same" asks for it, and the geometry as numbers.

    `weight` is [O, I, kh, kw], or one of E networks, that users know under this name.
    """
    if groups < 1 or weight.shape[-4] % groups:
        raise ValueError(f"groups={groups} must divide the {weight.shape[-4]} output channels.")
    single = weight.dim() == 4
    allowed = (3, 4) if single else (4, 5)
    channels = weight.shape[-3] * groups
    if x.dim() not in allowed or x.shape[-3] != channels:
        layout = "[B, C, H, W]" if single else "[B, C, H, W], shared, or [E, B, C, H, W]"
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but {name} {tuple(weight.shape)} with groups={groups} "
            f"needs {layout} with C = {channels}."
        )
    if x.dim() == 5 and x.shape[0] != weight.shape[0]:
        raise ValueError(f"x holds {x.shape[0]} networks, but {name} {weight.shape[0]}.")
    stride, dilation = as_pair("stride", stride, 1), as_pair("dilation", dilation, 1)
    x, padding = resolve_padding(x, padding, stride, dilation, list(weight.shape[-2:]))
    return x, Geometry(stride, padding, dilation, groups)


def is_dense(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether dispatch takes F.conv2d for a call of `masked_conv2d`, which needs no selection.

    `weight` is one network's; what does not fit is for the op to name.
    """
    kind = weight.device.type
    return (
        dispatch.prefers_dense("masked_conv2d", kind)
        and weight.dim() == 4
        and x.dim() in (3, 4)
        and x.shape[-3] == weight.shape[-3] * groups
        and x.device == weight.device
        and (x.dtype == weight.dtype or torch.is_autocast_enabled(kind))
    )


def as_pair(name: str, value: Pair, least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) == 1:
        pair = pair * 2
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name} must be an int >= {least} or two of them, got {value!r}.")
    return pair


def resolve_padding(
    x: Tensor, padding: Pair | str, stride: list[int], dilation: list[int], kernel: list[int]
) -> tuple[Tensor, list[int]]:
    """Numbers for "same" and "valid"; an uneven "same" pads x on the far side first."""
    if not isinstance(padding, str):
        return x, as_pair("padding", padding, 0)
    if padding == "valid":
        return x, [0, 0]
    if padding != "same":
        raise ValueError(f'padding must be numbers, "same" or "valid", got {padding!r}.')
    if stride != [1, 1]:
        raise ValueError(f'padding="same" needs stride 1, got {stride}.')
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, [t // 2 for t in total]


_forward = masked_product("masked_conv2d", rank=4, geometry=GEOMETRY)
