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


def sample_mask(score: Tensor, key: Tensor) -> Tensor:
    networks = score if key.dim() == 2 else score.unsqueeze(0)
    return _drawn(networks, key).to(score.dtype).view(score.shape)


def sample_bits(score: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    masks = _drawn(score if key.dim() == 2 else score.unsqueeze(0), key)
    kept = torch.tensor([count_kept(mask) for mask in masks], dtype=torch.int64)
    return pack_mask(masks.view(score.shape)), kept.view(score.shape[:-2])


def _drawn(score: Tensor, key: Tensor) -> Tensor:
    """Masks of [E, ...], each network with its key, as bool."""
    score = score.to(torch.float32)
    keys = zip(score, key.view(-1, 3).tolist(), strict=True)
    masks = [_ops.sample_mask(one, seed, stream, step) for one, (seed, stream, step) in keys]
    return masks[0].unsqueeze(0) if len(masks) == 1 else torch.stack(masks) if masks else score > 0
