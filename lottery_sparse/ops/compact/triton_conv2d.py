"""compact_conv2d by the dense library on the effective weight; dvalues gathered from its dW.

A convolution's dW is small beside its images, so that gathering the kept entries of it takes
little: a kernel that computed only these would have to beat the library's own at all the rest.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lottery_sparse.ops.compact.triton import filled, gather_kept
from lottery_sparse.ops.masked.reference import conv2d, conv2d_backward


def compact_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    effective: Tensor,
    starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    positions: Tensor,
    zero: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    """y, and nothing to carry to the backward."""
    w = filled(values, effective, starts, columns, zero)
    return conv2d(x, w, bias, *geometry), x.new_empty(0)


def compact_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    effective: Tensor,
    starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    positions: Tensor,
    zero: bool,
    *geometry_and_needs: Any,
) -> tuple[Tensor, Tensor]:
    """dx and dvalues; empty where not needed."""
    needs = geometry_and_needs[:-1]  # the last one carries nothing
    need_dx, need_dv = needs[-2:]
    w = filled(values, effective, starts, columns, zero) if need_dx else effective
    dx, dw = conv2d_backward(dy, x, w, *needs)
    return dx, gather_kept(dw, starts, columns) if need_dv else dw
