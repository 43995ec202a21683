"""Inference with packed weights, see `formats`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_sparse.ops.bits.reference import unpack_mask
from lottery_sparse.ops.packed import formats


def ternary_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, rows: int, int8: bool
) -> Tensor:
    """x (scale · t)ᵀ + b; with int8, x is rounded to max|x| / 127 · q, q in -127 … 127, by row."""
    wide = _compute_dtype(x)
    w = formats.ternary_weight(codes, scale.to(wide), rows, x.shape[1])
    if not int8:
        return _rounded(x, w, bias)
    largest = x.to(wide).abs().amax(1, keepdim=True) if x.numel() else x.new_zeros(len(x), 1)
    q = (x.to(wide) * torch.where(largest > 1e-36, 127 / largest, 0.0)).round()
    return _rounded(q * (largest / 127), w, bias).to(x.dtype)


def csr_linear(
    x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None
) -> Tensor:
    """x wᵀ + b of kept `values` at `columns`, row by row."""
    w = formats.unpack_csr(values.to(_compute_dtype(x)), starts, columns, x.shape[1])
    return _rounded(x, w, bias)


def bitmap_linear(
    x: Tensor, values: Tensor, starts: Tensor, bits: Tensor, bias: Tensor | None
) -> Tensor:
    """x wᵀ + b of kept `values` where `bits` has ones."""
    kept = unpack_mask(bits, x.shape[1])
    return _rounded(x, formats.unpack_bitmap(values.to(_compute_dtype(x)), kept), bias)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rounded(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Computed in the dtype of `w`, rounded once to that of `x`."""
    bias = None if bias is None else bias.to(w.dtype)
    return F.linear(x.to(w.dtype), w, bias).to(x.dtype)
