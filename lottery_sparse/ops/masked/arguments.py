"""The arguments of masked products, as kernels get them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Geometry(NamedTuple):
    """How a convolution goes over its images. Empty: a linear layer."""

    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    groups: int = 0


LINEAR = Geometry()
# makes a record; its class would make one more Python call in each call of a layer
new = tuple.__new__
# the part of a geometry in the schema of a registered op
GEOMETRY = ", SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"


class MaskedArgs(NamedTuple):
    """Of masked_linear and masked_conv2d, and of their backwards beside dy and what is needed."""

    x: Tensor
    weight: Tensor
    mask: Tensor  # bool, or packed int32
    bias: Tensor | None = None  # None in a backward
    frozen: Tensor | None = None
    signs: Tensor | None = None
    geometry: Geometry = LINEAR


def masked_linear(x, weight, mask, bias, frozen, signs, *geometry: Any) -> tuple[MaskedArgs]:
    way = new(Geometry, geometry) if geometry else LINEAR
    return (new(MaskedArgs, (x, weight, mask, bias, frozen, signs, way)),)


def masked_linear_backward(
    dy, x, weight, mask, frozen, signs, *rest: Any
) -> tuple[MaskedArgs, Tensor, bool, bool]:
    *geometry, need_dx, need_dw = rest
    way = new(Geometry, geometry) if geometry else LINEAR
    own = new(MaskedArgs, (x, weight, mask, None, frozen, signs, way))
    return own, dy, need_dx, need_dw


masked_conv2d, masked_conv2d_backward = masked_linear, masked_linear_backward
