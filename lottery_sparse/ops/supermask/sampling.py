"""sample_mask: a learned mask, Bernoulli(sigmoid(score)), with the straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops.common.autograd import Differentiable


def sample_mask(score: Tensor, key: Tensor) -> Tensor:
    """Sample m ~ Bernoulli(p), p = sigmoid(score), from the counter-based generator.

    Element i is 1 where the upper 24 bits of random word i are below floor(p 2^24), with the exact
    p of the score as a float32. A pure function of score and key: the same key gives the same mask
    on every device.

    >>> score = torch.zeros(10, 20, requires_grad=True)
    >>> ls.ops.sample_mask(score, ls.random.key(seed=0, step=7)).unique().detach()
    tensor([0., 1.])

    Args:
        score: [...], any floating dtype; or [E, ...] with one key per network.
        key: int64 [3], (seed, stream, step) from `ls.random.key`, on the score's device; or
            [E, 3]. For the next step add 1 to its last element: a device tensor, so a CUDA graph
            can do it.

    Returns:
        Like `score`, holding 0 and 1. (A NaN score gives 0.)

    Gradients: straight through to the probability, dscore = dm p (1 − p).

    Raises:
        ValueError: key is not int64 [3] or [E, 3] on the device of `score`.

    Source: Zhou et al. 2019, section 4; the gradient is that of the expected mask.
    """
    if not score.is_floating_point():
        raise ValueError(f"score must be of a floating dtype, got {score.dtype}.")
    replicated = key.dim() == 2 and score.dim() > 0 and key.shape == (score.shape[0], 3)
    if key.dtype != torch.int64 or (key.shape != (3,) and not replicated):
        raise ValueError(
            f"key must be int64 [3], or [E, 3] for a score [E, ...], got {key.dtype} of shape "
            f"{tuple(key.shape)}; use ls.random.key(seed, stream, step)."
        )
    if key.device != score.device:
        raise ValueError(f"key is on {key.device}, but score is on {score.device}; move one.")
    return _straight_through(score, key)


torch.library.define("lottery_sparse::sample_mask", "(Tensor score, Tensor key) -> Tensor")


class SampleMask(Differentiable):
    def fake(self, score: Tensor, key: Tensor) -> Tensor:
        return torch.empty_like(score, memory_format=torch.contiguous_format)

    def save(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        score, _ = inputs
        ctx.save_for_backward(score)

    def gradients(self, ctx: Any, dm: Tensor) -> tuple[Tensor, None]:
        (score,) = ctx.saved_tensors
        probability = torch.sigmoid(score)
        return dm * probability * (1 - probability), None

    def vmap(self, info: Any, in_dims: tuple, score: Tensor, key: Tensor) -> tuple[Tensor, int]:
        score, key = keyed(info.batch_size, in_dims, score, key)
        if key.dim() == 2:
            return self(score, key), 0
        mask = self(score.flatten(0, 1), key.flatten(0, 1))
        return mask.unflatten(0, score.shape[:2]), 0


def keyed(size: int, in_dims: tuple, score: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Scores and keys of a vmap. Each element draws with its own key, or all with the same one."""
    pairs = zip((score, key), in_dims, strict=True)
    return tuple(
        value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        for value, dim in pairs
    )


_straight_through = SampleMask("sample_mask")
