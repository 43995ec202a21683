"""Exact selection, and counter-based randomness."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.native.masks import count_kept, pack_mask

_ops = torch.ops.lottery_sparse_native


def keep_top(
    scores: list[Tensor], masks: list[Tensor], count: int, seed: int, streams: list[int]
) -> list[Tensor]:
    scores = [score.to(torch.float32) for score in scores]
    try:
        return _ops.keep_top(scores, masks, count, seed, streams)
    except RuntimeError:
        # the C interface has one exception type: find out whether it was the caller's mistake
        kept = sum(map(count_kept, masks))
        if count > kept:
            raise ValueError(
                f"count is {count}, but only {kept} entries are kept so far."
            ) from None
        for i, (score, mask) in enumerate(zip(scores, masks, strict=True)):
            bad = int(score[mask].isnan().sum())
            if bad:
                raise ValueError(f"scores[{i}] holds NaN at {bad} kept entries.") from None
        raise


def random_words(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    return _ops.random_words(count, seed, stream, step).to(device)


def random_signs(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    return _ops.random_signs(count, seed, stream, step).to(device)


def random_uniform(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    return _ops.random_uniform(count, seed, stream, step).to(device)


def random_normal(
    count: int, seed: int, stream: int, step: int, table: Tensor, device: Any = "cpu"
) -> Tensor:
    return _ops.random_normal(count, seed, stream, step, table).to(device)


def sample_bits(score: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Words from the kernel; the threshold as the reference computes it."""
    networks = score.unsqueeze(0) if score.dim() == 2 else score
    probability = torch.sigmoid(networks.to(torch.float32))
    threshold = probability.mul_(2.0**24).nan_to_num_(0.0).to(torch.int32)
    mask = torch.empty(networks.shape, dtype=torch.bool)
    for one, limit, (seed, stream, step) in zip(
        mask, threshold, key.view(-1, 3).tolist(), strict=True
    ):
        words = _ops.random_words(limit.numel(), seed, stream, step)
        draw = words.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
        torch.lt(draw.view(limit.shape), limit, out=one)
    kept = torch.tensor([count_kept(one) for one in mask], dtype=torch.int64)
    return pack_mask(mask.view(score.shape)), kept.view(score.shape[:-2])
