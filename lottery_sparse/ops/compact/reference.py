"""Products whose weight is a vector of kept values, see `compact.KeptLists`.

`effective` holds frozen values at pruned entries and `values` at kept ones, except where `may_lag`
allows the latter to be out of date. Its dtype is that of `values`, except under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.arguments import CompactArgs
from lottery_sparse.ops.limits import may_lag
from lottery_sparse.ops.masked.reference import conv2d, conv2d_backward, linear, linear_backward


def kept_weight(values: Tensor, effective: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """`effective` with `values` [C] or [E, C] at the kept entries; spare slots go nowhere."""
    if values.dim() == 2:
        each = zip(values, effective, starts, columns, strict=True)
        return torch.stack([kept_weight(*args) for args in each])
    effective = effective.to(values.dtype)
    at = kept_positions(effective, starts, columns)
    flat = torch.cat([effective.flatten(), effective.new_zeros(1)])
    w = flat.index_put([at], values)[:-1].view(effective.shape)
    last = torch.channels_last
    if w.dim() == 4 and not effective.is_contiguous():  # the layout decides on that of results
        w = w.clone(memory_format=last) if effective.is_contiguous(memory_format=last) else w
    return w


def filled(a: CompactArgs) -> Tensor:
    """The effective weight for a dense product, in its dtype."""
    if not may_lag(a.effective, a.kept.starts, a.zero, a.geometry.stride):
        return a.effective.to(a.values.dtype)
    if a.effective.dim() > 3:
        return kept_weight(a.values, a.effective, a.kept.starts, a.kept.columns)
    w = torch.zeros(a.effective.shape, dtype=a.values.dtype, device=a.values.device)
    args = w, a.values, a.kept.starts, a.kept.columns
    dispatch.kernel("scatter_kept_", w.device, args)(*args)
    return w


def kept_positions(weight: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """The flat index into one weight of every slot [C]; that of a spare slot is numel."""
    slots = torch.arange(len(columns), device=columns.device)
    ends = slots.new_zeros(len(columns) + 1).index_add(0, starts[1:], torch.ones_like(starts[1:]))
    row = ends.cumsum(0)[:-1]  # as many as rows that end before the slot
    column = columns.to(torch.int64)
    column = column & 0xFFFF if columns.dtype == torch.int16 else column
    per_row = weight.numel() // max(weight.shape[0], 1)
    return torch.where(slots < starts[-1], row * per_row + column, weight.numel())


def spread_kept(values: Tensor, mask: Tensor) -> Tensor:
    """A mask's shape with `values` [C] or [E, C] where it keeps, in row-major order, else 0.

    The same as `kept_weight`, by the mask alone: in torch.vmap each mask may be another one.
    """
    kept = mask.flatten(values.dim() - 1)
    slots = torch.where(kept, kept.cumsum(-1) - 1, values.shape[-1])
    return F.pad(values, (0, 1)).gather(-1, slots).view(mask.shape)


def gather_kept(dense: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """The kept entries of a dense gradient, [C] or [E, C]; 0 in spare slots."""
    if starts.dim() == 2:
        return torch.stack(
            [gather_kept(*args) for args in zip(dense, starts, columns, strict=True)]
        )
    flat = torch.cat([dense.flatten(), dense.new_zeros(1)])
    return flat[kept_positions(dense, starts, columns)]


def scatter_kept_(effective: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> None:
    """Write the kept values into an effective weight, in place."""
    effective.copy_(kept_weight(values.to(effective.dtype), effective, starts, columns))


def compact_linear(a: CompactArgs) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b with W = `kept_weight`, and nothing to carry to the backward."""
    return linear(a.x, _weight(a), a.bias), a.x.new_empty(0)


def compact_linear_backward(
    a: CompactArgs, dy: Tensor, need_dx: bool, need_dv: bool, carried: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx = dy W, summed over E for a shared x; dvalues = (dyᵀ x) at the kept entries."""
    dx, dw = linear_backward(dy, a.x, _weight(a), need_dx, need_dv)
    return dx, gather_kept(dw, a.kept.starts, a.kept.columns) if need_dv else dw


def compact_conv2d(a: CompactArgs) -> tuple[Tensor, Tensor]:
    """Convolution with W = `kept_weight`, and nothing to carry to the backward."""
    return conv2d(a.x, _weight(a), a.bias, a.geometry), a.x.new_empty(0)


def compact_conv2d_backward(
    a: CompactArgs, dy: Tensor, need_dx: bool, need_dv: bool, carried: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx through W, summed over E for a shared x; dvalues at the kept entries."""
    dx, dw = conv2d_backward(dy, a.x, _weight(a), a.geometry, need_dx, need_dv)
    return dx, gather_kept(dw, a.kept.starts, a.kept.columns) if need_dv else dw


def _weight(a: CompactArgs) -> Tensor:
    return kept_weight(a.values, a.effective, a.kept.starts, a.kept.columns)
