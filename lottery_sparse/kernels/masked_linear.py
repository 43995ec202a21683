"""masked_linear with the mask and the frozen values applied as the weight's tiles are loaded.

The weight is the first operand of its products, W xᵀ and Wᵀ dyᵀ, so that on Hopper its tile goes
from registers into the matrix unit. Where there are too few tiles for the card, several programs
share one and each sums a part of the depth; `finish` adds the parts in a fixed order.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.kernels.tiles import (
    Parts,
    aligned,
    alignment,
    dot,
    finish,
    in_order,
    load_tile,
    precision,
    shifts,
    source,
    spread,
    tile,
    tile_of_grid,
)


@triton.jit(do_not_specialize=["B", "steps"])
def _forward(
    x, weight, mask, bias, frozen, signs, shift, y,
    B, N, K, x_network, mask_stride, signs_stride, steps, part,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    PACKED: tl.constexpr, FROZEN: tl.constexpr, BIAS: tl.constexpr, EDGE: tl.constexpr,
    N_BY: tl.constexpr, K_BY: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y[e, b, n] = sum over k of w[e, n, k] x[e, b, k], + bias[e, n]."""
    N, K = aligned(N, N_BY), aligned(K, K_BY)
    row_tile, batch_tile = in_order(N, B, ROWS, BATCH)
    n0, b0 = row_tile * ROWS, batch_tile * BATCH
    e = tl.program_id(2).to(tl.int64)
    s = tl.program_id(1)
    n, b = tl.arange(0, ROWS), tl.arange(0, BATCH)
    row, batch_row = tl.minimum(n, N - 1 - n0), tl.minimum(b, B - 1 - b0)
    first = (e * N + n0) * K
    weight += first
    mask += (e * N + n0) * mask_stride if PACKED else first
    signs += (e * N + n0) * signs_stride
    frozen += first if FROZEN == 1 else e
    constant = tl.load(frozen + tl.zeros((1, 1), tl.int32)) if FROZEN == 2 else 0.0
    x += e * x_network + b0.to(tl.int64) * K
    shift = tl.load(shift + tl.arange(0, 32))
    k = tl.arange(0, DEPTH)
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for k0 in range(s * steps * DEPTH, tl.minimum((s + 1) * steps * DEPTH, K), DEPTH):
        w = load_tile(
            weight + k0, mask + (k0 >> 5 if PACKED else k0), frozen + (k0 if FROZEN == 1 else 0),
            signs + (k0 >> 5), constant, shift, row, K, mask_stride, signs_stride,
            (row >= 0)[:, None] & (k < K - k0)[None, :], DEPTH, PACKED, FROZEN, EDGE, False,
        )  # fmt: skip
        at = x + k0 + (batch_row * K)[None, :] + k[:, None]
        xt = tl.load(at, mask=(k < K - k0)[:, None], other=0.0) if EDGE else tl.load(at)
        sum = dot(w, xt, sum, PRECISION, WIDEN)
    if BIAS:
        sum += tl.load(bias + e * N + n0 + row).to(tl.float32)[:, None]
    y += s * part + (e * B + b0) * N + n0
    inside = (n < N - n0)[:, None] & (b < B - b0)[None, :]
    tl.store(y + n[:, None] + (b * N)[None, :], sum.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "steps"])
def _dx(
    dy, weight, mask, frozen, signs, shift, dx,
    B, N, K, networks, mask_stride, signs_stride, steps, part,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    PACKED: tl.constexpr, FROZEN: tl.constexpr, EDGE: tl.constexpr, SUM: tl.constexpr,
    N_BY: tl.constexpr, K_BY: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dx[b, k] = sum over n, and with SUM over all `networks`, of w[e, n, k] dy[e, b, n]."""
    N, K = aligned(N, N_BY), aligned(K, K_BY)
    row_tile, batch_tile = in_order(K, B, ROWS, BATCH)
    k0, b0 = row_tile * ROWS, batch_tile * BATCH
    output = tl.program_id(2)
    s = tl.program_id(1)
    k, b = tl.arange(0, ROWS), tl.arange(0, BATCH)
    batch_row = tl.minimum(b, B - 1 - b0)
    shift = tl.load(shift + tl.arange(0, 32))
    d = tl.arange(0, DEPTH)
    depth_tiles = tl.cdiv(N, DEPTH)
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for i in range(s * steps, tl.minimum((s + 1) * steps, depth_tiles * networks)):
        e = (i // depth_tiles if SUM else output).to(tl.int64)
        n0 = (i % depth_tiles if SUM else i) * DEPTH
        row = tl.minimum(d, N - 1 - n0) if EDGE else d
        first = (e * N + n0) * K + k0
        kept = (e * N + n0) * mask_stride + (k0 >> 5) if PACKED else first
        plus = (e * N + n0) * signs_stride + (k0 >> 5)
        constant = tl.load(frozen + e + tl.zeros((1, 1), tl.int32)) if FROZEN == 2 else 0.0
        w = load_tile(
            weight + first, mask + kept, frozen + (first if FROZEN == 1 else 0), signs + plus,
            constant, shift, row, K, mask_stride, signs_stride,
            (k < K - k0)[:, None] & (d < N - n0)[None, :], ROWS, PACKED, FROZEN, EDGE, True,
        )  # fmt: skip
        at = dy + (e * B + b0) * N + n0 + (batch_row * N)[None, :] + d[:, None]
        dyt = tl.load(at, mask=(d < N - n0)[:, None], other=0.0) if EDGE else tl.load(at)
        sum = dot(w, dyt, sum, PRECISION, WIDEN)
    dx += s * part + (output.to(tl.int64) * B + b0) * K + k0
    inside = (k < K - k0)[:, None] & (b < B - b0)[None, :]
    tl.store(dx + k[:, None] + (b * K)[None, :], sum.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def dw_tile(
    dy, x, B, N, K, n0, k0, first, last,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EDGE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """sum over b from `first` up to `last` of dy[b, n] x[b, k], for the tile at (n0, k0)."""
    n, k, b = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    dy += first.to(tl.int64) * N + n0
    x += first.to(tl.int64) * K + k0
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for b0 in range(first, last, DEPTH):
        at = dy + n[:, None] + (b * N)[None, :]
        to = x + (b * K)[:, None] + k[None, :]
        if EDGE:
            some = b < B - b0
            dyt = tl.load(at, mask=(n < N - n0)[:, None] & some[None, :], other=0.0)
            rows = tl.load(to, mask=some[:, None] & (k < K - k0)[None, :], other=0.0)
        else:
            dyt, rows = tl.load(at), tl.load(to)
        sum = dot(dyt, rows, sum, PRECISION, WIDEN)
        dy += DEPTH * N
        x += DEPTH * K
    return sum


@triton.jit(do_not_specialize=["B", "steps"])
def _dw(
    dy, x, mask, shift, dw,
    B, N, K, x_network, mask_stride, steps, part,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    PACKED: tl.constexpr, EDGE: tl.constexpr,
    N_BY: tl.constexpr, K_BY: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dw[e, n, k] = sum over b of dy[e, b, n] x[e, b, k] where kept, else 0."""
    N, K = aligned(N, N_BY), aligned(K, K_BY)
    row_tile, column_tile = in_order(N, K, ROWS, BATCH)
    n0, k0 = row_tile * ROWS, column_tile * BATCH
    e = tl.program_id(2).to(tl.int64)
    s = tl.program_id(1)
    sum = dw_tile(
        dy + e * B * N, x + e * x_network, B, N, K, n0, k0,
        s * steps * DEPTH, tl.minimum((s + 1) * steps * DEPTH, B),
        ROWS, BATCH, DEPTH, EDGE, PRECISION, WIDEN,
    )  # fmt: skip
    n, k = tl.arange(0, ROWS), tl.arange(0, BATCH)
    at = (n * K)[:, None] + k[None, :]
    inside = (n < N - n0)[:, None] & (k < K - k0)[None, :]
    first = (e * N + n0) * K + k0
    if PACKED:
        word = tl.arange(0, BATCH // 32)
        listed = (n < N - n0)[:, None] & (word < mask_stride - (k0 >> 5))[None, :]
        mask += (e * N + n0) * mask_stride + (k0 >> 5)
        words = tl.load(mask + (n * mask_stride)[:, None] + word[None, :], mask=listed, other=0)
        kept = spread(words, tl.load(shift + tl.arange(0, 32)))
    else:
        kept = tl.load(mask + first + at, mask=inside, other=0) != 0
    dw += s * part + first
    tl.store(dw + at, tl.where(kept, sum, 0.0).to(dw.dtype.element_ty), mask=inside)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    frozen: Tensor | None,
    signs: Tensor | None,
) -> Tensor:
    x, weight, mask = x.contiguous(), weight.contiguous(), mask.contiguous()
    networks, (rows, columns), batch = _networks(weight), weight.shape[-2:], x.shape[-2]
    y = x.new_empty((*weight.shape[:-2], batch, rows))
    if y.numel() == 0:
        return y
    shape = tile(x.dtype, batch)
    parts = Parts.of(rows, batch, triton.cdiv(columns, shape["DEPTH"]), networks, shape)
    out = parts.workspace(y)
    with torch.cuda.device_of(x):
        _forward[parts.grid](
            x, weight, _bytes(mask), _or(bias, x), _or(frozen, weight), _or(signs, mask),
            shifts(x.device), out, batch, rows, columns,
            0 if x.dim() == 2 else batch * columns,
            mask.shape[-1], 0 if signs is None else signs.shape[-1], parts.steps, y.numel(),
            PACKED=mask.dtype == torch.int32, FROZEN=source(weight, frozen, signs),
            BIAS=bias is not None and out is y, EDGE=columns % shape["DEPTH"] != 0,
            **alignment(rows, columns), **precision(x.dtype), **shape,
        )  # fmt: skip
        if out is not y:
            finish(out, bias, y)
    return y


def masked_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    frozen: Tensor | None,
    signs: Tensor | None,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    dy, x, weight, mask = (t.contiguous() for t in (dy, x, weight, mask))
    networks, (rows, columns), batch = _networks(weight), weight.shape[-2:], x.shape[-2]
    packed, shared = mask.dtype == torch.int32, x.dim() == 2
    dx, dw = x.new_empty(0), x.new_empty(0)
    if need_dx:
        dx = torch.empty_like(x)
    if dx.numel():
        shape = tile(x.dtype, batch)
        together, outputs = (networks, 1) if shared else (1, networks)
        steps = triton.cdiv(rows, shape["DEPTH"]) * together
        parts = Parts.of(columns, batch, steps, outputs, shape)
        out = parts.workspace(dx)
        with torch.cuda.device_of(x):
            _dx[parts.grid](
                dy, weight, _bytes(mask), _or(frozen, weight), _or(signs, mask), shifts(x.device),
                out, batch, rows, columns, together,
                mask.shape[-1], 0 if signs is None else signs.shape[-1], parts.steps, dx.numel(),
                PACKED=packed, FROZEN=source(weight, frozen, signs),
                EDGE=rows % shape["DEPTH"] != 0 or columns % shape["ROWS"] != 0,
                SUM=together != 1, **alignment(rows, columns), **precision(x.dtype), **shape,
            )  # fmt: skip
            if out is not dx:
                finish(out, None, dx)
    if need_dw:
        dw = torch.empty_like(weight)
    if dw.numel():
        shape = tile_of_grid(x.dtype, rows, columns, networks)
        parts = Parts.of(rows, columns, triton.cdiv(batch, shape["DEPTH"]), networks, shape)
        out = parts.workspace(dw)
        with torch.cuda.device_of(x):
            _dw[parts.grid](
                dy, x, _bytes(mask), shifts(x.device), out, batch, rows, columns,
                0 if shared else batch * columns, mask.shape[-1], parts.steps, dw.numel(),
                PACKED=packed, EDGE=_ragged(batch, rows, columns, shape),
                **alignment(rows, columns), **precision(x.dtype), **shape,
            )  # fmt: skip
            if out is not dw:
                finish(out, None, dw)
    return dx, dw


def _networks(weight: Tensor) -> int:
    return weight.shape[0] if weight.dim() == 3 else 1


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes a pointer for every argument, read or not."""
    return stand_in if tensor is None else tensor.contiguous()


def _bytes(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _ragged(batch: int, rows: int, columns: int, shape: dict[str, int]) -> bool:
    """Whether tiles of dw reach beyond the matrices."""
    return bool(rows % shape["ROWS"] or columns % shape["BATCH"] or batch % shape["DEPTH"])
