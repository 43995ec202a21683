"""Counter-based randomness."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# ---- counter-based randomness --------------------------------------------------------------------
# Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
# key = seed (64 bits); counter = (block, low and high; stream; step), each 32 bits.

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Ten rounds on 32-bit words held in NumPy uint64 arrays or torch int64 tensors.

    A product of two 32-bit words wraps in int64 but keeps its bits, so both give the same words.
    """
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def random_words(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    """[count] int32, the bits of uint32 words: element i is word i % 4 of block i // 4."""
    blocks, key = -(-count // 4), (seed & _LOW, (seed >> 32) & _LOW)
    if torch.device(device).type == "cpu":
        index = np.arange(blocks, dtype=np.uint64)
        c2, c3 = (np.full(blocks, v, np.uint64) for v in (stream, step))
        words = np.stack(philox(index & _LOW, index >> 32, c2, c3, *key), -1)
        return torch.from_numpy(words.astype(np.uint32).reshape(-1)[:count].view(np.int32))
    index = torch.arange(blocks, device=device)
    c2, c3 = (torch.full_like(index, v) for v in (stream, step))
    words = torch.stack(philox(index & _LOW, index >> 32, c2, c3, *key), -1)
    return words.flatten()[:count].to(torch.int32)


def words_of(key: Tensor, count: int) -> Tensor:
    """[E, count] int64, the uint32 words of each key (seed, stream, step): [3], or [E, 3]."""
    seed, stream, step = key.view(-1, 3, 1).unbind(1)  # [E, 1] each
    block = torch.arange(-(-count // 4), device=key.device).unsqueeze(0)
    zero = torch.zeros_like(seed + block)
    words = philox(
        zero + (block & _LOW), zero + (block >> 32), zero + stream, zero + step,
        seed & _LOW, (seed >> 32) & _LOW,
    )  # fmt: skip
    return torch.stack(words, -1).flatten(1)[:, :count]


def random_signs(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    """[count] float32, +1 or -1: bit i % 32 of word i // 32, 1 = plus."""
    words = random_words(-(-count // 32), seed, stream, step, device)
    bits = (words.unsqueeze(1) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return (2 * bits - 1).flatten()[:count].to(torch.float32)


def random_uniform(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    """[count] float32 in [0, 1): the upper 24 bits of a word, times 2^-24."""
    words = random_words(count, seed, stream, step, device)
    return ((words >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def random_normal(
    count: int, seed: int, stream: int, step: int, table: Tensor, device: Any = "cpu"
) -> Tensor:
    """[count] float32: the quantile table[h & 0x7fff] 2^-20 of halfword h, minus if h >= 0x8000.

    Element i takes halfword i % 2 (low first) of word i // 2. table: [32768] int32.
    """
    words = random_words(-(-count // 2), seed, stream, step, device)
    half = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), -1).flatten()[:count]
    value = table.to(words.device)[half & 0x7FFF].to(torch.float32) * 2.0**-20
    return torch.where(half >= 0x8000, -value, value)
