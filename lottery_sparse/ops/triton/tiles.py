"""What Triton kernels share: tiles of the effective weight, their sizes and their order.

A kernel gets, as constexpr, how the mask and the frozen values come: `PACKED` (int32 words, else
bool), `FROZEN` (ZERO, TENSOR or SIGNS). A tile is loaded with the frozen values
substituted by selection, so nothing that a pruned entry holds gets further.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from lottery_sparse.ops.triton.sources import SIGNS, SIGNS_, TENSOR, TENSOR_, ZERO, ZERO_


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
        constant = constant.to(tl.float32)
        held = tl.where(plus, constant, -constant).to(w.dtype)
        w = tl.where(kept | ~inside, w, held)
    return w


@triton.jit
def spread(words, shift):
    """Packed words [R, W] as bool [R, 32 W]; `shift` is `shifts`, loaded."""
    bits = (words[:, :, None] >> shift[None, None, :]) & 1
    return tl.reshape(bits, (words.shape[0], 32 * words.shape[1])) != 0


@triton.jit
def spread_down(words, shift):
    """Packed words [W, R], as columns, as bool [32 W, R]."""
    bits = (words[:, None, :] >> shift[None, :, None]) & 1
    return tl.reshape(bits, (32 * words.shape[0], words.shape[1])) != 0


@triton.jit
def load_spread(words, row, stride, shift, COLUMNS: tl.constexpr, DOWN: tl.constexpr):
    """Bits of packed rows, of a tile as `load_tile` loads it."""
    word = tl.arange(0, COLUMNS // 32)
    if DOWN:
        bits = spread_down(tl.load(words + (row * stride)[None, :] + word[:, None]), shift)
    else:
        bits = spread(tl.load(words + (row * stride)[:, None] + word[None, :]), shift)
    return bits


@triton.jit
def offsets(row, stride, COLUMNS: tl.constexpr, DOWN: tl.constexpr):
    """row · stride + column, of rows [R] and so many columns; DOWN: transposed."""
    column = tl.arange(0, COLUMNS)
    if DOWN:
        at = (row * stride)[None, :] + column[:, None]
    else:
        at = (row * stride)[:, None] + column[None, :]
    return at


@triton.jit
def load_tile(
    weight, mask, frozen, signs, constant, shift, row, columns_total, mask_stride, signs_stride,
    inside, COLUMNS: tl.constexpr, WEIGHT: tl.constexpr, PACKED: tl.constexpr,
    FROZEN: tl.constexpr, EDGE: tl.constexpr, DOWN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """where(m, w, f) of a tile [R, COLUMNS] whose first entry the pointers point at.

    WEIGHT: TENSOR, or signs, which are 1 and -1 here; `scale_of` multiplies the sums. `row` (int32)
    counts from there and never leaves the matrix. With EDGE, entries that are not `inside` are 0.
    Packed rows are as long as whole chunks of 128 columns, so a tile that starts at a multiple of
    COLUMNS <= 128 stays in them. DOWN: transposed, [COLUMNS, R].
    """
    at = offsets(row, columns_total, COLUMNS, DOWN)
    if WEIGHT == SIGNS_:
        plus = load_spread(signs, row, signs_stride, shift, COLUMNS, DOWN)
        w = tl.where(plus, 1.0, -1.0).to(DTYPE)
    else:
        w = tl.load(weight + at, mask=inside, other=0.0) if EDGE else tl.load(weight + at)
    if PACKED:
        kept = load_spread(mask, row, mask_stride, shift, COLUMNS, DOWN)
    elif EDGE:
        kept = tl.load(mask + at, mask=inside, other=0) != 0
    else:
        kept = tl.load(mask + at) != 0
    if FROZEN == ZERO_:
        if WEIGHT != TENSOR_ and EDGE:
            kept = kept & inside
        return tl.where(kept, w, 0.0)
    if FROZEN == TENSOR_:
        held = tl.load(frozen + at, mask=inside, other=0.0) if EDGE else tl.load(frozen + at)
        return tl.where(kept, w, held)
    plus = load_spread(signs, row, signs_stride, shift, COLUMNS, DOWN)
    constant = constant.to(tl.float32)
    held = tl.where(plus, constant.to(DTYPE), (-constant).to(DTYPE))
    if EDGE:
        held = tl.where(inside, held, 0.0)
    return tl.where(kept, w, held)


@triton.jit
def scale_of(constant, kept, e, size, KIND: tl.constexpr, RESCALE: tl.constexpr):
    """What the sums of network e are multiplied by: the constant of its signs, times r."""
    scale = 1.0
    if KIND == SIGNS_:
        scale = tl.load(constant + e).to(tl.float32)
    if RESCALE:
        scale = scale * (size / tl.maximum(tl.load(kept + e), 1).to(tl.float32))
    return scale


@triton.jit
def aligned(number, BY: tl.constexpr):
    """`number`, and Triton knows that BY divides it: rows of 300 are read 4 numbers at a time."""
    return number // BY * BY if BY > 1 else number


@triton.jit
def in_order(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of a matrix that this program computes: eight rows of tiles, column by column.

    What programs near each other read, rows of the one operand and columns of the other, is then
    still in the cache.
    """
    program, across = tl.program_id(0), tl.cdiv(columns, COLUMNS)
    first = program // (8 * across) * 8
    high = tl.minimum(tl.cdiv(rows, ROWS) - first, 8)
    within = program % (8 * across)
    return first + within % high, within // high


@triton.jit
def dot(a, b, sum, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """sum + a b, accumulated in float32."""
    if WIDEN:  # the interpreter's product of bfloat16 is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit(do_not_specialize=["count"])
def _finish(parts, bias, out, count, total, N, network, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum over s of parts[s, i], + bias of the row."""
    i = (tl.program_id(0) + 0 * total) * BLOCK + tl.arange(0, BLOCK)  # 64 bits where total has them
    inside = i < total
    sum = tl.zeros((BLOCK,), tl.float32)
    for _ in range(count):
        sum += tl.load(parts + i, mask=inside, other=0.0)
        parts += total
    if BIAS:
        row = i // network * N + i % N
        sum += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, sum.to(out.dtype.element_ty), mask=inside)


def finish(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = the sum of parts [S, *out.shape] in their order, + bias [.., N] on out [.., B, N]."""
    rows, network = out.shape[-1], out.shape[-2:].numel()
    _finish[(triton.cdiv(out.numel(), 1024),)](
        parts, parts if bias is None else bias.contiguous(), out, len(parts), out.numel(),
        rows, network, BIAS=bias is not None, BLOCK=1024,
    )  # fmt: skip


# ---- sizes ---------------------------------------------------------------------------------------

# Rows of a product (its weight rows), columns (its batch) and depth of a tile, for batches up to
# the number in front. Bytes rule for a small batch, so there tiles are small and many; above, a
# wide tile reads less from the cache per product.
_SIZES: dict[str, tuple[tuple[float, tuple[int, int, int], int, int], ...]] = {
    "half": (
        (64, (64, 64, 128), 4, 3),
        (128, (128, 128, 64), 8, 3),
        (math.inf, (128, 256, 32), 8, 5),
    ),
    "tf32": (
        (64, (64, 64, 64), 4, 3),
        (math.inf, (128, 128, 32), 8, 3),
    ),
    "ieee": ((math.inf, (64, 64, 32), 8, 3),),
}
MULTIPROCESSORS = 132  # of an H100. Not of this card: the same sums on every one


def _sizes(dtype: torch.dtype) -> list[tuple[float, dict[str, int]]]:
    kind = precision(dtype)["PRECISION"] if dtype == torch.float32 else "half"
    return [
        (most, {"ROWS": r, "BATCH": b, "DEPTH": d, "num_warps": warps, "num_stages": stages})
        for most, (r, b, d), warps, stages in _SIZES[kind]
    ]


def tile(dtype: torch.dtype, batch: int) -> dict[str, int]:
    """Size of tiles for a product with so many columns, as arguments of a kernel."""
    return next(size for most, size in _sizes(dtype) if batch <= most)


def tile_of_grid(
    dtype: torch.dtype, rows: int, columns: int, networks: int, widest: int = 256
) -> dict[str, int]:
    """The largest tile of which a matrix (of each network) has one for every multiprocessor."""
    sizes = [size for _, size in _sizes(dtype) if size["BATCH"] <= widest]
    enough = (s for s in sizes[::-1] if tiles(rows, columns, s) * networks >= MULTIPROCESSORS)
    return next(enough, sizes[0])


def tiles(rows: int, columns: int, size: dict[str, int]) -> int:
    return triton.cdiv(rows, size["ROWS"]) * triton.cdiv(columns, size["BATCH"])


class Parts(NamedTuple):
    """How a product is shared out: its grid, and steps of DEPTH per program."""

    grid: tuple[int, int, int]  # tiles, parts of the depth, networks
    steps: int

    @classmethod
    def of(cls, rows: int, columns: int, steps: int, networks: int, size: dict[str, int]) -> Parts:
        """With so many steps in all; a part has at least four."""
        count = tiles(rows, columns, size)
        wanted = MULTIPROCESSORS * 8 // size["num_warps"] // max(count * networks, 1)
        each = triton.cdiv(steps, max(min(wanted, steps // 4), 1))
        return cls((count, triton.cdiv(steps, max(each, 1)) or 1, networks), each)

    def workspace(self, out: Tensor) -> Tensor:
        """Where programs write: `out` itself, or its parts in float32."""
        count = self.grid[1]
        return out if count == 1 else out.new_empty((count, *out.shape), dtype=torch.float32)


# ---- what a launch is given ----------------------------------------------------------------------


@cache
def _shifts(device: torch.device) -> Tensor:
    # copied from the host, which waits, so that every stream may read it
    return torch.tensor(list(range(32)), dtype=torch.int32).to(device)


def shifts(device: torch.device) -> Tensor:
    """0 … 31: the bits of a word, as numbers that a kernel loads.

    Triton lays out what it loads as the matrix unit takes it, but not what it counts itself: with
    tl.arange, every weight tile would go through shared memory once more.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.arange(32, dtype=torch.int32, device=device)  # part of the graph
    return _shifts(device)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return isinstance(load_bits, InterpretedFunction)


def precision(dtype: torch.dtype, conv: bool = False) -> dict[str, Any]:
    """How products of `dtype` are computed: TF32 only where torch's own of the kind may use it.

    torch has a switch for matrix products, off unless set, and one for convolutions, on unless
    set. Each answers for every way to set it: `allow_tf32`, which may itself no longer be read
    once `fp32_precision` was set, `set_float32_matmul_precision`, `fp32_precision` of one kind or
    of all.
    """
    convolutions: Any = torch.backends.cudnn  # pyright does not see its `conv`
    switch = convolutions.conv if conv else torch.backends.cuda.matmul
    exact = interpreted() or dtype != torch.float32 or switch.fp32_precision != "tf32"
    return {"PRECISION": "ieee" if exact else "tf32", "WIDEN": interpreted()}


def alignment(rows: int, columns: int) -> dict[str, int]:
    """What `aligned` is told of N and K."""
    return {"N_BY": math.gcd(rows, 16), "K_BY": math.gcd(columns, 16)}


def source(values: Tensor | None, signs: Tensor | None) -> int:
    """ZERO, TENSOR or SIGNS, for the two arguments of an op."""
    if values is None:
        return ZERO
    return TENSOR if signs is None else SIGNS
