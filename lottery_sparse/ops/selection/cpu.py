"""Exact selection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits.cpu import count_kept

_ops = torch.ops.lottery_sparse_native

# Integer and half-precision scores that a float32 holds exactly, so ranks stay what they were.
_EXACT = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16)


def why_not(scores: list[Tensor], *rest: Any) -> str | None:
    dtypes = {score.dtype for score in scores} - set(_EXACT)
    if dtypes:
        return f"scores are {min(map(str, dtypes))}, which a float32 cannot hold exactly."
    return None


@dispatch.limited(why_not)
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
