"""The C++ kernels of compact convolutions, the gradient of the bias among them.

Images that are channels_last in memory go in with the channels last, and come out so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists


def kept_conv2d(x: Tensor, values: Tensor, lists: KeptLists, bias, *geometry) -> Tensor:
    """y of kept `values`; geometry: kernel size, stride, padding, dilation, groups."""
    last = is_channels_last(x)
    run = native().compact_conv2d
    y = run(inner(x, last), values, lists.starts, lists.columns, bias, *geometry, last)
    return outer(y, last)


def kept_conv2d_backward(
    dy: Tensor, x: Tensor, values: Tensor, lists: KeptLists, *geometry_and_needs
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dvalues, dbias), empty where not needed."""
    *geometry, need_dx, need_dvalues, need_dbias = geometry_and_needs
    last = is_channels_last(x)
    dx, dvalues, dbias = native().compact_conv2d_backward(
        inner(dy, last), inner(x, last), values, *lists, *geometry, last,
        need_dx, need_dvalues, need_dbias,
    )  # fmt: skip
    return outer(dx, last) if need_dx else dx, dvalues, dbias


def native():
    dispatch.library_of("cpu")
    return torch.ops.lottery_sparse_native


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(-3, -1).is_contiguous()


def inner(x: Tensor, last: bool) -> Tensor:
    return x.movedim(-3, -1) if last else x


def outer(x: Tensor, last: bool) -> Tensor:
    return x.movedim(-1, -3) if last else x
