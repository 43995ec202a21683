"""supermask_linear_sgd: a learned mask whose backward takes the score's step of SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.checks import Drawn, SignConstant
from lottery_sparse.ops.supermask.op import bits_and_kept, check_supermask, split_weight


def supermask_linear_sgd(
    x: Tensor,
    score: Tensor,
    velocity: Tensor,
    weight: Tensor | SignConstant | Drawn,
    key: Tensor,
    bias: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.9,
    rescale: bool = False,
) -> Tensor:
    """`supermask_linear` whose backward takes the score's step of SGD itself, and is no gradient.

    v = momentum v + dscore, score = score − lr v, as torch.optim.SGD does (no dampening, decay or
    Nesterov). dscore is never written, which is a third of what a step moves. So the score must
    have no other use in the graph, dy must be its whole gradient (no accumulation, no loss
    scaling, no clipping), and each call has one backward.

    Args:
        score: as in `supermask_linear`, contiguous, and requires grad; its .grad stays as it is.
        velocity: like `score`, zeros before the first step.
        lr, momentum: numbers, those of the next backward.
        x, weight, key, bias, rescale: as in `supermask_linear`; not under autocast.

    Returns:
        as `supermask_linear`.

    Gradients: dx and dbias. The weight is a constant.

    Raises:
        ValueError: as in `supermask_linear`, and for a score or velocity that cannot be updated.
        RuntimeError: under torch.compile, which would not see what the backward writes.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "supermask_linear_sgd updates the score in its backward, which torch.compile cannot "
            "follow; compile supermask_linear with torch.optim.SGD instead."
        )
    if not score.requires_grad or not score.is_contiguous():
        raise ValueError("score must be contiguous and require grad: the backward updates it.")
    if velocity.shape != score.shape or velocity.dtype != score.dtype or velocity.requires_grad:
        raise ValueError(
            f"velocity must be a {score.dtype} tensor {tuple(score.shape)} without grad, got "
            f"{velocity.dtype} {tuple(velocity.shape)}; use torch.zeros_like(score).detach()."
        )
    if not velocity.is_contiguous() or velocity.device != score.device:
        raise ValueError(f"velocity must be contiguous and on {score.device}, as the score is.")
    values, signs = split_weight(x, score, weight, rank=2)
    if values.requires_grad:
        raise ValueError("weight must be a constant, got one that requires grad; detach it.")
    if x.dim() < 2 or x.shape[-1] != score.shape[-1] or (x.dim() > 2 and score.dim() == 2):
        raise ValueError(f"x must be [B, K] or [E, B, K] for score {tuple(score.shape)}.")
    check_supermask(x, score, values, key, None, bias, signs, rank=2)
    bits, kept = bits_and_kept(score, key, None, rescale, rank=2)
    return _Step.apply(x, score, velocity, values, bits, kept, bias, signs, lr, momentum)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, score, velocity, weight, bits, kept, bias, signs, ctx.lr, ctx.momentum = args
        ctx.save_for_backward(x, score, velocity, weight, bits, kept, signs)
        run = x, score, weight, bits, kept, bias, signs
        return dispatch.kernel("supermask_linear", x.device, run)(*run)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        need_dx, need_db = ctx.needs_input_grad[0], ctx.needs_input_grad[6]
        saved = ctx.saved_tensors
        args = dy, *saved, ctx.lr, ctx.momentum, need_dx
        dx = dispatch.kernel("supermask_linear_sgd", dy.device, args)(*args)
        torch.autograd.graph.increment_version(saved[1:3])  # kernels write by pointer
        db = dy.sum(-2) if need_db else None
        return dx if need_dx else None, None, None, None, None, None, db, None, None, None
