"""Mask criteria: scores from the weights at the start and the end of a training.

A criterion is (w_init, w_final, generator) -> scores of the same shape; the weights scored
highest are kept. `prune` hands it the weights of one layer that are kept so far, as vectors, so
ranks and quantiles are those of live weights. generator: an int seed or an `ls.random.Stream`.

Names and scores: Zhou et al. 2019, figure 2 (w_i = w_init, w_f = w_final).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops.random.op import as_stream

Criterion = Callable[[Tensor, Tensor, Any], Tensor]


def large_final(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """|w_f|: the criterion of Frankle & Carbin."""
    return w_final.abs()


def small_final(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """−|w_f|"""
    return -w_final.abs()


def large_init(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """|w_i|"""
    return w_init.abs()


def small_init(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """−|w_i|"""
    return -w_init.abs()


def large_init_large_final(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """min(α |w_f|, |w_i|), α such that both axes are cut at one quantile: the lower rank."""
    return torch.minimum(_rank(w_init.abs()), _rank(w_final.abs()))


def small_init_small_final(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """−max(α |w_f|, |w_i|), α as above."""
    return torch.minimum(_rank(-w_init.abs()), _rank(-w_final.abs()))


def magnitude_increase(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """|w_f| − |w_i|"""
    return w_final.abs() - w_init.abs()


def movement(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """|w_f − w_i|. Not "movement pruning" (Sanh et al. 2020)."""
    return (w_final - w_init).abs()


def random(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """Uniform scores: the control every other criterion is compared with."""
    return as_stream(generator).uniform(w_final.shape).to(w_final.device)


def large_final_same_sign(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """max(0, w_i w_f / |w_i|): |w_f| where the sign is unchanged, else 0. Best for supermasks."""
    return _where_sign(_same_sign(w_init, w_final), w_final.abs())


def large_final_diff_sign(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """max(0, −w_i w_f / |w_i|): |w_f| where the sign changed, else 0. The control."""
    return _where_sign(~_same_sign(w_init, w_final), w_final.abs())


def magnitude_increase_same_sign(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """|w_f| − |w_i| where the sign is unchanged, else 0, which outranks weights that shrank."""
    return _where_sign(_same_sign(w_init, w_final), w_final.abs() - w_init.abs())


def magnitude_increase_diff_sign(w_init: Tensor, w_final: Tensor, generator: Any = None) -> Tensor:
    """|w_f| − |w_i| where the sign changed, else 0, which outranks weights that shrank."""
    return _where_sign(~_same_sign(w_init, w_final), w_final.abs() - w_init.abs())


def _same_sign(w_init: Tensor, w_final: Tensor) -> Tensor:
    """Whether both are positive or both negative; a weight of exactly 0 has no sign, so never."""
    return w_init.sign() * w_final.sign() > 0


def _where_sign(chosen: Tensor, scores: Tensor) -> Tensor:
    """The scores where the signs are as wanted, else 0; NaN stays, so that `prune` sees it."""
    return torch.where(chosen | scores.isnan(), scores, 0.0)


def _rank(values: Tensor) -> Tensor:
    """Share of values that are not larger: equal values share a rank, so quantiles cut exactly.

    A share, not a number, so that layers of any size compare in global scope.
    """
    ordered = values.flatten().sort().values
    rank = torch.searchsorted(ordered, values.contiguous(), right=True).double() / values.numel()
    return rank.masked_fill(values.isnan(), torch.nan)


CRITERIA: dict[str, Criterion] = {
    "large_final": large_final,
    "small_final": small_final,
    "large_init": large_init,
    "small_init": small_init,
    "large_init_large_final": large_init_large_final,
    "small_init_small_final": small_init_small_final,
    "magnitude_increase": magnitude_increase,
    "movement": movement,
    "random": random,
    "large_final_same_sign": large_final_same_sign,
    "large_final_diff_sign": large_final_diff_sign,
    "magnitude_increase_same_sign": magnitude_increase_same_sign,
    "magnitude_increase_diff_sign": magnitude_increase_diff_sign,
}


def large_final_same_sign_single(w_init: Tensor, w_final: Tensor) -> Tensor:
    """The mask 1[sign(w_i) = sign(w_f)]: no fraction, and earlier masks do not count."""
    return _same_sign(w_init, w_final)


def large_final_diff_sign_single(w_init: Tensor, w_final: Tensor) -> Tensor:
    """The mask 1[sign(w_i) ≠ sign(w_f)]."""
    return ~_same_sign(w_init, w_final)


# (w_init, w_final) -> mask, for weights only: biases are never masked
SIGN_MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "large_final_same_sign_single": large_final_same_sign_single,
    "large_final_diff_sign_single": large_final_diff_sign_single,
}
