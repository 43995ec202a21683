"""The products of linear layers, with the effective weight made as its tiles are loaded.

The weight is the first operand of its products, W xᵀ and Wᵀ dyᵀ, so that on Hopper its tile goes
from registers into the matrix unit. Where there are too few tiles for the card, several programs
share one and each sums a part of the depth; `finish` adds the parts in a fixed order.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops.triton.sources import SIGNS, TENSOR, ZERO, load_constant, start
from lottery_sparse.ops.triton.tiles import (
    Parts,
    aligned,
    alignment,
    dot,
    finish,
    in_order,
    load_tile,
    precision,
    scale_of,
    shifts,
    source,
    tile,
)


@triton.jit(do_not_specialize=["B", "steps"])
def linear_product(
    x, weight, mask, frozen, signs, kept, shift, bias, y,
    B, N, K, x_network, mask_stride, signs_stride, size, steps, part,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    WEIGHT: tl.constexpr, PACKED: tl.constexpr, FROZEN: tl.constexpr, RESCALE: tl.constexpr,
    BIAS: tl.constexpr, EDGE: tl.constexpr,
    N_BY: tl.constexpr, K_BY: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y[e, b, n] = scale[e] sum over k of w[e, n, k] x[e, b, k], + bias[e, n]."""
    N, K = aligned(N, N_BY), aligned(K, K_BY)
    row_tile, batch_tile = in_order(N, B, ROWS, BATCH)
    n0, b0 = row_tile * ROWS, batch_tile * BATCH
    e = tl.program_id(2).to(tl.int64)
    s = tl.program_id(1)
    n, b = tl.arange(0, ROWS), tl.arange(0, BATCH)
    row, batch_row = tl.minimum(n, N - 1 - n0), tl.minimum(b, B - 1 - b0)
    scale = scale_of(weight, kept, e, size, WEIGHT, RESCALE)
    constant = load_constant(frozen, e, FROZEN)
    first = (e * N + n0) * K
    weight += start(first, e, WEIGHT)
    mask += (e * N + n0) * mask_stride if PACKED else first
    signs += (e * N + n0) * signs_stride
    frozen += start(first, e, FROZEN)
    x += e * x_network + b0.to(tl.int64) * K
    shift = tl.load(shift + tl.arange(0, 32))
    k = tl.arange(0, DEPTH)
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for k0 in range(s * steps * DEPTH, tl.minimum((s + 1) * steps * DEPTH, K), DEPTH):
        w = load_tile(
            weight + (k0 if WEIGHT == 1 else 0), mask + (k0 >> 5 if PACKED else k0),
            frozen + (k0 if FROZEN == 1 else 0), signs + (k0 >> 5), constant, shift, row,
            K, mask_stride, signs_stride, (row >= 0)[:, None] & (k < K - k0)[None, :],
            DEPTH, WEIGHT, PACKED, FROZEN, EDGE, False, x.dtype.element_ty,
        )  # fmt: skip
        at = x + k0 + (batch_row * K)[None, :] + k[:, None]
        xt = tl.load(at, mask=(k < K - k0)[:, None], other=0.0) if EDGE else tl.load(at)
        sum = dot(w, xt, sum, PRECISION, WIDEN)
    sum *= scale
    if BIAS:
        sum += tl.load(bias + e * N + n0 + row).to(tl.float32)[:, None]
    y += s * part + (e * B + b0) * N + n0
    inside = (n < N - n0)[:, None] & (b < B - b0)[None, :]
    tl.store(y + n[:, None] + (b * N)[None, :], sum.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "steps"])
def linear_dx(
    dy, x, weight, mask, frozen, signs, kept, shift, dx, products,
    B, N, K, networks, x_network, mask_stride, signs_stride, size, steps, part,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    WEIGHT: tl.constexpr, PACKED: tl.constexpr, FROZEN: tl.constexpr, RESCALE: tl.constexpr,
    EDGE: tl.constexpr, SUM: tl.constexpr, STORE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    N_BY: tl.constexpr, K_BY: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dx[e, b, k] = scale[e] sum over n of w[e, n, k] dy[e, b, n].

    SUM: also over all `networks`, which have no scale then. PRODUCTS: products[e, program] are the
    parts of ⟨x, dy w⟩ = ⟨dyᵀ x, w⟩, which is what the rescaling factor has a gradient by.
    """
    N, K = aligned(N, N_BY), aligned(K, K_BY)
    row_tile, batch_tile = in_order(K, B, ROWS, BATCH)
    k0, b0 = row_tile * ROWS, batch_tile * BATCH
    output = tl.program_id(2).to(tl.int64)
    s = tl.program_id(1)
    k, b = tl.arange(0, ROWS), tl.arange(0, BATCH)
    batch_row = tl.minimum(b, B - 1 - b0)
    shift = tl.load(shift + tl.arange(0, 32))
    d = tl.arange(0, DEPTH)
    depth_tiles = tl.cdiv(N, DEPTH)
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for i in range(s * steps, tl.minimum((s + 1) * steps, depth_tiles * networks)):
        e = (i // depth_tiles).to(tl.int64) if SUM else output
        n0 = (i % depth_tiles if SUM else i) * DEPTH
        row = tl.minimum(d, N - 1 - n0) if EDGE else d
        first = (e * N + n0) * K + k0
        bits = (e * N + n0) * mask_stride + (k0 >> 5) if PACKED else first
        plus = (e * N + n0) * signs_stride + (k0 >> 5)
        constant = load_constant(frozen, e, FROZEN)
        w = load_tile(
            weight + start(first, e, WEIGHT), mask + bits, frozen + start(first, e, FROZEN),
            signs + plus, constant, shift, row, K, mask_stride, signs_stride,
            (k < K - k0)[:, None] & (d < N - n0)[None, :],
            ROWS, WEIGHT, PACKED, FROZEN, EDGE, True, dy.dtype.element_ty,
        )  # fmt: skip
        at = dy + (e * B + b0) * N + n0 + (batch_row * N)[None, :] + d[:, None]
        dyt = tl.load(at, mask=(d < N - n0)[:, None], other=0.0) if EDGE else tl.load(at)
        sum = dot(w, dyt, sum, PRECISION, WIDEN)
    inside = (k < K - k0)[:, None] & (b < B - b0)[None, :]
    at = k[:, None] + (b * K)[None, :]
    if PRODUCTS:
        x += output * x_network + b0.to(tl.int64) * K + k0
        own = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        programs = tl.num_programs(0) * tl.num_programs(1)
        to = products + output * programs + s * tl.num_programs(0) + tl.program_id(0)
        tl.store(to, tl.sum(tl.sum(own * sum, 1), 0))
    if STORE:
        sum *= scale_of(weight, kept, output, size, WEIGHT, RESCALE)
        dx += s * part + (output * B + b0) * K + k0
        tl.store(dx + at, sum.to(dx.dtype.element_ty), mask=inside)


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


class Effective(NamedTuple):
    """The effective weight of one network or of E, as the arguments of its op give it.

    With frozen values where(m, w, f) r, else w m r; signs belong to f if there is one, else to w.
    """

    shape: torch.Size  # [N, K] or [E, N, K]
    weight: Tensor  # of this shape; [] or [E]: the constant of `signs`
    mask: Tensor  # bool, or packed
    frozen: Tensor | None = None  # of this shape; [] or [E]: the constant of `signs`
    signs: Tensor | None = None
    kept: Tensor | None = None  # rescales: r = weights / kept

    @property
    def networks(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """weight, mask, frozen, signs, kept, shift: a kernel takes a pointer, read or not."""
        weight, mask = self.weight.contiguous(), self.mask.contiguous()
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        frozen, signs, kept = or_(self.frozen, weight), or_(self.signs, mask), or_(self.kept, mask)
        return weight, mask, frozen, signs, kept, shifts(weight.device)

    def strides(self) -> tuple[int, int, float]:
        """mask_stride, signs_stride, size"""
        rows, columns = self.shape[-2:]
        signs_stride = 0 if self.signs is None else self.signs.shape[-1]
        return self.mask.shape[-1], signs_stride, float(rows * columns)

    def kinds(self) -> dict[str, Any]:
        held = source(self.frozen, self.signs)
        kind = source(self.weight, self.signs) if held == ZERO else TENSOR
        return {
            "WEIGHT": kind,
            "PACKED": self.mask.dtype == torch.int32,
            "FROZEN": held,
            "RESCALE": self.kept is not None,
            **alignment(*self.shape[-2:]),
        }

    def scaled(self) -> bool:
        return self.kept is not None or self.kinds()["WEIGHT"] == SIGNS


def forward(x: Tensor, w: Effective, bias: Tensor | None) -> Tensor:
    """y = x wᵀ + b -> [B, N] or [E, B, N]"""
    x = x.contiguous()
    (rows, columns), batch = w.shape[-2:], x.shape[-2]
    y = x.new_empty((*w.shape[:-2], batch, rows))
    if y.numel() == 0:
        return y
    shape = tile(x.dtype, batch)
    parts = Parts.of(rows, batch, triton.cdiv(columns, shape["DEPTH"]), w.networks, shape)
    out = parts.workspace(y)
    with torch.cuda.device_of(x):
        linear_product[parts.grid](
            x, *w.tensors(), or_(bias, x), out, batch, rows, columns,
            0 if x.dim() == 2 else batch * columns, *w.strides(), parts.steps, y.numel(),
            BIAS=bias is not None and out is y, EDGE=columns % shape["DEPTH"] != 0,
            **w.kinds(), **precision(x.dtype), **shape,
        )  # fmt: skip
        if out is not y:
            finish(out, bias, y)
    return y


def backward(
    dy: Tensor, x: Tensor, w: Effective, need_dx: bool, need_products: bool = False
) -> tuple[Tensor, Tensor]:
    """dx = dy w, summed over E for a shared x; and [E, programs], the parts of ⟨dyᵀ x, w / r⟩.

    Empty where not needed.
    """
    dy, x = dy.contiguous(), x.contiguous()
    (rows, columns), batch, shared = w.shape[-2:], x.shape[-2], x.dim() == 2
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    products = x.new_zeros((w.networks, 0), dtype=torch.float32)
    need_products = need_products and rows * columns * w.networks > 0
    if not dx.numel() and not need_products:
        return dx, products
    shape = tile(x.dtype, batch)
    together = w.networks if shared and not w.scaled() else 1
    outputs = w.networks // together
    steps = triton.cdiv(rows, shape["DEPTH"]) * together
    parts = Parts.of(columns, batch, steps, outputs, shape)
    count = parts.grid[1] * (outputs if shared else 1)
    if need_products:
        products = products.new_empty((w.networks, parts.grid[0] * parts.grid[1]))
    out = dx if count == 1 or not need_dx else products.new_empty((count, *x.shape))
    with torch.cuda.device_of(x):
        linear_dx[parts.grid](
            dy, x, *w.tensors(), out, products, batch, rows, columns, together,
            0 if shared else batch * columns, *w.strides(), parts.steps, outputs * batch * columns,
            EDGE=rows % shape["DEPTH"] != 0 or columns % shape["ROWS"] != 0,
            SUM=together != 1, STORE=need_dx, PRODUCTS=need_products,
            **w.kinds(), **precision(x.dtype), **shape,
        )  # fmt: skip
        if out is not dx and need_dx:
            finish(out, None, dx)
    return dx, products


def or_(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes a pointer for every argument, read or not."""
    return stand_in if tensor is None else tensor.contiguous()
