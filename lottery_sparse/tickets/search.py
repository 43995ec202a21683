"""The lottery-ticket loop for any model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lottery_sparse.nn.forms.convert import (
    check_not_learned,
    check_own,
    mask_layers_,
    masked_modules,
    masks_of,
    why_unmasked,
)
from lottery_sparse.nn.forms.densify import state_without_masks
from lottery_sparse.nn.frozen import Seeded, SignOf
from lottery_sparse.nn.masked import Masked
from lottery_sparse.ops.random.op import as_seed
from lottery_sparse.pruning.actions import MASK0_ACTIONS, MASK1_ACTIONS, Mask0Action, Mask1
from lottery_sparse.pruning.criteria import CRITERIA, Criterion
from lottery_sparse.pruning.masks import Masks
from lottery_sparse.pruning.names import in_state, keys_of
from lottery_sparse.pruning.prune import Keep, check_keep, find
from lottery_sparse.text import shown
from lottery_sparse.tickets import file as ticket_file
from lottery_sparse.tickets.round import Began, Rules, next_round
from lottery_sparse.tickets.ticket import Ticket, restart, trained


class TrainFn(Protocol):
    """Trains a model in place and returns metrics; with stop_at=k it stops after k iterations.

    Metrics are numbers, strings, tensors, None, and lists and dicts of them.
    """

    def __call__(self, model: nn.Module, stop_at: int | None = None) -> Any: ...


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
    on_round: Callable[[Ticket], None] | None = None,
    resume: Ticket | None = None,
) -> Ticket:
    """Iterative pruning with rewinding: train, score, prune, restart, `rounds` times.

    Round 0 trains the dense model, round r the ticket that round r − 1 chose; a last training
    follows the last pruning, so train_fn runs rounds + 1 times (and once more for late rewinding).
    One-shot pruning is rounds=1.

    >>> ticket = ls.find_ticket(dense(), train, rounds=2, keep=0.5)
    >>> ticket.masks.density
    0.25

    Args:
        model: any module. Its nn.Linear and nn.Conv2d become masked (see `sparsify_`, which you
            can call before with a filter); it is left as the last training leaves it.
        train_fn: (model, stop_at=None) -> metrics. Trains in place, with an optimizer of its own.
            Tensors and NumPy's numbers among the metrics become Python's numbers. Late rewinding
            calls it once with stop_at=rewind_to, for the weights that tickets restart from; the
            order of the data must then be that of a full training.
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
        on_round: called after each training with the ticket that the training started from, first
            with the dense one of round 0; `history[-1]` is the record of the round. To save each:
            `lambda t: t.save(f"round-{t.history[-1]['round']}.safetensors")`.
        resume: a ticket of `on_round`, from which a search that was cut off goes on. Its round is
            trained once more, since a ticket does not hold the weights at the end of a training.
            The result is the same, bit for bit, if all else is the same: the model at its start, a
            train_fn that repeats itself, criterion, actions, generator (a seed), keep. `rounds` may
            be more than before.

    Returns:
        The `Ticket` the last training started from.

    Raises:
        ValueError: an argument has a bad value, the model learns its masks, or `resume` does not
            fit this search. Raised before the first training, but for that of late rewinding.
        TypeError: a masked layer computes its weight (weight_norm), raised before the first
            training; or train_fn returned metrics that a ticket's file cannot hold.

    The seed, the purpose, the round and the parameter's name key all draws, as in the studies of
    `python -m experiments`. With the network, seed, batches, steps and kept shares of a study the
    tickets are those of the study, bit for bit. With late rewinding this asks that train_fn trains
    a ticket for the rest of the training, from iteration rewind_to on.

    Source: Frankle & Carbin 2019; Zhou et al. 2019; late rewinding: Frankle et al. 2019.
    """
    _check(rounds, rewind_to)
    score = find(criterion, CRITERIA, "criterion")
    mask1, mask0 = find(mask1, MASK1_ACTIONS, "mask1"), find(mask0, MASK0_ACTIONS, "mask0")
    seed = as_seed(generator)
    check_not_learned(model)
    for prefix, layer in masked_modules(model):
        check_own(prefix, layer, "weight")
    if not any(isinstance(m, Masked) for m in model.modules()):
        if why := why_unmasked(model):
            raise ValueError(f"model has no layer that can have a mask; {why}.")
        mask_layers_(model)
    masks = masks_of(model)
    check_keep(keep, scope, masks)
    if resume is not None:
        resume = resume.named_as(model)
        _check_resume(resume, masks, rounds, compounding)
    names = _names(model)
    init = _snapshot(model)
    stds = {name: float(init[name].double().std(correction=0)) for name in masks}
    rules = Rules(score, mask1, mask0, scope, seed, stds, keys_of(masks))
    if rewind_to:
        whole = copy.deepcopy(model.state_dict())  # earlier masks and frozen values too
        train_fn(model, stop_at=rewind_to)
        base = _snapshot(model)
        model.load_state_dict(whole)
    else:
        base = init
    start, began = init, Began(masks, base, {})
    first = 0 if resume is None else resume.history[-1]["round"]
    history = [] if resume is None else resume.history[:-1]
    if resume is not None and first:
        _check_base(resume, base, {alias for name in masks for alias in names[name]})
        device = next(iter(masks.values())).device
        start = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in resume.start.items()}
        frozen = {name: value.to(device) for name, value in resume.frozen.items()}
        began = Began(resume.masks.to(device), start, frozen, resume.released)
        restart(model, start, trained(began.masks, began.released), frozen)

    def train(round: int) -> Ticket:
        history.append(_record(round, began.masks, train_fn(model)))
        found = Ticket(began.masks, start, began.frozen, list(history), began.released)
        if on_round is not None:
            on_round(found)
        return found

    ticket = train(first)
    for r in range(first + 1, rounds + 1):
        origin = began.weights if compounding else base
        began = next_round(rules, r, began, start, _snapshot(model), origin, keep)
        start = dict(base)
        for name in began.masks:
            start |= dict.fromkeys(names[name], began.effective(name))
        restart(model, start, trained(began.masks, began.released), began.frozen)
        ticket = train(r)
    return ticket


def _names(model: nn.Module) -> dict[str, list[str]]:
    """First name of a parameter -> all of its names: more than one where weights are tied."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(in_state(name))
    return {names[0]: names for names in found.values()}


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Effective weights, biases, buffers and extra state by name, without the masks."""
    return {name: copy.deepcopy(value) for name, value in state_without_masks(model).items()}


def _record(round: int, masks: Masks, metrics: Any) -> dict[str, Any]:
    kept = ticket_file.plain(metrics, "metrics of train_fn")
    return {"round": round, "density": masks.density, "metrics": kept}


def _check_resume(ticket: Ticket, masks: Masks, rounds: int, compounding: bool) -> None:
    """Raises ValueError if a search with these masks and arguments cannot go on from the ticket."""
    number = ticket.history[-1].get("round") if ticket.history else None
    if type(number) is not int or number < 0:
        raise ValueError(
            "resume has no history, which says what round it is of; give a ticket of on_round."
        )
    if number > rounds:
        raise ValueError(f"resume is of round {shown(number)}, but rounds is {rounds}; give more.")
    if number and compounding:
        raise ValueError(
            "resume cannot go on with compounding=True: pruned places of the last start are "
            "needed, which a ticket does not hold; start over."
        )
    shapes = {name: tuple(mask.shape) for name, mask in ticket.masks.items()}
    if shapes != (wanted := {name: tuple(mask.shape) for name, mask in masks.items()}):
        raise ValueError(
            f"resume has masks of {shown(shapes)}, but the model's are of {shown(wanted)}."
        )
    if sources := [n for n, v in ticket.start.items() if isinstance(v, str | Seeded | SignOf)]:
        raise ValueError(
            f"resume holds a source in place of the start of {shown(sources[0])}, so it is not "
            "of find_ticket; give a ticket of on_round."
        )


def _check_base(ticket: Ticket, base: Mapping[str, Any], masked: set[str]) -> None:
    """Raises ValueError if an unmasked tensor restarts from other values than the model has."""
    if ticket.start.keys() != base.keys():
        odd = min(ticket.start.keys() ^ base.keys())
        raise ValueError(f"resume is of another model: only one of them has {shown(odd)}.")
    for name, value in base.items():
        if name in masked or not isinstance(value, Tensor):
            continue
        if not torch.equal(ticket.start[name].to(value.device), value):
            raise ValueError(
                f"resume restarts {shown(name)} from other values than this model; give the model "
                "as it was at first."
            )


def _check(rounds: int, rewind_to: int) -> None:
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be a whole number, at least 1, got {rounds!r}.")
    if not isinstance(rewind_to, int) or rewind_to < 0:
        raise ValueError(f"rewind_to is an iteration, at least 0, got {rewind_to!r}.")
