"""From a compact Parameter to the layers and optimizers that hold it.

Of a layer, optimizers and hooks need to know `weight`, `kept`, `target`, `stepped`,
`weight_changed` and `fit_state`.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lottery_sparse.nn import registry

_holders = registry.compact
_optimizers: WeakSet = WeakSet()
_lenders: WeakSet = WeakSet()


def register(layer: Any) -> None:
    """Make the layer known as a holder of its `weight`."""
    _watch_steps()
    _holders.add(layer)


def holders_of(parameter: Tensor) -> list[Any]:
    """The compact layers whose Parameter this is; none for an ordinary one."""
    return _holders.of(parameter)


def twins_of(layer: Any) -> list[Any]:
    """The other compact layers with the Parameter of this one."""
    holders = holders_of(layer.weight)
    return [twin for twin in holders if twin is not layer and hasattr(twin, "_derived")]


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
    register_optimizer_step_pre_hook(before_step)


@registry.outside_graph
def before_step(optimizer: Optimizer) -> None:
    """Runs before every step of any torch optimizer, once a compact layer exists."""
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
