"""compact_linear for the backend "cuda": products with kept entries only, for training.

They are bound by the shared memory that entries read x from (linear/cuda_compact.h), so they are
an alternative to the dense library where little is kept, or where float32 products must be exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact import reference
from lottery_sparse.ops.compact.arguments import CompactArgs
from lottery_sparse.ops.limits import GPU_DTYPES, rounds

_ops = torch.ops.lottery_sparse_cuda

MOST_NETWORKS = 65535  # dimension y of a grid


def why_not(
    a: CompactArgs, dy: Tensor | None = None, need_dx: bool = True, *rest: Any
) -> str | None:
    tensors = {"x": a.x, "dy": dy, "values": a.values, "bias": a.bias}
    why = _why_not_tensors(a.values, tensors)
    if why is not None:
        return why
    others = {t.dtype for t in tensors.values() if t is not None} - {a.values.dtype}
    if others:
        return (
            f"its kernels take all tensors in one dtype, got {a.values.dtype} and {others.pop()}."
        )
    if not a.zero and need_dx:
        return "its kernels take weights whose pruned entries are zero, got frozen values."
    return None


def _why_not_tensors(values: Tensor, tensors: dict[str, Tensor | None]) -> str | None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in GPU_DTYPES:
            return f"its kernels take {name} as float32, float16 or bfloat16, got {tensor.dtype}."
    if values.dim() == 2 and len(values) > MOST_NETWORKS:
        return f"its kernels take up to {MOST_NETWORKS} networks, got {len(values)}."
    return None


@dispatch.limited(why_not)
def compact_linear(a: CompactArgs) -> tuple[Tensor, Tensor]:
    """(y, packed x)."""
    return _ops.compact_linear(a.x, a.values, a.kept.starts, a.kept.columns, a.bias)


@dispatch.limited(why_not)
def compact_linear_backward(
    a: CompactArgs, dy: Tensor, need_dx: bool, need_dv: bool, carried: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx and dvalues, both from the kept entries."""
    x, values = a.x, a.values
    if carried is None or carried.numel() == 0:
        carried = _ops.pack_panels(x) if need_dv else x.new_empty(0)
    shared = x.dim() == 2
    lists = *a.kept, shared
    together = shared and dy.dim() == 3
    apart = need_dx and together and rounds(dy)  # dx of each network in float32
    dx, dv = _ops.compact_linear_backward(
        dy, carried, values, *lists, need_dx and not apart, need_dv
    )
    if apart:
        wide = dy.float(), x.new_empty(0), values.float(), *lists, True, False
        dx, _ = _ops.compact_linear_backward(*wide)
    return dx.sum(0).to(dy.dtype) if need_dx and together else dx, dv


def _why_not_scatter(effective: Tensor, values: Tensor, *lists: Tensor) -> str | None:
    return _why_not_tensors(values, {"effective": effective, "values": values})


@dispatch.limited(_why_not_scatter)
def scatter_kept_(effective: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> None:
    """Write kept values [C] or [E, C] into the effective weight."""
    if effective.is_contiguous():
        _ops.scatter_kept_(effective, values, starts, columns)
    else:  # channels last: the columns count otherwise
        reference.scatter_kept_(effective, values, starts, columns)
