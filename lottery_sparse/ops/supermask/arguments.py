"""The arguments of products under learned masks, as kernels get them; see masked/arguments.py."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lottery_sparse.ops.masked.arguments import LINEAR, Geometry, new


class SupermaskArgs(NamedTuple):
    """The arguments of supermask_linear and supermask_conv2d.

    A kernel of the backward gets them first, then dy, need_dx, need_dw and need_dscore.
    """

    x: Tensor
    score: Tensor
    weight: Tensor
    bits: Tensor
    kept: Tensor | None = None
    bias: Tensor | None = None  # None in a backward
    signs: Tensor | None = None
    geometry: Geometry = LINEAR


def supermask_linear(
    x, score, weight, bits, kept, bias, signs, *geometry: Any
) -> tuple[SupermaskArgs]:
    way = new(Geometry, geometry) if geometry else LINEAR
    return (new(SupermaskArgs, (x, score, weight, bits, kept, bias, signs, way)),)


def supermask_linear_backward(
    dy, x, score, weight, bits, kept, signs, *rest: Any
) -> tuple[SupermaskArgs, Tensor, bool, bool, bool]:
    *geometry, need_dx, need_dw, need_dscore = rest
    way = new(Geometry, geometry) if geometry else LINEAR
    own = new(SupermaskArgs, (x, score, weight, bits, kept, None, signs, way))
    return own, dy, need_dx, need_dw, need_dscore


supermask_conv2d, supermask_conv2d_backward = supermask_linear, supermask_linear_backward
