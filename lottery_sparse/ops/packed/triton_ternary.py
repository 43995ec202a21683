"""ternary_linear: codes of 2 bits become -2, 0 and 2 in registers, the first operand of a product.

2.0 has bit 14 as its only one in float16 and bfloat16, and the complement of a code is its sign and
whether it is not 0. So a multiplication and a LOP3 make two weights of a word, those of columns
4 j + b and 4 j + b + 2, which lie 16 bits apart. The product takes columns in that order, in which
x is put first.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.limits import LIBRARY_FROM
from lottery_sparse.ops.packed.arguments import TernaryArgs
from lottery_sparse.ops.triton import limits
from lottery_sparse.ops.triton.tiles import MULTIPROCESSORS, Parts, dot, in_order, precision, tiles

BLOCK = tl.constexpr(16)  # rows and columns of a block of codes
PANEL = 2**24  # weights of a panel of rows, written for the dense library, that stays in the cache
# Up to a batch: rows, columns and depth of a tile, warps, stages. Every row of tiles reads all of x
# from the L2 cache, which for 17 … 64 rows of x costs more than the codes do: hence 256 rows.
_SIZES: tuple[tuple[float, tuple[int, int, int], int, int], ...] = (
    (16, (128, 16, 128), 4, 4),
    (32, (256, 32, 64), 8, 4),
    (64, (256, 64, 64), 8, 4),
    (128, (128, 128, 64), 8, 4),
    (math.inf, (128, 256, 64), 8, 3),
)
_FLOAT = math.inf, (64, 64, 32), 8, 3  # of float32


@triton.jit
def _order(x, out, K, columns, COLUMNS: tl.constexpr):
    """Rows of x with columns 0, 2, 1, 3 of every four, and zeros behind."""
    b, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column = k - k % 4 + k % 2 * 2 + k // 2 % 2
    value = tl.load(x + b * K + column, mask=column < K, other=0.0)
    tl.store(out + b * columns + k, value, mask=k < columns)


@triton.jit
def weights(words, power, like):
    """Words [R, W] as -2, 0 and 2 [R, 16 W], in the order of `_order`, of the dtype of `like`."""
    pairs = ~(words[:, :, None] * power[None, None, :]) & -1073692672  # 0xC000C000
    if like.dtype.element_ty == tl.float32:
        w = tl.join(pairs << 16, pairs & -1073741824)  # 0xC0000000
    else:
        w = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    w = tl.reshape(w, (words.shape[0], 16 * words.shape[1]))
    return w.to(like.dtype.element_ty, bitcast=True)


@triton.jit(do_not_specialize=["B", "steps"])
def _forward(
    x, codes, scale, bias, power, y,
    B, N, columns, words, steps, part, by_row,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, EDGE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y[b, n] = scale[n] · sum over k of t[n, k] x[b, k], + bias[n]; without SCALE, twice the sum.

    x [B, columns] as `_order` made it, codes [blocks of rows, words, 16].
    """
    row_tile, batch_tile = in_order(N, B, ROWS, BATCH)
    n0, b0 = row_tile * ROWS, batch_tile * BATCH
    s = tl.program_id(1)
    n, b, k = tl.arange(0, ROWS), tl.arange(0, BATCH), tl.arange(0, DEPTH)
    block, word = tl.arange(0, ROWS // 16), tl.arange(0, DEPTH // 16)
    block = tl.minimum(block, tl.cdiv(N, BLOCK) - 1 - n0 // BLOCK)
    codes += (n0 // BLOCK).to(tl.int64) * words * BLOCK
    within = (block * words * BLOCK)[:, None, None] + tl.arange(0, 16)[None, None, :]
    batch_row = tl.minimum(b, B - 1 - b0)
    x += b0.to(tl.int64) * columns
    power = tl.load(power + tl.arange(0, 8))
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for k0 in range(s * steps * DEPTH, tl.minimum((s + 1) * steps * DEPTH, columns), DEPTH):
        w0 = k0 // BLOCK
        # x is 0 behind its end, so what is there counts for nothing
        at_word = tl.minimum(word, words - 1 - w0) if EDGE else word
        held = tl.load(codes + w0 * BLOCK + within + (at_word * BLOCK)[None, :, None])
        held = tl.reshape(tl.permute(held, (0, 2, 1)), (ROWS, DEPTH // 16))
        xt = tl.load(x + k0 + (batch_row * columns)[None, :] + k[:, None])
        sum = dot(weights(held, power, x), xt, sum, PRECISION, WIDEN)
    row = tl.minimum(n, N - 1 - n0)
    if SCALE:
        sum *= 0.5 * tl.load(scale + (n0 + row) * by_row).to(tl.float32)[:, None]
    if BIAS:
        sum += tl.load(bias + n0 + row).to(tl.float32)[:, None]
    y += s * part + b0.to(tl.int64) * N + n0
    inside = (n < N - n0)[:, None] & (b < B - b0)[None, :]
    tl.store(y + n[:, None] + (b * N)[None, :], sum.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _finish(
    parts, scale, bias, y, count, total, N, by_row, BIAS: tl.constexpr, NUMBERS: tl.constexpr
):
    """y = scale · half the sum of the parts, in their order, + bias."""
    i = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    inside, row = i < total, i % N
    sum = tl.zeros((NUMBERS,), tl.float32)
    for _ in range(count):
        sum += tl.load(parts + i, mask=inside, other=0.0)
        parts += total
    sum *= 0.5 * tl.load(scale + row * by_row, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        sum += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + i, sum.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _unpack(codes, scale, shift, out, first, N, K, words, by_row, WORDS: tl.constexpr):
    """scale · t, dense: the 16 rows of a block from `first` on, 16 WORDS columns."""
    block, w0 = tl.program_id(0), tl.program_id(1) * WORDS
    r, word, k = tl.arange(0, 16), tl.arange(0, WORDS), tl.arange(0, 16 * WORDS)
    at = ((first + block).to(tl.int64) * words + w0) * BLOCK
    held = tl.load(
        codes + at + (word * BLOCK)[:, None] + r[None, :], mask=(word < words - w0)[:, None]
    )
    shift = tl.load(shift + tl.arange(0, 16))
    code = (tl.trans(held)[:, :, None] >> shift[None, None, :]) & 3
    t = tl.reshape(code - 1, (16, 16 * WORDS)).to(tl.float32)
    row = (first + block) * BLOCK + r
    c = tl.load(scale + row * by_row, mask=row < N, other=0.0).to(tl.float32)
    inside = (row < N)[:, None] & (k < K - w0 * BLOCK)[None, :]
    out += (block * BLOCK + r).to(tl.int64)[:, None] * K + (w0 * BLOCK + k)[None, :]
    tl.store(out, (c[:, None] * t).to(out.dtype.element_ty), mask=inside)


def why_not(a: TernaryArgs) -> str | None:
    if a.int8:
        return "its kernels take exact activations."
    return limits.why_not(a, sizes=(*a.x.shape, *a.codes.shape[-2:], a.rows))


@dispatch.limited(why_not)
def ternary_linear(a: TernaryArgs) -> Tensor:
    """x (scale · t)ᵀ + b, exact activations."""
    x, codes, scale, bias = a.x.contiguous(), a.codes.contiguous(), a.scale.contiguous(), a.bias
    y = x.new_empty((len(x), a.rows))
    if y.numel() == 0:
        return y
    if x.shape[1] == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        if len(x) >= LIBRARY_FROM and scale.dtype == x.dtype:
            _by_library(x, codes, scale, bias, y)
        else:
            _fused(x, codes, scale, bias, y)
    return y


def _fused(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    batch, rows = y.shape
    words, by_row = codes.shape[1], int(scale.numel() > 1)
    sizes = _SIZES if x.dtype != torch.float32 else (_FLOAT,)
    _, (r, b, d), warps, stages = next(size for size in sizes if batch <= size[0])
    shape = {"ROWS": r, "BATCH": b, "DEPTH": d, "num_warps": warps, "num_stages": stages}
    columns = triton.cdiv(x.shape[1], d) * d
    ordered = x.new_empty((batch, columns))
    _order[(batch, triton.cdiv(columns, 1024))](x, ordered, x.shape[1], columns, COLUMNS=1024)
    parts = _parts(rows, batch, columns // d, shape)
    out = parts.workspace(y)
    _forward[parts.grid[:2]](
        ordered, codes, scale, y if bias is None else bias, _loaded(x.device, _POWERS), out,
        batch, rows, columns, words, parts.steps, y.numel(), by_row,
        BIAS=bias is not None and out is y, SCALE=out is y, EDGE=words % (d // 16) != 0,
        **precision(x.dtype), **shape,
    )  # fmt: skip
    if out is not y:
        _finish[(triton.cdiv(y.numel(), 1024),)](
            out, scale, y if bias is None else bias, y, len(out), y.numel(), rows, by_row,
            BIAS=bias is not None, NUMBERS=1024,
        )  # fmt: skip


def _parts(rows: int, batch: int, steps: int, shape: dict[str, int]) -> Parts:
    """Four programs of four warps on a multiprocessor keep it reading."""
    count = tiles(rows, batch, shape)
    wanted = MULTIPROCESSORS * 16 // shape["num_warps"] // count
    each = triton.cdiv(steps, max(min(wanted, steps // 4), 1))
    return Parts((count, triton.cdiv(steps, each), 1), each)


def _by_library(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    columns, rows, words = x.shape[1], y.shape[1], codes.shape[1]
    panel = max(PANEL // columns // 128, 1) * 128
    weight = x.new_empty((min(panel, rows), columns))
    bias = None if bias is None else bias.to(x.dtype)
    for first in range(0, rows, panel):
        last = min(first + panel, rows)
        _unpack[(triton.cdiv(last - first, 16), triton.cdiv(words, 32))](
            codes, scale, _loaded(x.device, _SHIFTS), weight, first // 16, last, columns, words,
            int(scale.numel() > 1), WORDS=32,
        )  # fmt: skip
        held, part = weight[: last - first], slice(first, last)
        if bias is None:
            torch.mm(x, held.t(), out=y[:, part])
        else:
            torch.addmm(bias[part], x, held.t(), out=y[:, part])


# Pairs of codes go up by multiplication, which leaves the pipe of LOP3 alone; by place in the order
# of `_order`. Codes go down, by column.
_POWERS = tuple(1 << 14 - 8 * b - 2 * j for j in range(4) for b in range(2))
_SHIFTS = tuple(8 * b + 2 * j for j in range(4) for b in range(4))
_numbers: dict[tuple, Tensor] = {}


def _loaded(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """Numbers that a kernel loads, see `tiles.shifts`."""
    held = _numbers.get((device, numbers))
    if held is not None:
        return held
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        made = torch.empty(len(numbers), dtype=torch.int32, device=device)
        for i, number in enumerate(numbers):
            made[i].fill_(number)
        return made  # part of the graph
    return _numbers.setdefault(
        (device, numbers), torch.tensor(numbers, dtype=torch.int32).to(device)
    )
