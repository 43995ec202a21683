"""Learned masks: products under drawn bits, and dscore straight out of dyᵀ x.

As in masked_linear the weight is the first operand of its products. Signs enter them as 1, -1 and
0, exact in every dtype; constants and the rescaling factor multiply the sums.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.kernels.masked_linear import dw_tile
from lottery_sparse.kernels.sampling import one_and_exp
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
    spread,
    spread_down,
    tile,
)

# Tiles of dscore: bytes rule, so several programs share a multiprocessor.
_GRADIENT = {
    "half": {"ROWS": 128, "BATCH": 64, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
    "tf32": {"ROWS": 128, "BATCH": 64, "DEPTH": 32, "num_warps": 8, "num_stages": 3},
    "ieee": {"ROWS": 64, "BATCH": 64, "DEPTH": 32, "num_warps": 8, "num_stages": 3},
}


# ---- products ------------------------------------------------------------------------------------


@triton.jit
def _masked(
    weight, bits, signs, shift, row, K, stride, inside,
    COLUMNS: tl.constexpr, SIGNS: tl.constexpr, EDGE: tl.constexpr, DOWN: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """w m as `load_tile` loads it; with SIGNS, w is 1 or -1."""
    if SIGNS:
        word = tl.arange(0, COLUMNS // 32)
        if DOWN:
            at = (row * stride)[None, :] + word[:, None]
            kept = spread_down(tl.load(bits + at), shift)
            plus = spread_down(tl.load(signs + at), shift)
        else:
            at = (row * stride)[:, None] + word[None, :]
            kept = spread(tl.load(bits + at), shift)
            plus = spread(tl.load(signs + at), shift)
        if EDGE:
            kept = kept & inside
        return tl.where(kept, tl.where(plus, 1.0, -1.0), 0.0).to(DTYPE)
    return load_tile(
        weight, bits, weight, bits, tl.zeros((1, 1), tl.float32), shift, row, K, stride, stride,
        inside, COLUMNS, True, 0, EDGE, DOWN,
    )  # fmt: skip


@triton.jit
def scale_of(weight, kept, e, size, SIGNS: tl.constexpr, RESCALE: tl.constexpr):
    """What the sums of network e are multiplied by: its constant, times r."""
    scale = 1.0
    if SIGNS:
        scale = tl.load(weight + e).to(tl.float32)
    if RESCALE:
        scale = scale * (size / tl.maximum(tl.load(kept + e), 1).to(tl.float32))
    return scale


@triton.jit(do_not_specialize=["B", "steps"])
def _forward(
    x, weight, bits, kept, bias, signs, shift, y,
    B, N, K, x_network, stride, size, steps, part,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    SIGNS: tl.constexpr, RESCALE: tl.constexpr, BIAS: tl.constexpr, EDGE: tl.constexpr,
    N_BY: tl.constexpr, K_BY: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y[e, b, n] = scale[e] sum over k of (w m)[e, n, k] x[e, b, k], + bias[e, n]."""
    N, K = aligned(N, N_BY), aligned(K, K_BY)
    row_tile, batch_tile = in_order(N, B, ROWS, BATCH)
    n0, b0 = row_tile * ROWS, batch_tile * BATCH
    e = tl.program_id(2).to(tl.int64)
    s = tl.program_id(1)
    n, b = tl.arange(0, ROWS), tl.arange(0, BATCH)
    row, batch_row = tl.minimum(n, N - 1 - n0), tl.minimum(b, B - 1 - b0)
    scale = scale_of(weight, kept, e, size, SIGNS, RESCALE)
    weight += 0 if SIGNS else (e * N + n0) * K
    bits += (e * N + n0) * stride
    signs += (e * N + n0) * stride
    x += e * x_network + b0.to(tl.int64) * K
    shift = tl.load(shift + tl.arange(0, 32))
    k = tl.arange(0, DEPTH)
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for k0 in range(s * steps * DEPTH, tl.minimum((s + 1) * steps * DEPTH, K), DEPTH):
        w = _masked(
            weight + (0 if SIGNS else k0), bits + (k0 >> 5), signs + (k0 >> 5), shift, row, K,
            stride, (row >= 0)[:, None] & (k < K - k0)[None, :], DEPTH, SIGNS, EDGE, False,
            x.dtype.element_ty,
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
def _dx(
    dy, x, weight, bits, kept, signs, shift, dx, products,
    B, N, K, x_network, stride, size, steps, part,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    SIGNS: tl.constexpr, RESCALE: tl.constexpr, EDGE: tl.constexpr,
    STORE: tl.constexpr, PRODUCTS: tl.constexpr,
    N_BY: tl.constexpr, K_BY: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dx[e, b, k] = scale[e] sum over n of (w m)[e, n, k] dy[e, b, n].

    PRODUCTS: products[e, program] are the parts of ⟨x, dy (w m)⟩ = ⟨dyᵀ x, w m⟩, which is what
    the rescaling factor has a gradient by.
    """
    N, K = aligned(N, N_BY), aligned(K, K_BY)
    row_tile, batch_tile = in_order(K, B, ROWS, BATCH)
    k0, b0 = row_tile * ROWS, batch_tile * BATCH
    e = tl.program_id(2).to(tl.int64)
    s = tl.program_id(1)
    k, b = tl.arange(0, ROWS), tl.arange(0, BATCH)
    batch_row = tl.minimum(b, B - 1 - b0)
    shift = tl.load(shift + tl.arange(0, 32))
    d = tl.arange(0, DEPTH)
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for n0 in range(s * steps * DEPTH, tl.minimum((s + 1) * steps * DEPTH, N), DEPTH):
        row = tl.minimum(d, N - 1 - n0) if EDGE else d
        first = e * N + n0
        w = _masked(
            weight + (0 if SIGNS else first * K + k0), bits + (first * stride + (k0 >> 5)),
            signs + (first * stride + (k0 >> 5)), shift, row, K, stride,
            (k < K - k0)[:, None] & (d < N - n0)[None, :], ROWS, SIGNS, EDGE, True,
            dy.dtype.element_ty,
        )  # fmt: skip
        at = dy + (e * B + b0) * N + n0 + (batch_row * N)[None, :] + d[:, None]
        dyt = tl.load(at, mask=(d < N - n0)[:, None], other=0.0) if EDGE else tl.load(at)
        sum = dot(w, dyt, sum, PRECISION, WIDEN)
    inside = (k < K - k0)[:, None] & (b < B - b0)[None, :]
    at = k[:, None] + (b * K)[None, :]
    if PRODUCTS:
        x += e * x_network + b0.to(tl.int64) * K + k0
        own = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        programs = tl.num_programs(0) * tl.num_programs(1)
        to = products + e * programs + s * tl.num_programs(0) + tl.program_id(0)
        tl.store(to, tl.sum(tl.sum(own * sum, 1), 0))
    if STORE:
        sum *= scale_of(weight, kept, e, size, SIGNS, RESCALE)
        dx += s * part + (e * B + b0) * K + k0
        tl.store(dx + at, sum.to(dx.dtype.element_ty), mask=inside)


# ---- gradients of the network --------------------------------------------------------------------


@triton.jit
def through_r(products, kept, e, count, RESCALE: tl.constexpr):
    """⟨dyᵀ x, w m⟩ / ones of network e, its parts added in order; 0 without rescaling."""
    if RESCALE:
        sum = tl.zeros((256,), tl.float32)
        for first in range(0, count, 256):
            i = first + tl.arange(0, 256)
            sum += tl.load(products + e * count + i, mask=i < count, other=0.0)
        return tl.sum(sum, 0) / tl.maximum(tl.load(kept + e), 1).to(tl.float32)
    return 0.0


@triton.jit
def gradient_of_score(dm, score):
    """dm p (1 − p)"""
    p = 1.0 / one_and_exp(score)
    return dm * p * (1.0 - p)


@triton.jit(do_not_specialize=["B", "count"])
def _dscore(
    dy, x, score, weight, bits, kept, signs, shift, products, dw, dscore,
    B, N, K, x_network, stride, size, count,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    SIGNS: tl.constexpr, RESCALE: tl.constexpr, DW: tl.constexpr, DSCORE: tl.constexpr,
    EDGE: tl.constexpr,
    N_BY: tl.constexpr, K_BY: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """From d = dyᵀ x: dw = scale d where kept, else 0; dscore = scale (d w − through r) p (1 − p).

    Nothing else of the size of the weight is written. BATCH: columns, those of the product.
    """
    N, K = aligned(N, N_BY), aligned(K, K_BY)
    row_tile, column_tile = in_order(N, K, ROWS, BATCH)
    n0, k0 = row_tile * ROWS, column_tile * BATCH
    e = tl.program_id(2).to(tl.int64)
    sum = dw_tile(
        dy + e * B * N, x + e * x_network, B, N, K, n0, k0, tl.zeros((), tl.int32), B,
        ROWS, BATCH, DEPTH, EDGE, PRECISION, WIDEN,
    )  # fmt: skip
    sum *= scale_of(weight, kept, e, size, SIGNS, RESCALE)
    n, k = tl.arange(0, ROWS), tl.arange(0, BATCH)
    at = (n * K)[:, None] + k[None, :]
    inside = (n < N - n0)[:, None] & (k < K - k0)[None, :]
    first = (e * N + n0) * K + k0
    word = tl.arange(0, BATCH // 32)
    listed = (n < N - n0)[:, None] & (word < stride - (k0 >> 5))[None, :]
    first_word = (e * N + n0) * stride + (k0 >> 5)
    at_word = (n * stride)[:, None] + word[None, :]
    shift = tl.load(shift + tl.arange(0, 32))
    if DW:
        mask = spread(tl.load(bits + first_word + at_word, mask=listed, other=0), shift)
        value = tl.where(mask, sum, 0.0).to(dw.dtype.element_ty)
        tl.store(dw + first + at, value, mask=inside)
    if DSCORE:
        if SIGNS:
            plus = spread(tl.load(signs + first_word + at_word, mask=listed, other=0), shift)
            dm = tl.where(plus, sum, -sum)
        else:
            dm = sum * tl.load(weight + first + at, mask=inside, other=0.0).to(tl.float32)
        if RESCALE:
            scale = scale_of(weight, kept, e, size, SIGNS, RESCALE)
            dm -= scale * through_r(products, kept, e, count, RESCALE)
        s = tl.load(score + first + at, mask=inside, other=0.0)
        value = gradient_of_score(dm, s).to(dscore.dtype.element_ty)
        tl.store(dscore + first + at, value, mask=inside)


# ---- launches ------------------------------------------------------------------------------------


def supermask_linear(
    x: Tensor,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    signs: Tensor | None,
) -> Tensor:
    x, weight, bits = x.contiguous(), weight.contiguous(), bits.contiguous()
    networks, (rows, columns), batch = _networks(score), score.shape[-2:], x.shape[-2]
    y = x.new_empty((*score.shape[:-2], batch, rows))
    if y.numel() == 0:
        return y
    shape = tile(x.dtype, batch)
    parts = Parts.of(rows, batch, triton.cdiv(columns, shape["DEPTH"]), networks, shape)
    out = parts.workspace(y)
    with torch.cuda.device_of(x):
        _forward[parts.grid](
            x, weight, bits, or_(kept, bits), or_(bias, x), or_(signs, bits), shifts(x.device),
            out, batch, rows, columns, 0 if x.dim() == 2 else batch * columns, bits.shape[-1],
            float(rows * columns), parts.steps, y.numel(),
            SIGNS=signs is not None, RESCALE=kept is not None, BIAS=bias is not None and out is y,
            EDGE=columns % shape["DEPTH"] != 0, **alignment(rows, columns),
            **precision(x.dtype), **shape,
        )  # fmt: skip
        if out is not y:
            finish(out, bias, y)
    return y


def supermask_linear_backward(
    dy: Tensor,
    x: Tensor,
    score: Tensor,
    weight: Tensor,
    bits: Tensor,
    kept: Tensor | None,
    signs: Tensor | None,
    need_dx: bool,
    need_dw: bool,
    need_dscore: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, score, weight, bits = (t.contiguous() for t in (dy, x, score, weight, bits))
    networks, (rows, columns), batch = _networks(score), score.shape[-2:], x.shape[-2]
    shared, size = x.dim() == 2, float(rows * columns)
    x_network, stride = 0 if shared else batch * columns, bits.shape[-1]
    network = weight, bits, or_(kept, bits), or_(signs, bits), shifts(x.device)
    options = {"SIGNS": signs is not None, "RESCALE": kept is not None}
    options |= alignment(rows, columns) | precision(x.dtype)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    products = x.new_zeros((networks, 0), dtype=torch.float32)
    through_r = need_dscore and kept is not None and score.numel() > 0
    if dx.numel() or through_r:
        shape = tile(x.dtype, batch)
        parts = Parts.of(columns, batch, triton.cdiv(rows, shape["DEPTH"]), networks, shape)
        programs = parts.grid[0] * parts.grid[1]
        products = products.new_empty((networks, programs if through_r else 0))
        alone = parts.grid[1] == 1 and (networks == 1 or not shared)
        count = parts.grid[1] * (networks if shared else 1)
        out = dx if alone or not need_dx else products.new_empty((count, *x.shape))
        with torch.cuda.device_of(x):
            _dx[parts.grid](
                dy, x, *network, out, products, batch, rows, columns, x_network, stride, size,
                parts.steps, networks * batch * columns, STORE=need_dx, PRODUCTS=through_r,
                EDGE=rows % shape["DEPTH"] != 0 or columns % shape["ROWS"] != 0,
                **options, **shape,
            )  # fmt: skip
            if out is not dx:
                finish(out, None, dx)
    dw = torch.empty_like(score, dtype=x.dtype) if need_dw else weight.new_empty(0)
    dscore = torch.empty_like(score) if need_dscore else score.new_empty(0)
    if dw.numel() or dscore.numel():
        shape = _GRADIENT[options["PRECISION"] if x.dtype == torch.float32 else "half"]
        across, down = triton.cdiv(columns, shape["BATCH"]), triton.cdiv(rows, shape["ROWS"])
        ragged = rows % shape["ROWS"] or columns % shape["BATCH"] or batch % shape["DEPTH"]
        with torch.cuda.device_of(x):
            _dscore[across * down, 1, networks](
                dy, x, score, *network, products, dw, dscore, batch, rows, columns,
                x_network, stride, size, products.shape[1], DW=need_dw, DSCORE=need_dscore,
                EDGE=bool(ragged), **options, **shape,
            )  # fmt: skip
    return dx, dw, dscore


def _networks(score: Tensor) -> int:
    return score.shape[0] if score.dim() == 3 else 1


def or_(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes a pointer for every argument, read or not."""
    return stand_in if tensor is None else tensor.contiguous()
