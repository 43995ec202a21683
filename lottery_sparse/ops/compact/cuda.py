"""compact_linear for the backend "cuda": products with kept entries only, for training.

They are bound by the shared memory that entries read x from (linear/cuda_compact.h), so they are
an alternative to the dense library where little is kept, or where float32 products must be exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops.compact import reference as compact_reference
from lottery_sparse.ops.limits import rounds

_ops = torch.ops.lottery_sparse_cuda

OPS = ("compact_linear", "compact_linear_backward", "scatter_kept_")
MOST_NETWORKS = 65535  # dimension y of a grid
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def compact_linear(
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
) -> tuple[Tensor, Tensor]:
    """(y, packed x)."""
    return _ops.compact_linear(x, values, starts, columns, bias)


def compact_linear_backward(
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
    need_dx: bool,
    need_dv: bool,
    carried: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dx and dvalues, both from the kept entries."""
    if carried is None or carried.numel() == 0:
        carried = _ops.pack_panels(x) if need_dv else x.new_empty(0)
    shared = x.dim() == 2
    lists = starts, columns, column_starts, rows, positions, shared
    together = shared and dy.dim() == 3
    apart = need_dx and together and rounds(dy)  # dx of each network in float32
    dx, dv = _ops.compact_linear_backward(
        dy, carried, values, *lists, need_dx and not apart, need_dv
    )
    if apart:
        wide = dy.float(), x.new_empty(0), values.float(), *lists, True, False
        dx = _ops.compact_linear_backward(*wide)[0]
    return dx.sum(0).to(dy.dtype) if need_dx and together else dx, dv


def scatter_kept_(effective: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> None:
    """Write kept values [C] or [E, C] into the effective weight."""
    if effective.is_contiguous():
        _ops.scatter_kept_(effective, values, starts, columns)
    else:  # channels last: the columns count otherwise
        compact_reference.scatter_kept_(effective, values, starts, columns)


def refuses(op: str, *args: Any) -> str | None:
    """Why `op` cannot run with these arguments on any device; None if it can."""
    if op == "scatter_kept_":
        effective, values = args[:2]
        tensors = {"effective": effective, "values": values}
    elif op == "compact_linear":
        x, values, bias, zero = *args[:3], args[9]
        tensors = {"x": x, "values": values, "bias": x if bias is None else bias}
    else:
        dy, x, values, zero = *args[:3], args[9] or not args[10]
        tensors = {"x": x, "dy": dy, "values": values}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            return f"its kernels take {name} as float32, float16 or bfloat16, got {tensor.dtype}."
    if values.dim() == 2 and len(values) > MOST_NETWORKS:
        return f"its kernels take up to {MOST_NETWORKS} networks, got {len(values)}."
    if op == "scatter_kept_":
        return None
    others = {t.dtype for t in tensors.values()} - {values.dtype}
    if others:
        return f"its kernels take all tensors in one dtype, got {values.dtype} and {others.pop()}."
    if not zero:
        return "its kernels take weights whose pruned entries are zero, got frozen values."
    return None
