"""From a compact Parameter to the layers and optimizers that hold it."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lottery_sparse.ops.compact.kept import KeptLists


class Holder(Protocol):
    """A compact layer, as far as optimizers and hooks need to know it."""

    weight: Parameter

    @property
    def weight_effective(self) -> Tensor: ...
    @property
    def kept(self) -> KeptLists: ...
    @property
    def target(self) -> Tensor | None:
        """The dense tensor that a step writes the new values into, too; None: there is none."""

    def stepped(self) -> None:
        """Called by a step that wrote `weight`, and `target` where there is one."""

    def written(self) -> None:
        """Called by what wrote `weight` alone."""

    def fit_state(self, optimizer: Optimizer) -> None:
        """Give an optimizer's state of `weight` the slots that it has here."""


# By the id of the Parameter, which each look-up compares: a weak reference to a Parameter would
# keep torch from swapping it (torch.__future__.set_swap_module_params_on_conversion).
_holders: dict[int, WeakSet] = {}
_most_holders = 64  # entries beyond which those without a layer are dropped
_optimizers: WeakSet = WeakSet()
_lenders: WeakSet = WeakSet()
_registrations = 0


def register(layer: Holder) -> None:
    """Make the layer known as a holder of its `weight`."""
    global _registrations, _most_holders
    _registrations += 1
    _watch_steps()
    _holders.setdefault(id(layer.weight), WeakSet()).add(layer)
    if len(_holders) > _most_holders:
        for key, layers in list(_holders.items()):
            if all(id(held.weight) != key for held in layers):
                del _holders[key]
        _most_holders = 64 + 2 * len(_holders)


def registrations() -> int:
    """Grows whenever `holders_of` may have more to say."""
    return _registrations


def holders_of(parameter: Tensor) -> list[Holder]:
    """The compact layers whose Parameter this is; none for an ordinary one."""
    return [h for h in _holders.get(id(parameter), ()) if h.weight is parameter]


def layers() -> list[Any]:
    """All compact layers that live in this process."""
    return [h for key, held in _holders.items() for h in held if id(h.weight) == key]


def lends(layer: Any) -> None:
    """Say that others may write to a tensor of the layer, which takes that over before a step."""
    _lenders.add(layer)


def lends_no_more(layer: Any) -> None:
    _lenders.discard(layer)


def optimizers_of(parameter: Tensor) -> list[Optimizer]:
    """The optimizers of a compact Parameter that have stepped one, or were found with state."""
    return [
        found
        for found in _optimizers
        if parameter in found.state
        or any(parameter is p for group in found.param_groups for p in group["params"])
    ]


def note_optimizer(optimizer: Optimizer) -> None:
    """Say that the optimizer may hold state for a compact Parameter."""
    _optimizers.add(optimizer)


@cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Runs before every step of any torch optimizer, once a compact layer exists."""
    if "torch._dynamo" in sys.modules:  # the step may be a part of what torch.compile compiles
        _prepare_outside_graph(optimizer)
    else:
        _prepare(optimizer)


def _prepare(optimizer: Optimizer) -> None:
    take_back()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for holder in holders_of(parameter)[:1]:
                note_optimizer(optimizer)
                holder.fit_state(optimizer)


def take_back() -> None:
    """Take over what others wrote to the tensors that layers have lent them."""
    for layer in list(_lenders):
        if not layer.take_back():
            _lenders.discard(layer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Runs after every step of any torch optimizer, once a compact layer exists.

    It does not ask the version counter: torch's fused optimizers write without raising it.
    """
    if "torch._dynamo" in sys.modules:
        _tell_outside_graph(optimizer)
    else:
        _tell_holders(optimizer)


def _tell_holders(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for holder in holders_of(parameter):
                holder.written()


_prepare_outside_graph: Any = torch._disable_dynamo(_prepare)  # pyright: ignore
_tell_outside_graph: Any = torch._disable_dynamo(_tell_holders)  # pyright: ignore
