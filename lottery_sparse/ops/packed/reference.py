"""Inference with packed weights, see `formats`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_sparse.ops.bits.reference import unpack_mask
from lottery_sparse.ops.packed import formats
from lottery_sparse.ops.packed.arguments import BitmapArgs, CsrArgs, TernaryArgs


def ternary_linear(a: TernaryArgs) -> Tensor:
    """x (scale · t)ᵀ + b; with int8, x is rounded to max|x| / 127 · q, q in -127 … 127, by row."""
    x, wide = a.x, _compute_dtype(a.x)
    w = formats.ternary_weight(a.codes, a.scale.to(wide), a.rows, x.shape[1])
    if not a.int8:
        return _rounded(x, w, a.bias)
    largest = x.to(wide).abs().amax(1, keepdim=True) if x.numel() else x.new_zeros(len(x), 1)
    q = (x.to(wide) * torch.where(largest > 1e-36, 127 / largest, 0.0)).round()
    return _rounded(q * (largest / 127), w, a.bias).to(x.dtype)


def csr_linear(a: CsrArgs) -> Tensor:
    """x wᵀ + b of kept `values` at `columns`, row by row."""
    values = a.values.to(_compute_dtype(a.x))
    return _rounded(a.x, formats.unpack_csr(values, a.starts, a.columns, a.x.shape[1]), a.bias)


def bitmap_linear(a: BitmapArgs) -> Tensor:
    """x wᵀ + b of kept `values` where `bits` has ones."""
    kept, values = unpack_mask(a.bits, a.x.shape[1]), a.values.to(_compute_dtype(a.x))
    return _rounded(a.x, formats.unpack_bitmap(values, kept), a.bias)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rounded(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Computed in the dtype of `w`, rounded once to that of `x`."""
    bias = None if bias is None else bias.to(w.dtype)
    return F.linear(x.to(w.dtype), w, bias).to(x.dtype)
