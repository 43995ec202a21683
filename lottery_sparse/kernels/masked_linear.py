"""masked_linear with the mask and the frozen values applied as the weight's tiles are loaded.

The weight is the first operand of every product, W x^T and W^T dy^T, so that on Hopper its tile
goes from registers into the matrix unit without a stop in shared memory.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.kernels.tiles import (
    dot,
    load_effective,
    load_mask,
    precision,
    source,
)

# Rows of the product, batch, and the dimension summed over; the same for every shape and card
# until one has measured more.
TILE = {"ROWS": 128, "BATCH": 64, "DEPTH": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def _forward(
    x, weight, mask, bias, frozen, signs, y,
    B, N, K, x_network, mask_stride, signs_stride,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    PACKED: tl.constexpr, FROZEN: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y[e, b, n] = sum over k of w[e, n, k] x[e, b, k], + bias[e, n]."""
    e = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(0).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    weight += e * N * K
    mask += e * N * mask_stride
    signs += e * N * signs_stride
    frozen += e * N * K if FROZEN == 1 else e
    constant = tl.load(frozen).to(tl.float32) if FROZEN == 2 else 0.0
    x += e * x_network
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for k0 in range(0, K, DEPTH):
        k = k0 + tl.arange(0, DEPTH).to(tl.int64)
        w = load_effective(
            weight, mask, frozen, signs, constant, K, mask_stride, signs_stride,
            n[:, None], k[None, :], (n < N)[:, None] & (k < K)[None, :], PACKED, FROZEN,
        )  # fmt: skip
        inside = (k < K)[:, None] & (b < B)[None, :]
        xt = tl.load(x + b[None, :] * K + k[:, None], mask=inside, other=0.0)
        sum = dot(w, xt, sum, PRECISION, WIDEN)
    if BIAS:
        sum += tl.load(bias + e * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = (e * B + b)[None, :] * N + n[:, None]
    inside = (n < N)[:, None] & (b < B)[None, :]
    tl.store(y + at, sum.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _dx(
    dy, weight, mask, frozen, signs, dx,
    B, N, K, first, networks, mask_stride, signs_stride,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    PACKED: tl.constexpr, FROZEN: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dx[b, k] = sum over n, and over `networks` that share x, of w[e, n, k] dy[e, b, n]."""
    output = tl.program_id(2).to(tl.int64)
    k = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(0).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for i in range(networks):
        e = output * networks + i
        constant = tl.load(frozen + e).to(tl.float32) if FROZEN == 2 else 0.0
        for n0 in range(0, N, DEPTH):
            n = n0 + tl.arange(0, DEPTH).to(tl.int64)
            w = load_effective(
                weight + e * N * K, mask + e * N * mask_stride,
                frozen + (e * N * K if FROZEN == 1 else 0), signs + e * N * signs_stride,
                constant, K, mask_stride, signs_stride,
                n[None, :], k[:, None], (k < K)[:, None] & (n < N)[None, :], PACKED, FROZEN,
            )  # fmt: skip
            inside = (n < N)[:, None] & (b < B)[None, :]
            dyt = tl.load(dy + (e * B + b)[None, :] * N + n[:, None], mask=inside, other=0.0)
            sum = dot(w, dyt, sum, PRECISION, WIDEN)
    at = (output * B + b)[None, :] * K + k[:, None]
    inside = (k < K)[:, None] & (b < B)[None, :]
    tl.store(dx + at, sum.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _dw(
    dy, x, mask, dw,
    B, N, K, x_network, mask_stride,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dw[e, n, k] = sum over b of dy[e, b, n] x[e, b, k] where kept, else 0."""
    e = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    x += e * x_network
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for b0 in range(0, B, DEPTH):
        b = b0 + tl.arange(0, DEPTH).to(tl.int64)
        inside = (n < N)[:, None] & (b < B)[None, :]
        dyt = tl.load(dy + (e * B + b)[None, :] * N + n[:, None], mask=inside, other=0.0)
        inside = (b < B)[:, None] & (k < K)[None, :]
        rows = tl.load(x + b[:, None] * K + k[None, :], mask=inside, other=0.0)
        sum = dot(dyt, rows, sum, PRECISION, WIDEN)
    inside = (n < N)[:, None] & (k < K)[None, :]
    rows, columns = n[:, None], k[None, :]
    kept = load_mask(mask + e * N * mask_stride, mask_stride, rows, columns, inside, PACKED)
    at = e * N * K + rows * K + columns
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
    _forward[_grid(batch, rows, networks)](
        x, weight, mask, _or(bias, x), _or(frozen, weight), _or(signs, mask), y,
        batch, rows, columns, 0 if x.dim() == 2 else batch * columns,
        mask.shape[-1], 0 if signs is None else signs.shape[-1],
        PACKED=mask.dtype == torch.int32, FROZEN=source(weight, frozen, signs),
        BIAS=bias is not None, **precision(x.dtype), **TILE,
    )  # fmt: skip
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
        outputs = 1 if shared else networks
        if dx.numel():
            _dx[_grid(batch, columns, outputs)](
                dy, weight, mask, _or(frozen, weight), _or(signs, mask), dx,
                batch, rows, columns, 0, networks // max(outputs, 1),
                mask.shape[-1], 0 if signs is None else signs.shape[-1],
                PACKED=packed, FROZEN=source(weight, frozen, signs), **precision(x.dtype), **TILE,
            )  # fmt: skip
    if need_dw:
        dw = torch.empty_like(weight)
        if dw.numel():
            _dw[_grid(columns, rows, networks)](
                dy, x, mask, dw, batch, rows, columns, 0 if shared else batch * columns,
                mask.shape[-1], PACKED=packed, **precision(x.dtype), **TILE,
            )  # fmt: skip
    return dx, dw


def _networks(weight: Tensor) -> int:
    return weight.shape[0] if weight.dim() == 3 else 1


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes a pointer for every argument, read or not."""
    return stand_in if tensor is None else tensor.contiguous()


def _grid(batch: int, rows: int, networks: int) -> tuple[int, int, int]:
    return triton.cdiv(batch, TILE["BATCH"]), triton.cdiv(rows, TILE["ROWS"]), networks
