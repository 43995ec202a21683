"""Inference with packed weights, see `formats`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_sparse.ops.bits.reference import unpack_mask
from lottery_sparse.ops.packed import formats
from lottery_sparse.ops.random.reference import random_signs


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


def binary_linear(x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (scale · s)ᵀ + b, s = 1 where `bits` has ones and -1 elsewhere."""
    return _rounded(x, binary_weight(bits, scale.to(_compute_dtype(x)), x.shape[1]), bias)


def binary_weight(bits: Tensor, scale: Tensor, columns: int) -> Tensor:
    """Dense [N, K] in the dtype of `scale`."""
    return formats.signed_weight(torch.where(unpack_mask(bits, columns), 1, -1), scale)


def seeded_linear(
    x: Tensor, bits: Tensor, key: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """x (scale · m s)ᵀ + b, m = 1 where `bits` has ones, s of -1 and 1 drawn by `key`."""
    return _rounded(x, seeded_weight(bits, key, scale.to(_compute_dtype(x)), x.shape[1]), bias)


def seeded_weight(bits: Tensor, key: Tensor, scale: Tensor, columns: int) -> Tensor:
    """Dense [N, K] in the dtype of `scale`."""
    kept = unpack_mask(bits, columns)
    return formats.signed_weight(drawn_signs(key, kept), scale, kept)


def drawn_signs(key: Tensor, like: Tensor) -> Tensor:
    """`ls.random.signs` of a tensor's shape, on its device; key: int64 (seed, stream, step)."""
    seed, stream, step = key.tolist()
    return random_signs(like.numel(), seed, stream, step, like.device).view(like.shape)


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
