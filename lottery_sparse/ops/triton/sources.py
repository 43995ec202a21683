"""Sources of weights and of frozen values, as kernels get them: a tensor, or signs x constant."""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import triton
import triton.language as tl

ZERO, TENSOR, SIGNS = range(3)
ZERO_, TENSOR_, SIGNS_ = (tl.constexpr(kind) for kind in (ZERO, TENSOR, SIGNS))


@triton.jit
def start(first, e, KIND: tl.constexpr):
    """Where values of network e start: at entry `first`, or at its constant."""
    return first if KIND == TENSOR_ else e


@triton.jit
def load_constant(values, e, KIND: tl.constexpr):
    """The constant of signs, [1, 1]."""
    return tl.load(values + e + tl.zeros((1, 1), tl.int32)) if KIND == SIGNS_ else 0.0
