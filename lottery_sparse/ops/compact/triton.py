"""compact_linear: dense products on the effective weight, dvalues straight to their slots.

dW is never stored. A program computes a tile of it, finds where the tile's columns begin among the
kept ones of each row, by bisection, and picks its kept entries out by the numbers in `columns`. So
the lists of the op are all it reads, whatever a mask was changed to, and what it costs beyond the
product grows with the number of kept entries.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.arguments import CompactArgs
from lottery_sparse.ops.compact.reference import filled
from lottery_sparse.ops.limits import MAX_DENSITY_SAMPLED_TRITON
from lottery_sparse.ops.masked.reference import conv2d, conv2d_backward, linear, linear_backward
from lottery_sparse.ops.triton import limits
from lottery_sparse.ops.triton.linear_products import dw_tile
from lottery_sparse.ops.triton.tiles import (
    Parts,
    aligned,
    alignment,
    finish,
    in_order,
    precision,
    tile_of_grid,
)


@triton.jit
def load_columns(columns, slot, inside):
    """Column numbers of slots; int16 holds the bits of uint16."""
    column = tl.load(columns + slot, mask=inside, other=0).to(tl.int32)
    return column & 0xFFFF if columns.dtype.element_ty == tl.int16 else column


@triton.jit
def first_from(columns, low, high, column, STEPS: tl.constexpr):
    """The first of the slots low … high - 1, ascending in column, that is at `column` or beyond."""
    for _ in range(STEPS):
        middle = (low + high) // 2
        open = low < high
        before = open & (load_columns(columns, middle, open) < column)
        low = tl.where(before, middle + 1, low)
        high = tl.where(open & ~before, middle, high)
    return low


@triton.jit
def pick(tile, row, column):
    """tile[row, column] for tensors of numbers, by way of shared memory.

    It lies there in blocks of 8 x 8, as a warp holds it, so that a warp writes one without bank
    conflicts. Flat, because gathering along one dimension would take a shuffle per entry.
    """
    down: tl.constexpr = tile.shape[0] // 8
    across: tl.constexpr = tile.shape[1] // 8
    blocks = tl.permute(tl.reshape(tile, (down, 8, across, 8)), (0, 2, 1, 3))
    at = (row // 8 * across + column // 8) * 64 + row % 8 * 8 + column % 8
    flat = tl.gather(
        tl.reshape(blocks, (64 * down * across,)), tl.reshape(at, (at.shape[0] * at.shape[1],)), 0
    )
    return tl.reshape(flat, (at.shape[0], at.shape[1]))


@triton.jit(do_not_specialize=["B", "C"])
def _dvalues(
    dy, x, starts, columns, dvalues,
    B, N, K, C, x_network, steps, part,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
    EDGE: tl.constexpr, N_BY: tl.constexpr, K_BY: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """dvalues[e, s] = sum over b of dy[e, b, n] x[e, b, k] for the entry (n, k) in slot s."""
    N, K = aligned(N, N_BY), aligned(K, K_BY)
    row_tile, column_tile = in_order(N, K, ROWS, BATCH)
    n0, k0 = row_tile * ROWS, column_tile * BATCH
    e = tl.program_id(2).to(tl.int64)
    s = tl.program_id(1)
    starts += e * (N + 1)
    columns += e * C
    dvalues += s * part + e * C
    n = n0 + tl.arange(0, ROWS)
    slot = tl.load(starts + n, mask=n < N, other=0).to(tl.int32)
    end = tl.load(starts + n + 1, mask=n < N, other=0).to(tl.int32)
    slot = first_from(columns, slot, end, k0, STEPS)
    sum = dw_tile(
        dy + e * B * N, x + e * x_network, B, N, K, n0, k0,
        s * steps * DEPTH, tl.minimum((s + 1) * steps * DEPTH, B),
        ROWS, BATCH, DEPTH, EDGE, PRECISION, WIDEN,
    )  # fmt: skip
    most = 1
    while most != 0:
        at = slot[:, None] + tl.arange(0, SLOTS)[None, :]
        column = load_columns(columns, at, at < end[:, None]) - k0
        mine = (at < end[:, None]) & (column < BATCH)
        picked = pick(sum, tl.arange(0, ROWS)[:, None], tl.where(mine, column, 0))
        tl.store(dvalues + at, picked.to(dvalues.dtype.element_ty), mask=mine)
        taken = tl.sum(mine.to(tl.int32), 1)
        slot += taken
        most = tl.max(taken // SLOTS, 0)
    if tl.program_id(0) == 0:
        for spare in range(tl.load(starts + N).to(tl.int32), C, 1024):
            at = spare + tl.arange(0, 1024)
            tl.store(dvalues + at, tl.zeros((1024,), dvalues.dtype.element_ty), mask=at < C)


@triton.jit(do_not_specialize=["C"])
def _scatter(
    dense, values, starts, columns, N, row_length, C,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """dense[e, n, k] = values[e, s] for the entry (n, k) in slot s, or with GATHER the reverse."""
    e = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    starts += e * (N + 1)
    columns += e * C
    values += e * C
    first = tl.load(starts + n, mask=n < N, other=0).to(tl.int32)
    end = tl.load(starts + n + 1, mask=n < N, other=0).to(tl.int32)
    row = dense + (e * N + n) * row_length
    for begin in range(0, tl.max(end - first, 0), SLOTS):
        at = (first + begin)[:, None] + tl.arange(0, SLOTS)[None, :]
        inside = at < end[:, None]
        entry = row[:, None] + load_columns(columns, at, inside)
        if GATHER:
            tl.store(values + at, tl.load(entry, mask=inside), mask=inside)
        else:
            value = tl.load(values + at, mask=inside)
            tl.store(entry, value.to(dense.dtype.element_ty), mask=inside)
    if GATHER and tl.program_id(0) == 0:
        for spare in range(tl.load(starts + N).to(tl.int32), C, 1024):
            at = spare + tl.arange(0, 1024)
            tl.store(values + at, tl.zeros((1024,), values.dtype.element_ty), mask=at < C)


def why_not(a: CompactArgs, dy: Tensor | None = None, *needs: bool) -> str | None:
    return limits.why_not((*a, dy), networks=_networks(a.values))


def _why_not_sampled(a: CompactArgs, dy: Tensor, *needs: bool) -> str | None:
    return limits.why_not((*a, dy), limits.sizes_of(dy, a.x), _networks(a.values))


def _networks(values: Tensor) -> int:
    return len(values) if values.dim() > 1 else 1


@dispatch.limited(why_not)
def compact_linear(a: CompactArgs) -> tuple[Tensor, Tensor]:
    """By the dense library, and nothing to carry to the backward."""
    return linear(a.x, filled(a), a.bias), a.x.new_empty(0)


@dispatch.limited(_why_not_sampled)
def compact_linear_backward(
    a: CompactArgs, dy: Tensor, need_dx: bool, need_dv: bool, carried: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx by the dense library; dvalues by a kernel that computes tiles of dW, or gathers it."""
    sample = need_dv and a.values.numel() <= MAX_DENSITY_SAMPLED_TRITON * a.effective.numel()
    w = filled(a) if need_dx else a.effective
    dx, dv = linear_backward(dy, a.x, w, need_dx, need_dv and not sample)
    if sample:
        dv = sampled(dy, a.x, a.values, a.kept.starts, a.kept.columns)
    elif need_dv:
        dv = gather_kept(dv, a.kept.starts, a.kept.columns)
    return dx, dv


@dispatch.limited(why_not)
def compact_conv2d(a: CompactArgs) -> tuple[Tensor, Tensor]:
    """By the dense library, and nothing to carry to the backward."""
    return conv2d(a.x, filled(a), a.bias, a.geometry), a.x.new_empty(0)


@dispatch.limited(why_not)
def compact_conv2d_backward(
    a: CompactArgs, dy: Tensor, need_dx: bool, need_dv: bool, carried: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By the dense library. dW is small beside the images, so gathering from it takes little."""
    w = filled(a) if need_dx else a.effective
    dx, dw = conv2d_backward(dy, a.x, w, a.geometry, need_dx, need_dv)
    return dx, gather_kept(dw, a.kept.starts, a.kept.columns) if need_dv else dw


def sampled(dy: Tensor, x: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """(dyᵀ x) at the kept entries, like `values`; 0 in spare slots."""
    dy, x, starts, columns = (t.contiguous() for t in (dy, x, starts, columns))
    networks = dy.shape[0] if dy.dim() == 3 else 1
    (batch, n), k, slots = dy.shape[-2:], x.shape[-1], columns.shape[-1]
    dv = torch.empty_like(values)
    if not (n and k and dv.numel()):
        return dv.zero_()
    shape = tile_of_grid(x.dtype, n, k, networks, widest=128)
    parts = Parts.of(n, k, triton.cdiv(batch, shape["DEPTH"]), networks, shape)
    out = parts.workspace(dv)
    ragged = n % shape["ROWS"] or k % shape["BATCH"] or batch % shape["DEPTH"]
    with torch.cuda.device_of(x):
        _dvalues[parts.grid](
            dy, x, starts, columns, out, batch, n, k, slots,
            0 if x.dim() == 2 else batch * k, parts.steps, dv.numel(),
            STEPS=k.bit_length(), SLOTS=16, EDGE=bool(ragged),
            **alignment(n, k), **precision(x.dtype), **shape,
        )  # fmt: skip
        if out is not dv:
            finish(out, None, dv)
    return dv


@dispatch.limited(limits.why_not_dtypes)
def gather_kept(dense: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """The kept entries of a dense gradient, [C] or [E, C]; 0 in spare slots."""
    values = dense.new_empty(columns.shape)
    return _move(dense.contiguous(), values, starts, columns, gather=True)


def _why_not_scatter(effective: Tensor, values: Tensor, *lists: Tensor) -> str | None:
    return limits.why_not((effective, values), networks=_networks(values))


@dispatch.limited(_why_not_scatter)
def scatter_kept_(effective: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> None:
    """Write kept values [C] or [E, C] into the effective weight."""
    dense = effective.contiguous()  # a copy if channels last: columns count in the other order
    _move(dense, values.contiguous(), starts, columns, gather=False)
    if dense is not effective:
        effective.copy_(dense)


def _move(dense: Tensor, values: Tensor, starts: Tensor, columns: Tensor, gather: bool) -> Tensor:
    networks, rows = values.numel() // max(columns.shape[-1], 1), starts.shape[-1] - 1
    if not (rows and values.numel()):
        return values.zero_() if gather else values
    with torch.cuda.device_of(values):
        _scatter[(triton.cdiv(rows, 4), networks)](
            dense, values, starts.contiguous(), columns.contiguous(),
            rows, dense.numel() // (rows * networks), columns.shape[-1],
            ROWS=4, SLOTS=64, GATHER=gather,
        )  # fmt: skip
    return values
