"""Sources of weights and of frozen values that a seed stands for, made where a kernel needs them.

A kernel gets them as the values and the key of each network, see `reference.drawn`. Element i of a
network is made from halfword i, or bit i, of its random words: integers and a table of 32,768
values (64 KB in 16 bits, which should stay in the cache), so the same bits as `ls.random`.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import triton
import triton.language as tl

from lottery_sparse.ops.random.philox import philox, pick

ZERO, TENSOR, SIGNS, DRAWN_SIGNS, DRAWN = range(5)
ZERO_, TENSOR_, SIGNS_ = (tl.constexpr(kind) for kind in (ZERO, TENSOR, SIGNS))
DRAWN_SIGNS_, DRAWN_ = (tl.constexpr(kind) for kind in (DRAWN_SIGNS, DRAWN))
TABLE = 2**15  # the upper half of a quantile function
TABLE_ = tl.constexpr(TABLE)


@triton.jit
def start(first, e, KIND: tl.constexpr):
    """Where values of network e start: at entry `first`, at its constant, or at its table."""
    if KIND == TENSOR_:
        at = first
    elif KIND == DRAWN_:
        at = e * TABLE_
    else:
        at = e
    return at


@triton.jit
def load_constant(values, e, KIND: tl.constexpr):
    """The constant of signs, [1, 1]."""
    if KIND == SIGNS_ or KIND == DRAWN_SIGNS_:  # noqa: SIM109
        constant = tl.load(values + e + tl.zeros((1, 1), tl.int32))
    else:
        constant = 0.0
    return constant


@triton.jit
def load_key(key, e, WEIGHT: tl.constexpr, FROZEN: tl.constexpr):
    """(seed, stream, step) of network e; anything where nothing is drawn."""
    if WEIGHT >= DRAWN_SIGNS_ or FROZEN >= DRAWN_SIGNS_:
        key += 3 * e
        draw = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    else:
        draw = e, e, e
    return draw


@triton.jit
def _signed(values, half, DTYPE: tl.constexpr):
    """The quantile of each halfword: values[h & 0x7fff], minus if h >= 0x8000."""
    value = tl.load(values + (half & 0x7FFF))
    if value.dtype.primitive_bitwidth == 16:
        bits = value.to(tl.int16, bitcast=True) ^ (half & 0x8000).to(tl.int16)
    else:
        bits = value.to(tl.int32, bitcast=True) ^ ((half & 0x8000) << 16)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def drawn_bits(index, draw):
    """Bit `index` (int64) of the random words, as bool."""
    c0, c1, c2, c3 = philox(index >> 7, draw[0], draw[1], draw[2])
    word = pick(c0, c1, c2, c3, (index >> 5) & 3)
    return ((word >> (index & 31).to(tl.uint32)) & 1) != 0


@triton.jit
def drawn_values(values, index, draw, DTYPE: tl.constexpr):
    """The value of element `index` (int64)."""
    c0, c1, c2, c3 = philox(index >> 3, draw[0], draw[1], draw[2])
    word = pick(c0, c1, c2, c3, (index >> 1) & 3)
    half = (word >> (16 * (index & 1)).to(tl.uint32)).to(tl.int32) & 0xFFFF
    return _signed(values, half, DTYPE)


@triton.jit
def drawn_words(index, draw):
    """Word `index` (int64), as int32."""
    c0, c1, c2, c3 = philox(index >> 2, draw[0], draw[1], draw[2])
    return pick(c0, c1, c2, c3, index & 3).to(tl.int32, bitcast=True)


@triton.jit
def drawn_eights(values, block, draw, DTYPE: tl.constexpr):
    """[R, C] blocks of eight elements -> their values [R, 8 C]."""
    c0, c1, c2, c3 = philox(block, draw[0], draw[1], draw[2])
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3)).to(tl.int32, bitcast=True)
    half = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
    half = tl.reshape(half, (block.shape[0], 8 * block.shape[1]))
    return _signed(values, half, DTYPE)
