"""keep_top: exactly `count` of the highest scores, ties broken by a seeded key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.random.op import key_numbers, word_of


def keep_top(
    scores: Tensor | Sequence[Tensor],
    masks: Tensor | Sequence[Tensor],
    count: int,
    seed: int = 0,
    stream: int | Sequence[int] = 0,
) -> Any:
    """Of the entries kept so far, the `count` scored highest, over all tensors together.

    Entries are ranked by (score, random word, position): score descending, with -0.0 = 0.0; ties
    by the uint32 word that `ls.random.words(seed=seed, stream=stream)` has at the entry's flat
    index, descending; equal words by position, tensors in the order given. So the result is
    exact and the same on every device and thread count.

    >>> scores, masks = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([False, True, True])
    >>> ls.ops.keep_top(scores, masks, count=1)
    tensor([False, False,  True])

    Args:
        scores: a tensor [...] of any real dtype, or a list of them.
        masks: bool, the shape of each score; True = kept so far. A pruned entry never returns.
        count: entries to keep, 0 … entries kept so far.
        seed: 64-bit seed of the ties.
        stream: 32-bit stream of the ties, one per tensor (`ls.random.stream_of(name)`).

    Returns:
        The next masks, bool: a tensor for a tensor, a list for a list.

    Raises:
        ValueError: NaN at a kept entry, count out of range, or shapes that do not fit.
    """
    if isinstance(scores, Tensor):
        if not isinstance(masks, Tensor) or not isinstance(stream, int):
            raise TypeError("masks must be a tensor and stream an int when scores is a tensor.")
        return keep_top([scores], [masks], count, seed, [stream])[0]
    streams = [stream] * len(scores) if isinstance(stream, int) else list(stream)
    if not len(scores) == len(masks) == len(streams) or not scores:
        raise ValueError(
            f"scores, masks and stream must be equally many, at least one, got {len(scores)}, "
            f"{len(masks)} and {len(streams)}."
        )
    for i, (score, mask) in enumerate(zip(scores, masks, strict=True)):
        if mask.dtype != torch.bool or mask.shape != score.shape or mask.device != score.device:
            raise ValueError(
                f"masks[{i}] must be bool of shape {tuple(score.shape)} on {score.device}, got "
                f"{mask.dtype}, {tuple(mask.shape)} on {mask.device}."
            )
        if score.device != scores[0].device:
            raise ValueError(
                f"scores must share one device, got {scores[0].device} and {score.device}; move "
                "them to one, with their masks."
            )
        if score.dtype != scores[0].dtype or score.is_complex() or score.dtype == torch.bool:
            raise ValueError(
                f"scores must share one real dtype, got {scores[0].dtype} and {score.dtype}."
            )
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}.")
    streams = [word_of(value, "stream") for value in streams]
    return _keep_top(list(scores), list(masks), count, key_numbers(seed)[0], streams)


torch.library.define(
    "lottery_sparse::keep_top",
    "(Tensor[] scores, Tensor[] masks, int count, int seed, int[] streams) -> Tensor[]",
)
_keep_top = torch.ops.lottery_sparse.keep_top.default


@torch.library.impl("lottery_sparse::keep_top", "default")
def _run(
    scores: list[Tensor], masks: list[Tensor], count: int, seed: int, streams: list[int]
) -> list[Tensor]:
    args = (scores, masks, count, seed, streams)
    return dispatch.kernel("keep_top", scores[0].device, args)(*args)


@torch.library.register_fake("lottery_sparse::keep_top")
def _fake(
    scores: list[Tensor], masks: list[Tensor], count: int, seed: int, streams: list[int]
) -> list[Tensor]:
    return [torch.empty_like(m, memory_format=torch.contiguous_format) for m in masks]


# Each vmapped element is a selection of its own; there is no product to share.
@torch.library.register_vmap("lottery_sparse::keep_top")
def _vmap(info, in_dims, scores, masks, count, seed, streams):
    def pick(tensors, dims, i):
        return [t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)]

    chosen = [
        _keep_top(pick(scores, in_dims[0], i), pick(masks, in_dims[1], i), count, seed, streams)
        for i in range(info.batch_size)
    ]
    return [torch.stack(masks) for masks in zip(*chosen, strict=True)], [0] * len(scores)
