"""Ticket: masks, the frozen values of pruned weights, and the start of kept ones."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lottery_sparse.nn.forms.convert import (
    by_parameter,
    check_masked,
    check_not_learned,
    mask_layers_,
    masked_modules,
    masks_of,
    set_masks_,
)
from lottery_sparse.nn.forms.densify import densify_layers_, state_without_masks
from lottery_sparse.nn.frozen import Seeded, SignOf, drawn, keyed, prepare_frozen
from lottery_sparse.nn.supermask import Supermask
from lottery_sparse.pruning.mask_tensor import plain
from lottery_sparse.pruning.masks import Masks
from lottery_sparse.pruning.names import in_state, keys_of, matched
from lottery_sparse.text import shown
from lottery_sparse.tickets import file as ticket_file
from lottery_sparse.tickets import learned


@dataclass
class Ticket:
    """A lottery ticket: masks, the state that kept weights start from, and frozen values.

    A start may be a source instead of a tensor: `ls.frozen.Seeded`, `ls.frozen.SignOf` or "zero".
    With such starts a ticket is a mask and a seed.

    Attributes:
        masks: `ls.Masks`, by parameter name.
        start: a state_dict of the whole model, biases and buffers too, of tensors or sources.
        frozen: the values of pruned weights by name; a name left out means zero.
        history: a dict for each round: round, density, metrics.
        released: every weight trains (mask-0 "original"); masks only shape the start.
        rescale: drawn weights are multiplied by weights / kept.
        saved: where the ticket was loaded from.

    >>> ls.Ticket.of(model).save("ticket.safetensors")
    >>> ticket = ls.Ticket.load("ticket.safetensors").verify()
    >>> ls.masks_of(ticket.apply_(dense()))
    Masks(2 tensors, 44 of 220 kept)
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
        """The size of the ticket in bits, by part: "masks", "seeds" and "tensors"."""
        drawn_from = [v for v in self.start.values() if isinstance(v, Seeded | SignOf)]
        seeds = {v.source.seed if isinstance(v, SignOf) else v.seed for v in drawn_from}
        tensors = [v for part in (self.start, self.frozen) for v in part.values()]
        return {
            "masks": sum(8 * packed.numel() for packed in self.masks.to_bits().values()),
            "seeds": 64 * len(seeds),
            "tensors": sum(8 * v.nbytes for v in tensors if isinstance(v, Tensor)),
        }

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, sources: Mapping[str, Seeded | SignOf] | None = None) -> Ticket:
        """The ticket that a model holds now: its masks, frozen values, and what it computes with.

        >>> ls.Ticket.of(model).save("ticket.safetensors")

        Args:
            model: a model with masked, compact or supermask layers. Of the latter the masks are
                those that `masks_of` gives, and biases at 0 are stored as "zero".
            sources: for supermask layers, parameter name -> what its weight was drawn from, of all
                or some weights: then the ticket stores the seed instead of the weight, and is a
                mask and a seed.

        Raises:
            ValueError: the model has no such layer; a source gives other weights than the layer's,
                or names none; or some layers rescale and others do not.
        """
        if any(isinstance(module, Supermask) for module in model.modules()):
            masks, start, rescale = learned.masks_and_start(model, sources)
            return cls(masks, start, rescale=rescale)
        check_masked(model)
        if sources:
            raise ValueError("sources are those of supermask layers, and the model has none.")
        frozen = {
            name: torch.where(plain(layers[0].weight_mask), 0.0, layers[0].effective_weight)
            for name, layers in by_parameter(model)
            if layers[0].weight_frozen is not None
        }
        start = {name: value.clone() for name, value in state_without_masks(model).items()}
        return cls(masks_of(model), start, frozen)

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
        """Check the ticket against itself, and against its file; returns the ticket.

        - Starts and frozen values have the shapes of the masks.
        - The last record of `history` has the density of the masks.
        - A ticket that was loaded is as it was saved: masks and tensors bit by bit, and its seeds
          draw here what they drew on the machine that saved it.

        Digests find damage and mistakes. Whoever forges a file can forge its digests, too.

        Raises:
            ValueError: something is not as the ticket says; the message names it and the file.
        """
        where = "the ticket" if self.saved is None else shown(self.saved.path, most=4096)
        for name, mask in self.masks.items():
            if name not in self.start:
                raise ValueError(f"{where} has a mask of {shown(name)}, but no start for it.")
            for what, value in ("start", self.start[name]), ("frozen", self.frozen.get(name)):
                if isinstance(value, Tensor) and value.shape != mask.shape:
                    raise ValueError(
                        f"{where}: {what} of {shown(name)} must have the shape of its mask, "
                        f"{tuple(mask.shape)}, got {tuple(value.shape)}."
                    )
        if unknown := sorted(self.frozen.keys() - self.masks.keys()):
            raise ValueError(
                f"{where} has frozen values of {shown(unknown[0])}, but no mask for it."
            )
        ticket_file.check_frozen(self.frozen)
        said = self.history[-1].get("density") if self.history else None
        if said is not None and said != self.masks.density:
            raise ValueError(
                f"{where}: the last record of history says density {shown(said)}, but its masks "
                f"keep {self.masks.kept} of {self.masks.total} ({self.masks.density})."
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
            ValueError: the model learns its masks, has other names, shapes or kinds of numbers than
                the ticket, a layer that cannot be masked, too few slots in a compact layer, or is
                on the meta device; or the ticket has a start that cannot be made, or frozen values
                without a mask or of integers.

        Warns:
            UserWarning: a layer keeps no weight at all.

        Everything is checked before the first write: if this raises, nothing has changed. That also
        holds for warnings that are errors. Modules with a loading of their own may raise later;
        then the model gets its former state back.
        """
        check_not_learned(model)
        there = state_without_masks(model)
        ticket = self.named_as(model)
        ticket._check_names(there)
        start, masks = ticket._start_like(there), trained(ticket.masks, ticket.released)
        ticket._check_frozen(there)
        _check_layers(model, masks)
        for name, mask in masks.items():
            if not mask.any():
                warnings.warn(
                    f"{shown(name)} keeps no weight at all: a layer collapse.", stacklevel=2
                )
        before = None
        if any(map(_loads_in_its_own_way, model.modules())):
            before = copy.deepcopy(model.state_dict())
        new = ticket._mask_layers(model)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).* keeps no weight at all")  # said above
                return restart(model, start, masks, ticket.frozen)
        except BaseException:
            for layer in new:
                densify_layers_(layer)
            if before is not None:
                model.load_state_dict(before)
            raise

    def _mask_layers(self, model: nn.Module) -> list[nn.Module]:
        """Mask the layers that the ticket has masks of; returns those that were dense before.

        Raises:
            ValueError: a layer cannot be masked; then all layers are as they were.
        """
        before = {id(layer) for _, layer in masked_modules(model)}
        weights = {
            id(weight)
            for name, weight in model.named_parameters(remove_duplicate=False)
            if in_state(name) in self.masks
        }
        if weights:
            mask_layers_(model, lambda module, _: id(module.weight) in weights)
        new: list[nn.Module] = [m for _, m in masked_modules(model) if id(m) not in before]
        names = {name for name, _ in by_parameter(model)}
        if unmasked := [name for name in self.masks if name not in names]:
            for layer in new:
                densify_layers_(layer)  # whose weights are all kept: as it was
            raise ValueError(
                f"the ticket has a mask of {shown(unmasked[0])}, which is no weight of an "
                "nn.Linear or nn.Conv2d that can be masked in this model; give one of the same "
                "architecture."
            )
        return new

    def named_as(self, model: nn.Module) -> Ticket:
        """The ticket with the names of a model that is wrapped otherwise; its seeds draw the same.

        Names without a counterpart in the model stay as they are.

        Raises:
            ValueError: a name of the ticket may mean several of the model's.
        """
        state = state_without_masks(model)
        ours = dict.fromkeys([*_without_masks(self.start, state), *self.masks, *self.frozen])
        there = matched(ours, state, "the ticket")
        if all(name == now for name, now in there.items()):
            return self

        def now(name: str) -> str:  # an entry beside a weight: its mask or its frozen value
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
        """`start`, its sources with an explicit stream: that of their name in this ticket."""
        keys = keys_of(self.start)
        return {name: keyed(value, keys[name]) for name, value in self.start.items()}

    def _check_names(self, there: Mapping[str, Any]) -> None:
        """Raises ValueError if names or shapes differ from those of a model's state."""
        ours = _without_masks(self.start, there)
        ours |= {name: mask for name, mask in self.masks.items() if name not in ours}
        way = "give a model of the same architecture"
        for name in ours:
            if name not in there:
                raise ValueError(f"the ticket has {shown(name)}, which this model has not; {way}.")
        for name in there:
            if name not in ours:
                raise ValueError(f"this model has {shown(name)}, which the ticket has not; {way}.")
        if without := [name for name in self.masks if name not in self.start]:
            raise ValueError(
                f"the ticket has a mask of {shown(without[0])}, but no start for it; {way}."
            )
        for part in ours, self.masks, self.frozen:
            for name, value in part.items():
                like = there.get(name)
                if not isinstance(value, Tensor) or not isinstance(like, Tensor) or is_lazy(like):
                    continue
                if value.shape != like.shape:
                    raise ValueError(
                        f"{shown(name)} has shape {tuple(value.shape)} in the ticket, but "
                        f"{tuple(like.shape)} in this model; {way}."
                    )

    def _start_like(self, there: Mapping[str, Any]) -> dict[str, Any]:
        """The start of every entry of a model's state, with tensors in place of sources.

        Raises:
            ValueError: a start cannot be made, or has another kind of numbers than the model's.
        """
        made = {}
        for name, value in _without_masks(self._keyed_start(), there).items():
            like, said = there[name], f"the start of {shown(name)}"
            if not isinstance(like, Tensor):
                made[name] = value  # extra state, which its module understands
                continue
            if is_lazy(like) and (name in self.masks or not isinstance(value, Tensor)):
                raise ValueError(
                    f"{shown(name)} of this model has no shape yet; run one forward first."
                )
            if isinstance(value, str) and value == "zero":
                value = torch.zeros_like(like)
            elif isinstance(value, Seeded | SignOf):
                value = drawn(name, value, like.shape)
                if self.rescale and name in self.masks:
                    mask = self.masks[name]
                    value *= mask.numel() / max(1, int(mask.sum()))
            if not isinstance(value, Tensor):
                raise ValueError(
                    f'{said} must be a tensor, ls.frozen.Seeded, ls.frozen.SignOf or "zero", got '
                    f"{shown(repr(value), most=60)}."
                )
            if like.is_meta or value.is_meta:
                where = "this model" if like.is_meta else "the ticket"
                raise ValueError(
                    f"{shown(name)} of {where} is on the meta device, which holds no numbers; "
                    "call model.to_empty(device=...), or load the ticket, first."
                )
            if _kind(value) != _kind(like):
                raise ValueError(
                    f"{said} is {_kind(value)} ({value.dtype}), but {_kind(like)} ({like.dtype}) "
                    "in this model; convert it with .to(dtype)."
                )
            made[name] = value
        return made

    def _check_frozen(self, there: Mapping[str, Any]) -> None:
        """Raises ValueError if pruned weights of a model cannot hold the frozen values."""
        for name, source in self.frozen.items():
            if name not in self.masks:
                raise ValueError(
                    f"the ticket has frozen values of {shown(name)}, but no mask for it."
                )
            if isinstance(source, Tensor) and source.is_meta:
                raise ValueError(
                    f"frozen values of {shown(name)} are on the meta device, which holds no "
                    "numbers; load the ticket first."
                )
            try:
                if isinstance(there[name], Tensor):
                    prepare_frozen(shown(name), source, there[name])
            except TypeError as error:
                raise ValueError(str(error)) from None


# The name in checkpoints of torch.save is the public one, which stays where it is.
Ticket.__module__ = "lottery_sparse"
torch.serialization.add_safe_globals([Ticket, ticket_file.Saved])


def _check_layers(model: nn.Module, masks: Masks) -> None:
    """Raises ValueError if a model cannot be written to, or a masked layer cannot take its mask.

    A layer without a mask among `masks` gets the mask that keeps all.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if torch.is_inference_mode_enabled() or is_lazy(tensor):
            continue
        if tensor.is_inference():
            raise ValueError(
                f"{shown(name)} was made in torch.inference_mode, outside of which nothing can be "
                "written to it; copy the model outside of it first, copy.deepcopy(model)."
            )
    layers = by_parameter(model)
    for name, sharing in layers:
        for layer in sharing:
            every = torch.ones_like(layer.weight_mask)
            layer._check_mask(shown(name), masks.get(name, every), None)


def _kind(tensor: Tensor) -> str:
    """The kind of a tensor's numbers, in words."""
    return (
        "floating" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"
    )


def _loads_in_its_own_way(module: nn.Module) -> bool:
    """Whether code that is neither torch's nor ours takes part in loading a state_dict."""
    own = [
        method
        for method in ("load_state_dict", "_load_from_state_dict", "set_extra_state")
        if not getattr(type(module), method).__module__.startswith(("torch.", "lottery_sparse."))
    ]
    return bool(own or module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)


def _without_masks(state: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """A start without masks and frozen values, which it has if it is a state_dict of masked layers.

    An entry that `there`, a model's state without masks, has too is a buffer of the model's own.
    """
    ours = "weight_mask", "weight_frozen"
    return {
        name: value
        for name, value in state.items()
        if name in there
        or not (name.rpartition(".")[2] in ours and name.rpartition("_")[0] in state)
    }


def restart(
    model: nn.Module, start: Mapping[str, Any], masks: Masks, frozen: Mapping[str, Tensor]
) -> nn.Module:
    """Load a dense start together with the masks, since compact layers have no slots for all of it.

    Layers whose weights have no mask among `masks` keep all.
    """
    shared = {id(layer): name for name, layers in by_parameter(model) for layer in layers}
    state = dict(start)
    for prefix, layer in masked_modules(model, remove_duplicate=False):
        name = shared[id(layer)]
        every = torch.ones_like(layer.weight_mask)
        state[f"{prefix}weight_mask"] = masks.get(name, every)
    model.load_state_dict(state)
    return set_masks_(model, masks, frozen) if masks else model


def trained(masks: Masks, released: bool) -> Masks:
    """The masks that a training runs under."""
    return Masks(
        {name: torch.ones_like(mask) for name, mask in masks.items()} if released else masks
    )
