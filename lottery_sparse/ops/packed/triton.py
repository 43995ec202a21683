"""csr_linear and bitmap_linear: the kept weights written out once, then the dense library."""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops.compact.triton import scatter_kept_
from lottery_sparse.ops.masked.reference import linear


@triton.jit
def _spread(values, starts, bits, dense, K, words, WORDS: tl.constexpr):
    """A row of the dense weight: the next of its values where it has a bit, else 0."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(starts + row)
    word, j = tl.arange(0, WORDS), tl.arange(0, 32)
    bits += row * words
    dense += row * K
    for w0 in range(0, words, WORDS):
        held = tl.load(bits + w0 + word, mask=word < words - w0, other=0)
        kept = tl.reshape((held[:, None] >> j[None, :]) & 1, (32 * WORDS,))
        column = w0 * 32 + tl.arange(0, 32 * WORDS)
        kept = tl.where(column < K, kept, 0)
        place = slot + tl.cumsum(kept, 0) - kept
        value = tl.load(values + place, mask=kept != 0, other=0.0)
        tl.store(dense + column, value.to(dense.dtype.element_ty), mask=column < K)
        slot += tl.sum(kept, 0)


def csr_linear(
    x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None
) -> Tensor:
    """x wᵀ + b of kept `values` at `columns`, row by row."""
    w = x.new_zeros(len(starts) - 1, x.shape[1], dtype=_dtype(x, values))
    scatter_kept_(w, values, starts, columns)
    return _product(x, w, bias)


def bitmap_linear(
    x: Tensor, values: Tensor, starts: Tensor, bits: Tensor, bias: Tensor | None
) -> Tensor:
    """x wᵀ + b of kept `values` where `bits` has ones."""
    w = x.new_empty(len(bits), x.shape[1], dtype=_dtype(x, values))
    if w.numel():
        with torch.cuda.device_of(x):
            _spread[(len(w),)](
                values.contiguous(), starts.contiguous(), bits.contiguous(), w,
                w.shape[1], bits.shape[1], WORDS=32,
            )  # fmt: skip
    return _product(x, w, bias)


def _dtype(x: Tensor, values: Tensor) -> torch.dtype:
    """That of the product: values are not rounded."""
    return x.dtype if values.dtype == x.dtype else torch.float32


def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(w.dtype)
    return linear(x.to(w.dtype), w, bias).to(x.dtype)
