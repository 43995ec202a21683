"""The arguments of compact products, as kernels get them; see ops/masked/arguments.py."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.masked.arguments import LINEAR, Geometry, new


class CompactArgs(NamedTuple):
    """The arguments of compact_linear and compact_conv2d.

    A kernel of the backward gets them first, then dy, need_dx, need_dv and what the kernel of the
    forward gave beside y, or None.
    """

    x: Tensor
    values: Tensor
    bias: Tensor | None  # None in a backward
    effective: Tensor
    kept: KeptLists
    zero: bool  # effective is 0 wherever no kept entry is
    geometry: Geometry = LINEAR


def compact_linear(
    x, values, bias, effective, starts, columns, column_starts, rows, positions, zero,
    *geometry: Any,
) -> tuple[CompactArgs]:  # fmt: skip
    kept = new(KeptLists, (starts, columns, column_starts, rows, positions))
    way = new(Geometry, geometry) if geometry else LINEAR
    return (new(CompactArgs, (x, values, bias, effective, kept, zero, way)),)


def compact_linear_backward(
    dy, x, values, effective, starts, columns, column_starts, rows, positions, zero, *rest: Any
) -> tuple[CompactArgs, Tensor, bool, bool]:
    *geometry, need_dx, need_dv = rest
    kept = new(KeptLists, (starts, columns, column_starts, rows, positions))
    way = new(Geometry, geometry) if geometry else LINEAR
    own = new(CompactArgs, (x, values, None, effective, kept, zero, way))
    return own, dy, need_dx, need_dv


compact_conv2d, compact_conv2d_backward = compact_linear, compact_linear_backward
