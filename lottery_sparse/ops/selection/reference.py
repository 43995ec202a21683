"""Exact selection."""

from __future__ import annotations

import torch
from torch import Tensor

from lottery_sparse.ops.random.reference import random_words


def keep_top(
    scores: list[Tensor], masks: list[Tensor], count: int, seed: int, streams: list[int]
) -> list[Tensor]:
    """Masks of the `count` kept entries scored highest over all tensors together.

    Order: score, then the random word (seed, stream, index), both descending; then position.
    """
    kept = [mask.flatten().nonzero().squeeze(1) for mask in masks]
    values = [s.flatten()[k] for s, k in zip(scores, kept, strict=True)]
    for i, v in enumerate(values):
        if v.is_floating_point() and v.isnan().any():
            raise ValueError(f"scores[{i}] holds NaN at {int(v.isnan().sum())} kept entries.")
    ties = [
        random_words(s.numel(), seed, stream, 0, s.device)[k].to(torch.int64) & 0xFFFFFFFF
        for s, k, stream in zip(scores, kept, streams, strict=True)
    ]
    value, tie = torch.cat(values), torch.cat(ties)
    if count > len(value):
        raise ValueError(f"count is {count}, but only {len(value)} entries are kept so far.")
    order = tie.argsort(descending=True, stable=True)
    order = order[value[order].argsort(descending=True, stable=True)]
    chosen = torch.zeros_like(value, dtype=torch.bool).index_fill(0, order[:count], True)
    return [
        torch.zeros_like(mask).flatten().index_put((k,), part).view(mask.shape)
        for mask, k, part in zip(masks, kept, chosen.split([len(k) for k in kept]), strict=True)
    ]
