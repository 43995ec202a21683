"""One round of the lottery: from how a round began and ended to how the next one begins.

`find_ticket` and the studies both go from round to round by `next_round`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lottery_sparse.ops.random.op import Stream, derive
from lottery_sparse.pruning.actions import MASK0_ACTIONS, MASK1_ACTIONS, Mask0Action, Mask1
from lottery_sparse.pruning.masks import Masks
from lottery_sparse.pruning.prune import Keep, find, prune


@dataclass(frozen=True)
class Rules:
    """What decides a lottery beside its weights. See `find_ticket`.

    Attributes:
        std: parameter name -> standard deviation of the dense initial weights, for mask-1 actions.
        keys: parameter name -> the name that keys its random draws.
    """

    criterion: Any
    mask1: Any
    mask0: Any
    scope: str
    seed: int
    std: Mapping[str, float]
    keys: Mapping[str, str]


class Began(NamedTuple):
    """How a round begins: masks, and by name what kept and pruned weights hold."""

    masks: Masks
    weights: dict[str, Tensor]  # of the mask-1 action, whose pruned places later ones may move
    frozen: dict[str, Tensor]  # where pruned weights are not zero
    released: bool = False  # masks only shaped the start; every weight trains

    def effective(self, name: str) -> Tensor:
        """The weight that a layer computes with at the start."""
        if self.released:
            return self.weights[name]
        return torch.where(self.masks[name], self.weights[name], self.frozen.get(name, 0.0))


def next_round(
    rules: Rules,
    number: int,
    last: Began,
    effective: Mapping[str, Tensor],
    final: Mapping[str, Tensor],
    origin: Mapping[str, Tensor],
    keep: Keep | Mapping[str, Keep],
) -> Began:
    """How round `number` begins.

    Masks keep a share of what `last.masks` keep, by the criterion's scores of (effective, final).
    Kept weights restart from what the mask-1 action makes of `origin`; pruned ones hold what the
    mask-0 action says. Draws are keyed by the seed, the round and the parameter name.

    Args:
        effective: the weights that the last round computed with when it began, by name.
        final: those that it ended with.
        origin: what mask-1 actions modify: the dense weights that tickets rewind to, or with
            compounding `last.weights`.
        keep: the share that stays, see `prune`.

    Source: Frankle & Carbin 2019; Zhou et al. 2019.
    """
    masks = prune(
        effective, final, last.masks, rules.criterion, keep, rules.scope,
        derive(rules.seed, "prune", number),
    )  # fmt: skip
    start_of: Mask1 = find(rules.mask1, MASK1_ACTIONS, "mask1")
    frozen_of: Mask0Action = find(rules.mask0, MASK0_ACTIONS, "mask0")
    weights: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    released = False
    for name, mask in masks.items():
        stream = Stream(derive(rules.seed, "mask-1", number), rules.keys[name])
        weights[name] = start_of(origin[name], mask, rules.std[name], stream)
        stream = Stream(derive(rules.seed, "mask-0", number), rules.keys[name])
        decision = frozen_of(
            effective[name], final[name], mask, last.masks[name], last.frozen.get(name), stream
        )
        if decision.start_at_zero is not None:
            weights[name] = weights[name].masked_fill(decision.start_at_zero, 0)
        if decision.frozen is not None:
            frozen[name] = decision.frozen
        released = released or decision.released
    return Began(masks, weights, frozen, released)
