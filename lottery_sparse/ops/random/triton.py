"""random_words, random_signs, random_uniform and random_normal: the bits of `reference`."""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops.random.philox import philox

WORDS_, SIGNS_, UNIFORM_, NORMAL_ = (tl.constexpr(law) for law in range(4))
_PER_WORD = 1, 32, 1, 2  # elements of a law that a word gives


@triton.jit(do_not_specialize=["seed", "stream", "step"])
def _draw(
    out, table, count, seed, stream, step,
    LAW: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Elements EACH · w … of each word w, for the 4 BLOCKS words of a program."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    c0, c1, c2, c3 = philox(block, seed.to(tl.int64), stream.to(tl.int64), step.to(tl.int64))
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    words = tl.reshape(words, (4 * BLOCKS,)).to(tl.int32, bitcast=True)
    if LAW == SIGNS_:
        bits = (words[:, None] >> tl.arange(0, 32)[None, :]) & 1
        value = tl.reshape(2 * bits - 1, (128 * BLOCKS,)).to(tl.float32)
    elif LAW == UNIFORM_:
        value = ((words >> 8) & 0xFFFFFF).to(tl.float32) * (1.0 / (1 << 24))
    elif LAW == NORMAL_:
        half = tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (8 * BLOCKS,))
        value = tl.load(table + (half & 0x7FFF)).to(tl.float32) * (1.0 / (1 << 20))
        value = tl.where(half >= 0x8000, -value, value)
    else:
        value = words
    i = first * 4 * EACH + tl.arange(0, 4 * EACH * BLOCKS)
    tl.store(out + i, value, mask=i < count)


def random_words(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    """[count] int32, the bits of uint32 words: element i is word i % 4 of block i // 4."""
    return _law(0, count, seed, stream, step, device)


def random_signs(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    """[count] float32, +1 or -1: bit i % 32 of word i // 32, 1 = plus."""
    return _law(1, count, seed, stream, step, device)


def random_uniform(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    """[count] float32 in [0, 1): the upper 24 bits of a word, times 2^-24."""
    return _law(2, count, seed, stream, step, device)


def random_normal(
    count: int, seed: int, stream: int, step: int, table: Tensor, device: Any = "cpu"
) -> Tensor:
    """[count] float32: the quantile table[h & 0x7fff] 2^-20 of halfword h, minus if h >= 0x8000."""
    return _law(3, count, seed, stream, step, device, table.to(device))


def _law(
    law: int,
    count: int,
    seed: int,
    stream: int,
    step: int,
    device: Any,
    table: Tensor | None = None,
) -> Tensor:
    dtype = torch.float32 if law else torch.int32
    out = torch.empty(count, dtype=dtype, device=device)
    each = _PER_WORD[law]
    blocks = 256 // each  # 1024 elements
    if count:
        with torch.cuda.device_of(out):
            _draw[(triton.cdiv(count, 4 * each * blocks),)](
                out, out if table is None else table, count, seed, stream, step,
                LAW=law, EACH=each, BLOCKS=blocks,
            )  # fmt: skip
    return out
