"""Learned masks: drawing the bits, products under them, and dscore straight out of dyᵀ x.

As in masked_linear the weight is the first operand of every product. A sign x constant enters it as
1, -1 and 0, exact in every dtype; constants and the rescaling factor are applied to the sums.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.kernels.philox import philox, pick
from lottery_sparse.kernels.tiles import dot, precision

# The same for every shape and card until one has measured more.
TILE = {"ROWS": 128, "BATCH": 64, "DEPTH": 64, "num_warps": 4, "num_stages": 3}
GRADIENT = {"ROWS": 128, "COLUMNS": 64, "DEPTH": 64, "num_warps": 4, "num_stages": 3}
SAMPLE = {"ROWS": 32, "num_warps": 4}
SAMPLE_RAGGED = {"ROWS": 8, "num_warps": 4}


# ---- drawing -------------------------------------------------------------------------------------


@triton.jit
def _one_and_exp(s):
    """1 + exp(-s), finite; for a NaN as for a very low score."""
    return 1.0 + tl.exp(tl.minimum(-s.to(tl.float32), 88.0))


@triton.jit
def _threshold(score):
    """floor(sigmoid(score) 2^24); a NaN gives 0."""
    return (16777216.0 / _one_and_exp(score)).to(tl.uint32)


@triton.jit
def _sample(
    score, key, bits, kept,
    N, K, chunks,
    ROWS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Bits of ROWS rows in a chunk of 128 columns, and their ones added to kept.

    ALIGNED: a row is a whole number of blocks, so four columns share one.
    """
    WORDS: tl.constexpr = 4 * ROWS
    e = tl.program_id(1).to(tl.int64)
    seed, stream, step = tl.load(key + 3 * e), tl.load(key + 3 * e + 1), tl.load(key + 3 * e + 2)
    chunk = tl.program_id(0) % chunks
    i = tl.arange(0, WORDS)
    row = (tl.program_id(0) // chunks) * ROWS + i // 4
    word = 4 * chunk + i % 4
    inside, column = row < N, 32 * word
    first = row.to(tl.int64) * K + column
    lane = tl.arange(0, 32)
    score += e * N * K
    if ALIGNED:
        first = tl.multiple_of(first, 4)
    held = inside[:, None] & (column[:, None] + lane[None, :] < K)
    limit = _threshold(tl.load(score + (first[:, None] + lane[None, :]), mask=held, other=0.0))
    limit = tl.where(held, limit, 0)
    if ALIGNED:
        quad = tl.arange(0, 8)
        c0, c1, c2, c3 = philox((first >> 2)[:, None] + quad[None, :], seed, stream, step)
        even, odd = tl.split(tl.reshape(limit, (WORDS, 8, 2, 2)))
        limit0, limit2 = tl.split(even)
        limit1, limit3 = tl.split(odd)
        b0, b1 = ((c0 >> 8) < limit0).to(tl.int32), ((c1 >> 8) < limit1).to(tl.int32)
        b2, b3 = ((c2 >> 8) < limit2).to(tl.int32), ((c3 >> 8) < limit3).to(tl.int32)
        nibble = b0 | (b1 << 1) | (b2 << 2) | (b3 << 3)
        held_bits = tl.sum(nibble << (4 * quad)[None, :], 1)
        ones = tl.sum(tl.sum(b0 + b1 + b2 + b3, 1), 0)
    else:
        index = first[:, None] + lane[None, :]
        c0, c1, c2, c3 = philox(index >> 2, seed, stream, step)
        bit = ((pick(c0, c1, c2, c3, index & 3) >> 8) < limit).to(tl.int32)
        held_bits = tl.sum(bit << lane[None, :], 1)
        ones = tl.sum(tl.sum(bit, 1), 0)
    at = (e * N + row) * (4 * chunks) + word
    tl.store(bits + at, held_bits, mask=inside)
    tl.atomic_add(kept + e, ones.to(tl.int64))  # integers: any order gives the same sum


# ---- products ------------------------------------------------------------------------------------


@triton.jit
def _spread(words, rows, first, stride, inside, COLUMNS: tl.constexpr):
    """Bits first ... first + COLUMNS of packed rows, as bool [R, COLUMNS]."""
    word = (first >> 5) + tl.arange(0, COLUMNS // 32)
    at = rows[:, None] * stride + word[None, :]
    held = tl.load(words + at, mask=inside[:, None] & (word < stride)[None, :], other=0)
    spread = (held[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(spread, (rows.shape[0], COLUMNS)) != 0


@triton.jit
def _masked(
    weight, bits, signs, rows, first, K, stride, inside,
    COLUMNS: tl.constexpr, SIGNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """w m at rows × COLUMNS columns from `first`; signs stand for 1 and -1. 0 outside."""
    kept = _spread(bits, rows, first, stride, inside, COLUMNS)
    if SIGNS:
        plus = _spread(signs, rows, first, stride, inside, COLUMNS)
        return tl.where(kept, tl.where(plus, 1.0, -1.0), 0.0).to(DTYPE)
    columns = first + tl.arange(0, COLUMNS)
    at = rows[:, None] * K + columns[None, :]
    held = inside[:, None] & (columns < K)[None, :]
    return tl.where(kept, tl.load(weight + at, mask=held, other=0.0), 0.0)


@triton.jit
def _scale(weight, kept, e, size, SIGNS: tl.constexpr, RESCALE: tl.constexpr):
    """What the sums of network e are multiplied by: its constant, times r."""
    scale = 1.0
    if SIGNS:
        scale = tl.load(weight + e).to(tl.float32)
    if RESCALE:
        scale = scale * (size / tl.maximum(tl.load(kept + e), 1).to(tl.float32))
    return scale


@triton.jit
def _forward(
    x, weight, bits, kept, bias, signs, y,
    B, N, K, x_network, stride, size,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    SIGNS: tl.constexpr, RESCALE: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y[e, b, n] = scale[e] sum over k of (w m)[e, n, k] x[e, b, k], + bias[e, n]."""
    e = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(0).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    scale = _scale(weight, kept, e, size, SIGNS, RESCALE)
    weight += 0 if SIGNS else e * N * K
    bits += e * N * stride
    signs += e * N * stride
    x += e * x_network
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for k0 in range(0, K, DEPTH):
        w = _masked(weight, bits, signs, n, k0, K, stride, n < N, DEPTH, SIGNS, x.dtype.element_ty)
        k = k0 + tl.arange(0, DEPTH)
        inside = (k < K)[:, None] & (b < B)[None, :]
        xt = tl.load(x + b[None, :] * K + k[:, None], mask=inside, other=0.0)
        sum = dot(w, xt, sum, PRECISION, WIDEN)
    sum *= scale
    if BIAS:
        sum += tl.load(bias + e * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = (e * B + b)[None, :] * N + n[:, None]
    inside = (n < N)[:, None] & (b < B)[None, :]
    tl.store(y + at, sum.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _dx(
    dy, x, weight, bits, kept, signs, dx, parts,
    B, N, K, networks, stride, size,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    SIGNS: tl.constexpr, RESCALE: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dx[b, k] = sum over n, and over `networks` that share x, of scale (w m)[n, k] dy[b, n].

    With RESCALE also parts[e, program] of ⟨dyᵀ x, w m⟩ = ⟨x, dy (w m)⟩, what r has a gradient by.
    """
    output = tl.program_id(2).to(tl.int64)
    k0 = tl.program_id(1) * ROWS
    k = k0 + tl.arange(0, ROWS)
    b = tl.program_id(0).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    inside = (k < K)[:, None] & (b < B)[None, :]
    at = (output * B + b)[None, :] * K + k[:, None]
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for i in range(networks):
        e = output * networks + i
        sum = tl.zeros((ROWS, BATCH), tl.float32)
        for n0 in range(0, N, DEPTH):
            n = n0 + tl.arange(0, DEPTH).to(tl.int64)
            w = _masked(
                weight if SIGNS else weight + e * N * K, bits + e * N * stride,
                signs + e * N * stride, n, k0, K, stride, n < N, ROWS, SIGNS, dy.dtype.element_ty,
            )  # fmt: skip
            held = (n < N)[:, None] & (b < B)[None, :]
            dyt = tl.load(dy + (e * B + b)[None, :] * N + n[:, None], mask=held, other=0.0)
            sum = dot(tl.trans(w), dyt, sum, PRECISION, WIDEN)
        if RESCALE:
            own = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            count = tl.num_programs(0) * tl.num_programs(1)
            tl.store(parts + e * count + part, tl.sum(tl.sum(own * sum, 1), 0))
        scale = _scale(weight, kept, e, size, SIGNS, RESCALE)
        if SHARED:
            total += scale * sum
        else:
            total = scale * sum
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)


# ---- gradients of the network --------------------------------------------------------------------


@triton.jit
def _through_r(parts, kept, e, count, RESCALE: tl.constexpr):
    """⟨dyᵀ x, w m⟩ / ones of network e, its parts added in order; 0 without rescaling."""
    if RESCALE:
        sum = tl.zeros((256,), tl.float32)
        for first in range(0, count, 256):
            i = first + tl.arange(0, 256)
            sum += tl.load(parts + e * count + i, mask=i < count, other=0.0)
        return tl.sum(sum, 0) / tl.maximum(tl.load(kept + e), 1).to(tl.float32)
    return 0.0


@triton.jit
def _dscore(
    dy, x, score, weight, bits, kept, signs, parts, dw, dscore,
    B, N, K, x_network, stride, size, count,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    SIGNS: tl.constexpr, RESCALE: tl.constexpr, DW: tl.constexpr, DSCORE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """From d = dyᵀ x: dw = scale d where kept, else 0; dscore = scale (d w − through r) p (1 − p).

    Nothing else of the size of the weight is written.
    """
    e = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k0 = tl.program_id(0) * COLUMNS
    k = k0 + tl.arange(0, COLUMNS)
    x += e * x_network
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for b0 in range(0, B, DEPTH):
        b = b0 + tl.arange(0, DEPTH).to(tl.int64)
        held = (n < N)[:, None] & (b < B)[None, :]
        dyt = tl.load(dy + (e * B + b)[None, :] * N + n[:, None], mask=held, other=0.0)
        held = (b < B)[:, None] & (k < K)[None, :]
        rows = tl.load(x + b[:, None] * K + k[None, :], mask=held, other=0.0)
        sum = dot(dyt, rows, sum, PRECISION, WIDEN)
    scale = _scale(weight, kept, e, size, SIGNS, RESCALE)
    inside = (n < N)[:, None] & (k < K)[None, :]
    at = e * N * K + n[:, None] * K + k[None, :]
    if DW:
        mask = _spread(bits + e * N * stride, n, k0, stride, n < N, COLUMNS)
        value = tl.where(mask, scale * sum, 0.0)
        tl.store(dw + at, value.to(dw.dtype.element_ty), mask=inside)
    if DSCORE:
        if SIGNS:
            plus = _spread(signs + e * N * stride, n, k0, stride, n < N, COLUMNS)
            dm = tl.where(plus, sum, -sum)
        else:
            dm = sum * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        dm = scale * (dm - _through_r(parts, kept, e, count, RESCALE))
        p = 1.0 / _one_and_exp(tl.load(score + at, mask=inside, other=0.0))
        tl.store(dscore + at, (dm * p * (1.0 - p)).to(dscore.dtype.element_ty), mask=inside)


# ---- launches ------------------------------------------------------------------------------------


def sample_bits(score: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    score, key = score.contiguous(), key.contiguous()
    (rows, columns), networks = score.shape[-2:], _networks(score)
    chunks, aligned = triton.cdiv(columns, 128), columns % 4 == 0
    bits = score.new_empty((*score.shape[:-1], 4 * chunks), dtype=torch.int32)
    kept = score.new_zeros(score.shape[:-2], dtype=torch.int64)
    if bits.numel():
        tile = SAMPLE if aligned else SAMPLE_RAGGED
        _sample[triton.cdiv(rows, tile["ROWS"]) * chunks, networks](
            score, key, bits, kept, rows, columns, chunks, ALIGNED=aligned, **tile
        )
    return bits, kept


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
    grid = triton.cdiv(batch, TILE["BATCH"]), triton.cdiv(rows, TILE["ROWS"]), networks
    _forward[grid](
        x, weight, bits, _or(kept, bits), _or(bias, x), _or(signs, bits), y,
        batch, rows, columns, 0 if x.dim() == 2 else batch * columns, bits.shape[-1],
        float(rows * columns), SIGNS=signs is not None, RESCALE=kept is not None,
        BIAS=bias is not None, **precision(x.dtype), **TILE,
    )  # fmt: skip
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
    options = {"SIGNS": signs is not None, "RESCALE": kept is not None, **precision(x.dtype)}
    network = weight, bits, _or(kept, bits), _or(signs, bits)
    dx, dw, dscore = x.new_empty(0), weight.new_empty(0), score.new_empty(0)
    outputs = 1 if shared else networks
    grid = triton.cdiv(batch, TILE["BATCH"]), triton.cdiv(columns, TILE["ROWS"]), outputs
    parts = x.new_empty((networks, grid[0] * grid[1]), dtype=torch.float32)
    through_r = need_dscore and kept is not None  # its sum comes with dx
    if need_dx or through_r:
        dx = torch.empty_like(x)
        if dx.numel():
            _dx[grid](
                dy, x, *network, dx, parts, batch, rows, columns, networks // max(outputs, 1),
                bits.shape[-1], size, SHARED=shared, **options, **TILE,
            )  # fmt: skip
    if need_dw or need_dscore:
        dw = torch.empty_like(score, dtype=x.dtype) if need_dw else dw
        dscore = torch.empty_like(score) if need_dscore else dscore
        if score.numel():
            across, down = GRADIENT["COLUMNS"], GRADIENT["ROWS"]
            _dscore[triton.cdiv(columns, across), triton.cdiv(rows, down), networks](
                dy, x, score, *network, parts, dw, dscore, batch, rows, columns,
                0 if shared else batch * columns, bits.shape[-1], size, parts.shape[1],
                DW=need_dw, DSCORE=need_dscore, **options, **GRADIENT,
            )  # fmt: skip
    return dx if need_dx else x.new_empty(0), dw, dscore


def _networks(score: Tensor) -> int:
    return score.shape[0] if score.dim() == 3 else 1


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes a pointer for every argument, read or not."""
    return stand_in if tensor is None else tensor.contiguous()
