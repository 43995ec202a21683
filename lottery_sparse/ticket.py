"""A ticket: masks, what pruned weights hold, and where kept ones start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lottery_sparse import ticket_file
from lottery_sparse.convert import (
    by_parameter,
    check_not_learned,
    masked_modules,
    set_masks_,
    sparsify_,
)
from lottery_sparse.densify import densify_, state_without_masks
from lottery_sparse.frozen import Seeded, SignOf, drawn, keyed
from lottery_sparse.masks import Masks
from lottery_sparse.names import in_state, keys_of, matched


@dataclass
class Ticket:
    """Masks, what pruned weights hold, and the state the kept ones start from.

    `start` is a state_dict of the whole model (biases and buffers too), `frozen` has no entry
    where pruned weights are zero, `history` one dict per round: round, density, metrics.

    A start may also be a source instead of a tensor: `ls.Seeded` or `ls.SignOf` (with `rescale`,
    drawn weights are multiplied by weights / kept), or "zero". With such starts a ticket is a mask
    and a seed.
    """

    masks: Masks
    start: dict[str, Any]
    frozen: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    released: bool = False  # mask-0 "original": every weight trains, masks only shape the start
    rescale: bool = False
    saved: ticket_file.Saved | None = field(default=None, repr=False, compare=False)

    @property
    def bits(self) -> dict[str, int]:
        """What the ticket takes: bits of its "masks", of its "seeds", and of "tensors" beside."""
        drawn_from = [v for v in self.start.values() if isinstance(v, Seeded | SignOf)]
        seeds = {v.source.seed if isinstance(v, SignOf) else v.seed for v in drawn_from}
        tensors = [v for part in (self.start, self.frozen) for v in part.values()]
        return {
            "masks": sum(8 * packed.numel() for packed in self.masks.to_bits().values()),
            "seeds": 64 * len(seeds),
            "tensors": sum(8 * v.nbytes for v in tensors if isinstance(v, Tensor)),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ticket as safetensors, masks packed, sources as JSON; whole or not at all.

        Raises:
            TypeError: a start that is no tensor or source, or metrics that JSON cannot hold.
        """
        ticket_file.save(path, self.masks, self.start, self.frozen, self._others)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ticket:
        """The ticket that `save` wrote. Nothing in the file is executed.

        Raises:
            ValueError: the file is no ticket, of a newer format, or was changed since it was saved;
                the message is one sentence that names the file and what is wrong.
            OSError: there is no such file, or it cannot be read.
        """
        masks, start, frozen, others, saved = ticket_file.load(path)
        return cls(masks, start, frozen, **others, saved=saved)

    def verify(self) -> Ticket:
        """Recompute what the ticket says of itself; returns the ticket.

        Starts and frozen values have the shapes of the masks; the last record of `history` has
        their density. Of a ticket that was loaded, all is as it was saved: masks and tensors bit by
        bit, and the weights that its seeds draw here are those that were drawn where it was saved
        (whatever machine that was). Digests find damage and mistakes; who forges a file can forge
        them too.

        Raises:
            ValueError: something is not as the ticket says; the message names it and the file.
        """
        where = "the ticket" if self.saved is None else self.saved.path
        for name, mask in self.masks.items():
            if name not in self.start:
                raise ValueError(f"{where} has a mask of {name}, but no start for it.")
            for what, value in ("start", self.start[name]), ("frozen", self.frozen.get(name)):
                if isinstance(value, Tensor) and value.shape != mask.shape:
                    raise ValueError(
                        f"{where}: {what} of {name} must have the shape of its mask, "
                        f"{tuple(mask.shape)}, got {tuple(value.shape)}."
                    )
        if unknown := sorted(self.frozen.keys() - self.masks.keys()):
            raise ValueError(f"{where} has frozen values of {unknown[0]}, but no mask for it.")
        said = self.history[-1].get("density") if self.history else None
        if said is not None and said != self.masks.density:
            raise ValueError(
                f"{where}: the last record of history says density {said}, but its masks keep "
                f"{self.masks.kept} of {self.masks.total} ({self.masks.density})."
            )
        now = ticket_file.digests(self.masks, self.start, self.frozen, self._others)
        if self.saved and (
            changed := ticket_file.differing(self.saved, now, self.masks, self.start)
        ):
            raise ValueError(
                f"{where}: {changed} is not what was saved; load or make the ticket again, or save "
                "it where the change was meant."
            )
        return self

    @property
    def _others(self) -> dict[str, Any]:
        return {"history": self.history, "released": self.released, "rescale": self.rescale}

    def apply_(self, model: nn.Module) -> nn.Module:
        """Put the ticket into a model of the same architecture, ready to train; in place.

        Ticket and model may be wrapped differently (torch.compile, DistributedDataParallel, FSDP).
        Compact layers stay compact, and need as many slots as the ticket keeps weights.

        Raises:
            ValueError: the model learns its masks, has other names or shapes than the ticket, or a
                layer that cannot be masked; then nothing has changed.
        """
        check_not_learned(model)
        ticket = self.named_as(model)
        ticket._check_fits(model)
        before = {id(layer) for _, layer in masked_modules(model)}
        weights = {
            id(weight)
            for name, weight in model.named_parameters(remove_duplicate=False)
            if in_state(name) in ticket.masks
        }
        sparsify_(model, lambda module, _: id(module.weight) in weights)
        names = {name for name, _ in by_parameter(model)}
        if unmasked := [name for name in ticket.masks if name not in names]:
            for _, layer in [*masked_modules(model)]:
                if id(layer) not in before:
                    densify_(layer)  # whose weights are all kept: as it was
            raise ValueError(
                f"the ticket has a mask of {unmasked[0]}, which is no weight of an nn.Linear or "
                "nn.Conv2d that can be masked in this model; give one of the same architecture."
            )
        masks = trained(ticket.masks, ticket.released)
        return restart(model, ticket._start_of(model), masks, ticket.frozen)

    def named_as(self, model: nn.Module) -> Ticket:
        """The ticket by the names of a model that is wrapped otherwise; its seeds draw the same.

        Names that the model has not stay as they are.

        Raises:
            ValueError: a name of the ticket may mean several of the model's.
        """
        ours = dict.fromkeys([*_without_masks(self.start), *self.masks, *self.frozen])
        there = matched(ours, state_without_masks(model), "the ticket")
        if all(name == now for name, now in there.items()):
            return self

        def now(name: str) -> str:  # beside a weight: its mask, what it is frozen to
            weight, _, kind = name.rpartition("_")
            return there[name] if name in there else f"{there[weight]}_{kind}"

        return replace(
            self,
            masks=Masks({there[name]: mask for name, mask in self.masks.items()}),
            start={now(name): value for name, value in self._keyed_start().items()},
            frozen={there[name]: value for name, value in self.frozen.items()},
            saved=None,
        )

    def _keyed_start(self) -> dict[str, Any]:
        """`start` with sources that say their stream, which is that of the name here."""
        keys = keys_of(self.start)
        return {name: keyed(value, keys[name]) for name, value in self.start.items()}

    def _check_fits(self, model: nn.Module) -> None:
        """Whether names and shapes are those of the model; raises ValueError."""
        there, ours = state_without_masks(model), _without_masks(self.start)
        ours |= {name: mask for name, mask in self.masks.items() if name not in ours}
        way = "give a model of the same architecture"
        for name in ours:
            if name not in there:
                raise ValueError(f"the ticket has {name}, which this model has not; {way}.")
        for name in there:
            if name not in ours:
                raise ValueError(f"this model has {name}, which the ticket has not; {way}.")
        for part in ours, self.masks, self.frozen:
            for name, value in part.items():
                like = there.get(name)
                if not isinstance(value, Tensor) or not isinstance(like, Tensor) or is_lazy(like):
                    continue
                if value.shape != like.shape:
                    raise ValueError(
                        f"{name} has shape {tuple(value.shape)} in the ticket, but "
                        f"{tuple(like.shape)} in this model; {way}."
                    )

    def _start_of(self, model: nn.Module) -> dict[str, Any]:
        """`start` with tensors in place of sources."""
        made, like = dict(self.start), model.state_dict()
        for name, value in self._keyed_start().items():
            if name not in like or isinstance(value, Tensor):
                continue
            if isinstance(value, str) and value == "zero":
                made[name] = torch.zeros_like(like[name])
            elif isinstance(value, Seeded | SignOf):
                made[name] = drawn(name, value, like[name].shape)
                if self.rescale and name in self.masks:
                    mask = self.masks[name]
                    made[name] *= mask.numel() / max(1, int(mask.sum()))
        return made


def _without_masks(state: Mapping[str, Any]) -> dict[str, Any]:
    """A start without what masked layers have beside a weight: one may be a whole state_dict."""
    ours = "weight_mask", "weight_frozen"
    return {
        name: value
        for name, value in state.items()
        if not (name.rpartition(".")[2] in ours and name.rpartition("_")[0] in state)
    }


def restart(
    model: nn.Module, start: Mapping[str, Any], masks: Masks, frozen: Mapping[str, Tensor]
) -> nn.Module:
    """Load a dense start together with the masks: compact layers have no slots for all of it."""
    shared = {id(layer): name for name, layers in by_parameter(model) for layer in layers}
    state = dict(start)
    for prefix, layer in masked_modules(model, remove_duplicate=False):
        if shared[id(layer)] in masks:
            state[f"{prefix}weight_mask"] = masks[shared[id(layer)]]
    model.load_state_dict(state)
    return set_masks_(model, masks, frozen)


def trained(masks: Masks, released: bool) -> Masks:
    """The masks that a training runs under."""
    return Masks(
        {name: torch.ones_like(mask) for name, mask in masks.items()} if released else masks
    )
