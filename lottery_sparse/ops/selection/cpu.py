"""Exact selection."""

from __future__ import annotations

import torch
from torch import Tensor

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops
from lottery_sparse.ops.bits.cpu import count_kept

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
