"""csr_linear and bitmap_linear: the kept weights written out once, then the dense library."""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.triton import scatter_kept_
from lottery_sparse.ops.masked.reference import linear
from lottery_sparse.ops.packed.arguments import BitmapArgs, CsrArgs
from lottery_sparse.ops.triton import limits


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


def why_not(a: CsrArgs | BitmapArgs) -> str | None:
    return limits.why_not(a, longest=len(a.values))


@dispatch.limited(why_not)
def csr_linear(a: CsrArgs) -> Tensor:
    """x wᵀ + b of kept `values` at `columns`, row by row."""
    w = a.x.new_zeros(a.rows, a.x.shape[1], dtype=_dtype(a))
    scatter_kept_(w, a.values, a.starts, a.columns)
    return _product(a, w)


@dispatch.limited(why_not)
def bitmap_linear(a: BitmapArgs) -> Tensor:
    """x wᵀ + b of kept `values` where `bits` has ones."""
    w = a.x.new_empty(len(a.bits), a.x.shape[1], dtype=_dtype(a))
    if w.numel():
        with torch.cuda.device_of(a.x):
            _spread[(len(w),)](
                a.values.contiguous(), a.starts.contiguous(), a.bits.contiguous(), w,
                w.shape[1], a.bits.shape[1], WORDS=32,
            )  # fmt: skip
    return _product(a, w)


def _dtype(a: CsrArgs | BitmapArgs) -> torch.dtype:
    """That of the product: values are not rounded."""
    return a.x.dtype if a.values.dtype == a.x.dtype else torch.float32


def _product(a: CsrArgs | BitmapArgs, w: Tensor) -> Tensor:
    bias = None if a.bias is None else a.bias.to(w.dtype)
    return linear(a.x.to(w.dtype), w, bias).to(a.x.dtype)
