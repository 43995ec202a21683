"""keep_top by radix: eight passes fix eight bits each of the boundary, its key and its tie word.

Each pass counts in integers, so the result does not depend on their order. What is left when key
and word are equal goes by position. Nothing comes back to the host until all is done.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.random.philox import philox
from lottery_sparse.ops.triton import limits

CHUNK = 2048  # entries
_CHUNKS = 8  # that a program counts
# The state, int64: key and word of the boundary as far as they are known; how many entries with
# them are missing; whether all with that key are kept; entries kept so far.
_KEY, _WORD, _MISSING, _ALL, _KEPT = range(5)
KEY_, WORD_, MISSING_, ALL_, KEPT_ = (tl.constexpr(i) for i in range(5))


@triton.jit
def load_keys(scores, mask, i, size):
    """(ordered key, growing with the score, -0.0 = 0.0; kept so far; kept and NaN)."""
    inside = i < size
    kept = tl.load(mask + i, mask=inside, other=0) != 0
    bits = tl.load(scores + i, mask=inside, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, 0, bits)
    # all bits of a negative number turn, of another one the sign: as int64, to compare
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    return key, kept, kept & (magnitude > 0x7F800000)


@triton.jit
def load_words(first, seed, stream, CHUNK: tl.constexpr):
    """The tie words of a chunk, in int64."""
    block = first // 4 + tl.arange(0, CHUNK // 4)
    c0, c1, c2, c3 = philox(
        block.to(tl.int64), seed.to(tl.int64), stream.to(tl.int64), seed.to(tl.int64) * 0
    )
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(words, (CHUNK,)).to(tl.int64)


@triton.jit(do_not_specialize=["seed", "stream"])
def _count(
    scores, mask, state, counts, bad, size, seed, stream,
    DOWN: tl.constexpr, TIES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """counts[d] += entries like the boundary so far, with d in the bits from DOWN on."""
    known, tied = tl.load(state + (WORD_ if TIES else KEY_)), tl.load(state + KEY_)
    if tl.load(state + ALL_) == 0:
        found = tl.zeros((256,), tl.int32)
        wrong = tl.zeros((CHUNK,), tl.int32)
        begin = tl.program_id(0).to(tl.int64) * CHUNKS * CHUNK
        for first in range(begin, tl.minimum(begin + CHUNKS * CHUNK, size), CHUNK):
            key, kept, nan = load_keys(scores, mask, first + tl.arange(0, CHUNK), size)
            wrong += nan.to(tl.int32)
            if TIES:
                kept = kept & (key == tied)
                key = load_words(first, seed, stream, CHUNK)
            if DOWN != 24:
                kept = kept & (key >> (DOWN + 8) == known)
            digit = ((key >> DOWN) & 255).to(tl.int32)
            found += tl.histogram(digit, 256, mask=kept)
        at = counts + tl.arange(0, 256)
        tl.atomic_add(at, found.to(tl.int64), mask=found != 0)
        if DOWN == 24 and not TIES:
            tl.atomic_add(bad, tl.sum(wrong, 0).to(tl.int64))


@triton.jit
def _narrow(state, counts, FIRST: tl.constexpr, TIES: tl.constexpr, LAST: tl.constexpr):
    """Fixes the next eight bits of the boundary, and clears the counts."""
    digit = tl.arange(0, 256)
    count, missing = tl.load(counts + digit), tl.load(state + MISSING_)
    tl.store(counts + digit, tl.zeros_like(count))
    if tl.load(state + ALL_) == 0:
        from_here = tl.cumsum(count, 0, reverse=True)
        here = tl.max(tl.where(from_here >= missing, digit, 0), 0)
        missing -= tl.sum(tl.where(digit > here, count, 0), 0)
        at = state + (WORD_ if TIES else KEY_)
        tl.store(at, tl.load(at) * 256 + here)
        tl.store(state + MISSING_, missing)
        if LAST and not TIES:
            tl.store(
                state + ALL_, (tl.sum(tl.where(digit == here, count, 0), 0) <= missing).to(tl.int64)
            )
        if FIRST:
            tl.store(state + KEPT_, tl.sum(count, 0))


@triton.jit(do_not_specialize=["seed", "stream"])
def _split(
    scores, mask, state, equal, out, size, seed, stream,
    WRITE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Counts the entries of a chunk that only position tells apart; with WRITE, keeps or not.

    `equal` is their number by chunk, or with WRITE of all before.
    """
    first = tl.program_id(0).to(tl.int64) * CHUNK
    i = first + tl.arange(0, CHUNK)
    key, kept, _ = load_keys(scores, mask, i, size)
    boundary, word, all = tl.load(state + KEY_), tl.load(state + WORD_), tl.load(state + ALL_)
    above, tied = kept & (key > boundary), kept & (key == boundary)
    last = tied & (all != 0)
    if (all == 0) & (tl.max(tied.to(tl.int32), 0) != 0):
        words = load_words(first, seed, stream, CHUNK)
        above = above | (tied & (words > word))
        last = tied & (words == word)
    if WRITE:
        place = tl.load(equal + tl.program_id(0)) + tl.cumsum(last.to(tl.int32), 0)
        above = above | (last & ((all != 0) | (place <= tl.load(state + MISSING_))))
        tl.store(out + i, above.to(tl.uint8), mask=i < size)
    else:
        tl.store(equal + tl.program_id(0), tl.sum(last.to(tl.int32), 0))


def why_not(scores: list[Tensor], *rest: Any) -> str | None:
    return limits.why_not_dtypes(*scores)


@dispatch.limited(why_not)
def keep_top(
    scores: list[Tensor], masks: list[Tensor], count: int, seed: int, streams: list[int]
) -> list[Tensor]:
    """Masks of the `count` kept entries scored highest over all tensors together."""
    scores, kept = [s.contiguous() for s in scores], [_bytes(m) for m in masks]
    out = [torch.empty_like(m, memory_format=torch.contiguous_format) for m in masks]
    each = list(zip(scores, kept, streams, strict=True))
    device = scores[0].device
    state, counts, bad = (
        torch.zeros(n, dtype=torch.int64, device=device) for n in (5, 256, len(scores))
    )
    state[_MISSING].fill_(count)
    chunks = [triton.cdiv(s.numel(), CHUNK) for s in scores]
    with torch.cuda.device_of(scores[0]):
        for ties in (False, True):
            for down in (24, 16, 8, 0):
                for i, (score, mask, stream) in enumerate(each):
                    if score.numel():
                        _count[(triton.cdiv(chunks[i], _CHUNKS),)](
                            score, mask, state, counts, bad[i:], score.numel(), seed, stream,
                            DOWN=down, TIES=ties, CHUNK=CHUNK, CHUNKS=_CHUNKS,
                        )  # fmt: skip
                _narrow[(1,)](
                    state, counts, FIRST=down == 24 and not ties, TIES=ties, LAST=down == 0
                )
        equal = torch.zeros(sum(chunks) + 1, dtype=torch.int64, device=device)
        for write in (False, True):
            first = 0
            for i, (score, mask, stream) in enumerate(each):
                if score.numel():
                    _split[(chunks[i],)](
                        score, mask, state, equal[first:], out[i].view(torch.uint8),
                        score.numel(), seed, stream, WRITE=write, CHUNK=CHUNK,
                    )  # fmt: skip
                first += chunks[i]
            equal = equal.cumsum(0) - equal
    _raise(torch.cat([state[_KEPT:], bad]).tolist(), count)
    return out


def _raise(found: list[int], count: int) -> None:
    for i, wrong in enumerate(found[1:]):
        if wrong:
            raise ValueError(f"scores[{i}] holds NaN at {wrong} kept entries.")
    if count > found[0]:
        raise ValueError(f"count is {count}, but only {found[0]} entries are kept so far.")


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)
