"""Which calls the kernels take, and where they are the faster ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse import reference
from lottery_sparse.native.masks import as_bool, count_kept

# Integer and half-precision scores that a float32 holds exactly, so ranks stay what they were.
_EXACT_SCORES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16)

_PACKED = ("ternary_linear", "csr_linear", "bitmap_linear")
_MOST_COLUMNS_INT8 = 2**18  # kTernaryMostColumns


def refuses(op: str, *args: Any) -> str | None:
    """Why `op` cannot run here with these arguments, in a sentence; None if it can."""
    if op.startswith("masked_linear"):
        return _refuses_linear(*args[:6] if op == "masked_linear" else args[1:6])
    if op.startswith("compact_"):
        dtypes = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
        if dtypes != {torch.float32}:
            return f"its kernels run float32, got {' and '.join(sorted(map(str, dtypes)))}."
    if op == "scatter_kept_" and not (
        args[0].dtype == args[1].dtype == torch.float32 and args[0].is_contiguous()
    ):
        return f"its kernel writes a contiguous float32 tensor, got {args[0].dtype}."
    if op in _PACKED and any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args):
        return "its kernels run float32, got float64."
    if op == "ternary_linear" and args[5] and args[0].shape[1] > _MOST_COLUMNS_INT8:
        return f"its int8 sums hold up to {_MOST_COLUMNS_INT8} columns, got {args[0].shape[1]}."
    if op == "keep_top":
        dtypes = {score.dtype for score in args[0]} - set(_EXACT_SCORES)
        if dtypes:
            return f"scores are {min(map(str, dtypes))}, which a float32 cannot hold exactly."
    return None


def _refuses_linear(x: Tensor, weight: Tensor, *arguments: Any) -> str | None:
    *_, frozen, signs = arguments
    if frozen is not None or signs is not None:
        return "its sparse kernel takes pruned weights as zero, not as frozen values."
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"its kernels run float32, got {x.dtype}."
    return None


# Below this density listing and gathering kept weights beats the dense product; measured at
# batches 1 to 1000 of ten layers, benchmarks/results/cpu.md. With few rows the listing dominates.
_MAX_DENSITY = 0.25
_MAX_DENSITY_SMALL_BATCH = 0.15
_SMALL_BATCH = 32
# A compact layer has its lists already; the limits for forward and dx, and for dvalues.
MAX_DENSITY_COMPACT = reference.MAX_DENSITY_LINEAR
MAX_DENSITY_SAMPLED = 0.45
# Up to this size a call costs more than the product, and one kernel call is the cheapest.
_SMALL_WEIGHT = 4096


def wins(op: str, *args: Any) -> bool:
    """Whether this backend is the faster one for a call that it does not refuse."""
    if op == "compact_linear" or op.startswith("compact_conv2d"):
        effective, starts = args[3:5]
        return reference.kept_share(starts, effective) <= reference.max_density(effective)
    if not op.startswith("masked_linear"):
        return True
    x, weight, mask = args[:3] if op == "masked_linear" else args[1:4]
    if weight.numel() <= _SMALL_WEIGHT:
        return True
    most = _MAX_DENSITY if x.shape[-2] >= _SMALL_BATCH else _MAX_DENSITY_SMALL_BATCH
    return count_kept(as_bool(mask, weight)) <= most * weight.numel()
