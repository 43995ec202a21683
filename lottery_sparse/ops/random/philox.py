"""Philox4x32-10 in Triton: the words of `ls.random`, bit for bit (csrc/common/philox.h)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(block, seed, stream, step):
    """The four uint32 words of each block (int64), for int64 numbers seed, stream and step."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + stream.to(tl.uint32), tl.zeros_like(c0) + step.to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def pick(c0, c1, c2, c3, lane):
    """Word `lane` of four."""
    return tl.where(lane < 2, tl.where(lane == 0, c0, c1), tl.where(lane == 2, c2, c3))
