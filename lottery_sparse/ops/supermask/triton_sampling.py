"""Drawing learned masks: scores in, packed bits and their number of ones out, in one pass."""
# pyright: reportArgumentType=false, reportOperatorIssue=false
# ... since a launch takes plain numbers for constexpr, and tl.max is annotated as two numbers

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.random.philox import philox, pick
from lottery_sparse.ops.triton import limits

WHOLE = {"ROWS": 16, "num_warps": 4}  # rows that are whole blocks of four weights
RAGGED = {"ROWS": 8, "num_warps": 4}


@triton.jit
def one_and_exp(s):
    """1 + exp(-s), finite; for a NaN as for a very low score."""
    return 1.0 + tl.exp(tl.minimum(-s.to(tl.float32), 88.0))


@triton.jit
def _above(draw, score):
    """draw − floor(sigmoid(score) 2^24) for a draw of 24 bits, up to ±6 (the errors of ex2.approx,
    of the quotient and of three roundings); negative: kept."""
    return draw.to(tl.int32) - (16777216.0 / one_and_exp(score)).to(tl.int32)


@triton.jit
def _exactly_above(draw, score):
    """The same without error, in float64; a NaN keeps nothing."""
    s = score.to(tl.float32).to(tl.float64)
    limit = 16777216.0 / (1.0 + tl.exp(tl.minimum(-s, 700.0)))
    return draw.to(tl.int32) - limit.to(tl.int32)


@triton.jit
def _doubtful(above):
    """1 where `_above` may have the wrong sign."""
    return ((above + 8).to(tl.uint32) <= 16).to(tl.int32)


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
    scores = tl.load(score + (first[:, None] + lane[None, :]), mask=held, other=-float("inf"))
    if ALIGNED:
        quad = tl.arange(0, 8)
        c0, c1, c2, c3 = philox((first >> 2)[:, None] + quad[None, :], seed, stream, step)
        c0, c1, c2, c3 = c0 >> 8, c1 >> 8, c2 >> 8, c3 >> 8
        even, odd = tl.split(tl.reshape(scores, (WORDS, 8, 2, 2)))
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        d0, d1, d2, d3 = _above(c0, s0), _above(c1, s1), _above(c2, s2), _above(c3, s3)
        doubt = _doubtful(d0) | _doubtful(d1) | _doubtful(d2) | _doubtful(d3)
        if tl.max(tl.max(doubt, 1), 0) > 0:  # one program in several hundred
            d0, d1 = _exactly_above(c0, s0), _exactly_above(c1, s1)
            d2, d3 = _exactly_above(c2, s2), _exactly_above(c3, s3)
        b0, b1 = (d0 < 0).to(tl.int32), (d1 < 0).to(tl.int32)
        b2, b3 = (d2 < 0).to(tl.int32), (d3 < 0).to(tl.int32)
        nibble = b0 | (b1 << 1) | (b2 << 2) | (b3 << 3)
        held_bits = tl.sum(nibble << (4 * quad)[None, :], 1)
        ones = tl.sum(tl.sum(b0 + b1 + b2 + b3, 1), 0)
    else:
        index = first[:, None] + lane[None, :]
        c0, c1, c2, c3 = philox(index >> 2, seed, stream, step)
        draw = pick(c0, c1, c2, c3, index & 3) >> 8
        d = _above(draw, scores)
        if tl.max(tl.max(_doubtful(d), 1), 0) > 0:
            d = _exactly_above(draw, scores)
        bit = (d < 0).to(tl.int32)
        held_bits = tl.sum(bit << lane[None, :], 1)
        ones = tl.sum(tl.sum(bit, 1), 0)
    at = (e * N + row) * (4 * chunks) + word
    tl.store(bits + at, held_bits, mask=inside)
    tl.atomic_add(kept + e, ones.to(tl.int64))  # integers: any order gives the same sum


def why_not(score: Tensor, key: Tensor) -> str | None:
    networks = score.shape[0] if score.dim() > 2 else 1
    return limits.why_not((score, key), networks=networks, longest=score.shape[-1])


@dispatch.limited(why_not)
def sample_bits(score: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    score, key = score.contiguous(), key.contiguous()
    (rows, columns), networks = score.shape[-2:], score.shape[0] if score.dim() == 3 else 1
    chunks, whole = triton.cdiv(columns, 128), columns % 4 == 0
    bits = score.new_empty((*score.shape[:-1], 4 * chunks), dtype=torch.int32)
    kept = score.new_zeros(score.shape[:-2], dtype=torch.int64)
    if bits.numel():
        shape = WHOLE if whole else RAGGED
        with torch.cuda.device_of(score):
            _sample[triton.cdiv(rows, shape["ROWS"]) * chunks, networks](
                score, key, bits, kept, rows, columns, chunks, ALIGNED=whole, **shape
            )
    return bits, kept
