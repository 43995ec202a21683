"""The lottery-ticket loop for any model, and the ticket it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lottery_sparse.actions import MASK0_ACTIONS, MASK1_ACTIONS, Mask0, Mask0Action, Mask1
from lottery_sparse.convert import masks_of, set_masks_, sparsify_
from lottery_sparse.criteria import CRITERIA, Criterion
from lottery_sparse.masks import Masks
from lottery_sparse.modules import Masked
from lottery_sparse.prune import Keep, find, keep_count, prune
from lottery_sparse.random import Stream, as_seed, derive


class TrainFn(Protocol):
    """Trains a model in place and returns metrics; with stop_at=k it stops after k iterations."""

    def __call__(self, model: nn.Module, stop_at: int | None = None) -> Any: ...


@dataclass
class Ticket:
    """Masks, what pruned weights hold, and the state the kept ones start from.

    `start` is a state_dict of the whole model (biases and buffers too), `frozen` has no entry
    where pruned weights are zero, `history` one dict per round: round, density, metrics.
    """

    masks: Masks
    start: dict[str, Tensor]
    frozen: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def apply_(self, model: nn.Module) -> nn.Module:
        """Put the ticket into a model of the same architecture, ready to train; in place."""
        sparsify_(model, lambda _, name: (f"{name}.weight" if name else "weight") in self.masks)
        model.load_state_dict(self.start)
        return set_masks_(model, self.masks, self.frozen)


def find_ticket(
    model: nn.Module,
    train_fn: TrainFn,
    rounds: int,
    keep: Keep | Mapping[str, Keep],
    criterion: str | Criterion = "large_final",
    mask1: str | Mask1 = "rewind",
    mask0: str | Mask0Action = "zero",
    rewind_to: int = 0,
    scope: str = "layer",
    generator: int | torch.Generator | None = None,
    compounding: bool = False,
) -> Ticket:
    """Iterative pruning with rewinding: train, score, prune, restart, `rounds` times.

    Round 0 trains the dense model, round r the ticket that round r − 1 chose; a last training
    follows the last pruning, so train_fn runs rounds + 1 times (and once more for late rewinding).
    One-shot pruning is rounds=1.

    Args:
        model: any module. Its nn.Linear and nn.Conv2d become masked (see `sparsify_`, which you
            can call before with a filter); it is left as the last training leaves it.
        train_fn: (model, stop_at=None) -> metrics. Trains in place, with an optimizer of its own.
            With late rewinding it is called once with stop_at=rewind_to, for the weights that
            tickets restart from; data order must then be the same as in a full training.
        rounds: number of prunings.
        keep: fraction of the weights kept so far that each round keeps, or a dict by name.
        criterion, mask1, mask0: names in `CRITERIA`, `MASK1_ACTIONS`, `MASK0_ACTIONS`, or functions
            of their kind.
        rewind_to: iteration whose weights (biases and buffers too) kept weights restart from; 0 =
            initial ones.
        scope: "layer" or "global", see `prune`.
        generator: int seed or CPU Generator: ties, reinitialisations, the random criterion.
        compounding: mask-1 actions start from the previous round's start instead of the dense
            run's, as the authors' code does.

    Returns:
        The `Ticket` the last training started from.

    Source: Frankle & Carbin 2019; Zhou et al. 2019; late rewinding: Frankle et al. 2019.
    """
    _check(rounds, rewind_to, keep)
    score = find(criterion, CRITERIA, "criterion")
    start_of = find(mask1, MASK1_ACTIONS, "mask1")
    frozen_of = find(mask0, MASK0_ACTIONS, "mask0")
    seed = as_seed(generator)
    if not any(isinstance(m, Masked) for m in model.modules()):
        sparsify_(model)
    masks = masks_of(model)
    init = _snapshot(model)
    stds = {name: float(init[name].double().std(correction=0)) for name in masks}
    if rewind_to:
        train_fn(model, stop_at=rewind_to)
        base = _snapshot(model)
        model.load_state_dict(init)
    else:
        base = init
    start, frozen = init, {}
    history = [_record(0, masks, train_fn(model))]
    for r in range(1, rounds + 1):
        final = _snapshot(model)
        previous, masks = masks, prune(start, final, masks, score, keep, scope, derive(seed, r))
        origin = start if compounding and r > 1 else base
        decisions: dict[str, Mask0] = {}
        next_start = dict(base)
        for name, mask in masks.items():
            decision = frozen_of(
                start[name], final[name], mask, previous[name], frozen.get(name),
                Stream(seed, f"mask0/{r}/{name}"),
            )  # fmt: skip
            decisions[name] = decision
            kept = start_of(origin[name], mask, stds[name], Stream(seed, f"mask1/{r}/{name}"))
            next_start[name] = assemble(kept, mask, decision)
        start = next_start
        frozen = {n: d.frozen for n, d in decisions.items() if d.frozen is not None}
        trained = Masks({n: m | True if decisions[n].released else m for n, m in masks.items()})
        model.load_state_dict(start)
        set_masks_(model, trained, frozen)
        history.append(_record(r, masks, train_fn(model)))
    return Ticket(masks, start, frozen, history)


def assemble(kept: Tensor, mask: Tensor, decision: Mask0) -> Tensor:
    """The effective weights a round starts from: kept ones, zero starts, frozen ones."""
    start = kept if decision.start_at_zero is None else kept.masked_fill(decision.start_at_zero, 0)
    if decision.released:
        return start
    return torch.where(mask, start, 0.0 if decision.frozen is None else decision.frozen)


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Effective weights, biases and buffers by name, without the masks."""
    hidden = ("weight_mask", "weight_frozen")
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name.rpartition(".")[2] not in hidden
    }


def _record(round: int, masks: Masks, metrics: Any) -> dict[str, Any]:
    return {"round": round, "density": masks.density, "metrics": metrics}


def _check(rounds: int, rewind_to: int, keep: Keep | Mapping[str, Keep]) -> None:
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    if rewind_to < 0:
        raise ValueError(f"rewind_to is an iteration, at least 0, got {rewind_to}.")
    for fraction in keep.values() if isinstance(keep, Mapping) else (keep,):
        keep_count(1, fraction)  # refuse a wrong fraction before the first training
