"""What Triton kernels share: tiles of the effective weight, of x and of dy.

A kernel gets, as constexpr, how the mask and the frozen values come: `PACKED` (int32 words, else
bool), `FROZEN` (one of ZERO, TENSOR, SIGNS). A tile is loaded with the frozen values substituted by
selection, so nothing that a pruned entry holds gets further.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

ZERO, TENSOR, SIGNS = 0, 1, 2
ZERO_, TENSOR_, SIGNS_ = (tl.constexpr(kind) for kind in (ZERO, TENSOR, SIGNS))


@triton.jit
def load_bits(words, stride, rows, columns, inside):
    """The bits of packed rows [N, W] at rows × columns, as bool."""
    word = tl.load(words + rows * stride + (columns >> 5), mask=inside, other=0)
    return ((word >> (columns & 31)) & 1) != 0


@triton.jit
def load_mask(mask, stride, rows, columns, inside, PACKED: tl.constexpr):
    """Whether entries are kept; outside the matrix, no."""
    if PACKED:
        return load_bits(mask, stride, rows, columns, inside)
    return tl.load(mask + rows * stride + columns, mask=inside, other=0) != 0


@triton.jit
def load_effective(
    weight, mask, frozen, signs, constant, columns_total, mask_stride, signs_stride, rows, columns,
    inside, PACKED: tl.constexpr, FROZEN: tl.constexpr,
):  # fmt: skip
    """where(m, w, f) at rows × columns (int64, broadcast against each other); 0 outside."""
    kept = load_mask(mask, mask_stride, rows, columns, inside, PACKED)
    at = rows * columns_total + columns
    w = tl.load(weight + at, mask=kept, other=0.0)
    if FROZEN == TENSOR_:
        w = tl.where(kept, w, tl.load(frozen + at, mask=inside & ~kept, other=0.0))
    elif FROZEN == SIGNS_:
        plus = load_bits(signs, signs_stride, rows, columns, inside)
        held = tl.where(plus, constant, -constant).to(w.dtype)
        w = tl.where(kept | ~inside, w, held)
    return w


@triton.jit
def dot(a, b, sum, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """sum + a b, accumulated in float32."""
    if WIDEN:  # the interpreter's product of bfloat16 is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return isinstance(load_bits, InterpretedFunction)


def precision(dtype: torch.dtype) -> dict[str, Any]:
    """How products of `dtype` are computed: TF32 only where torch's own products may use it."""
    exact = interpreted() or not torch.backends.cuda.matmul.allow_tf32
    return {"PRECISION": "ieee" if exact else "tf32", "WIDEN": interpreted()}


def source(weight: Tensor, frozen: Tensor | None, signs: Tensor | None) -> int:
    """FROZEN for the arguments of an op."""
    return ZERO if frozen is None else TENSOR if signs is None else SIGNS
