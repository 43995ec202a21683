"""masked_linear on kept weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits.cpu import as_bool, count_kept
from lottery_sparse.ops.common.cpu import DTYPES, masked_linear_least_rows
from lottery_sparse.ops.limits import SMALL_WEIGHT
from lottery_sparse.ops.masked.arguments import MaskedArgs

_ops = torch.ops.lottery_sparse_native


def why_not(a: MaskedArgs, *backward: Any) -> str | None:
    if a.frozen is not None or a.signs is not None:
        return "its sparse kernel takes pruned weights as zero, not as frozen values."
    if a.x.dtype not in DTYPES or a.weight.dtype != a.x.dtype:
        return f"its kernels run float32 or bfloat16, got {a.x.dtype}."
    return None


def is_faster(a: MaskedArgs, *backward: Any) -> bool:
    count = a.weight.numel()
    if count <= SMALL_WEIGHT:
        return True
    kept = count_kept(as_bool(a.mask, a.weight))
    return a.x.shape[-2] >= masked_linear_least_rows(a.x.dtype, kept, count)


@dispatch.limited(why_not, is_faster)
def masked_linear(a: MaskedArgs) -> Tensor:
    return _ops.masked_linear(a.x, a.weight, as_bool(a.mask, a.weight), a.bias)


@dispatch.limited(why_not, is_faster)
def masked_linear_backward(
    a: MaskedArgs, dy: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    mask = as_bool(a.mask, a.weight)
    return _ops.masked_linear_backward(dy, a.x, a.weight, mask, need_dx, need_dw)
