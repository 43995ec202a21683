"""The arguments of masked products, as kernels get them.

A function of an op's name makes them of the arguments of the registered op, whose schema compiled
graphs and exported programs hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Geometry(NamedTuple):
    """How a convolution goes over its images. A linear layer has the empty one, LINEAR."""

    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    groups: int = 0


LINEAR = Geometry()
# Makes a record of a tuple. Calling the record's class does the same by one more Python function,
# in each call of a layer.
new = tuple.__new__
# The schema of a registered op's geometry.
GEOMETRY = ", SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"


class MaskedArgs(NamedTuple):
    """The arguments of masked_linear and masked_conv2d.

    A kernel of the backward gets them first, then dy, need_dx and need_dw.
    """

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
