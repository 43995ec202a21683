"""Kept weights as lists, and which layers hold a compact Parameter."""

from __future__ import annotations

import gc
import sys
from functools import cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# 16 bits hold a row or column number up to here; a kernel then reads half the bytes
NARROW = 2**16
# Positions are 32 bits, and kernels go beyond the last one by a vector.
MOST_SLOTS = 2**31 - 2**16


class KeptLists(NamedTuple):
    """Where the kept entries of a mask [N, K] or [E, N, K] are, by row and by column.

    Entries in row-major order fill the first slots of C; the other slots are spare and hold
    zeros. Column and row numbers are int16 (the bits of uint16) where those hold them, else int32.
    """

    starts: Tensor  # int64 [N + 1] or [E, N + 1]: row r holds slots starts[r] … starts[r + 1] - 1
    columns: Tensor  # [C] or [E, C]
    column_starts: Tensor  # int64 [K + 1] or [E, K + 1], into the entries ordered by column
    rows: Tensor  # [C] or [E, C], by column, ascending within one
    positions: Tensor  # int32 [C] or [E, C]: the slot of an entry by column

    @classmethod
    def of(cls, mask: Tensor, capacity: int | None = None) -> KeptLists:
        """The lists of a bool mask.

        Args:
            mask: [N, K] or [E, N, K], True = kept.
            capacity: slots C per network; None = as many as the fullest network needs.

        Raises:
            ValueError: not bool, not two or three dimensions, on the meta device, more kept
                entries than slots, or more slots than 32 bits count.
        """
        if mask.dtype != torch.bool or mask.dim() not in (2, 3):
            raise ValueError(
                f"mask must be bool [N, K] or [E, N, K], got {mask.dtype} {tuple(mask.shape)}."
            )
        if mask.is_meta:
            raise ValueError("mask is on the meta device, which holds no values to list; load it.")
        most = int(mask.flatten(-2).sum(-1).max()) if mask.numel() else 0
        slots = most if capacity is None else capacity
        if slots < most:
            raise ValueError(f"capacity is {slots}, but a network keeps {most} entries.")
        if max(slots, *mask.shape[-2:]) > MOST_SLOTS:
            raise ValueError(
                f"mask {tuple(mask.shape)} with {slots} slots is too large for lists of up to "
                f"{MOST_SLOTS} rows, columns and kept entries; split the layer, or leave it masked."
            )
        if mask.dim() == 2:
            return cls(*_lists(mask, slots))
        return cls(*map(torch.stack, zip(*(_lists(m, slots) for m in mask), strict=True)))

    @property
    def kept(self) -> Tensor:
        """Kept entries per network: int64, [] or [E]."""
        return self.starts[..., -1]


def _lists(mask: Tensor, slots: int) -> tuple[Tensor, ...]:
    narrow = max(mask.shape) <= NARROW
    row, column = mask.nonzero().unbind(1)
    by_column, order = torch.sort(column, stable=True)
    numbers = torch.int16 if narrow else torch.int32
    return (
        _starts(row, mask.shape[0]),
        _padded(column, slots, numbers),
        _starts(by_column, mask.shape[1]),
        _padded(row[order], slots, numbers),
        _padded(order, slots, torch.int32),
    )


def _starts(sorted_numbers: Tensor, count: int) -> Tensor:
    edges = torch.arange(count + 1, device=sorted_numbers.device)
    return torch.searchsorted(sorted_numbers, edges)


def _padded(values: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(slots, dtype=dtype, device=values.device)
    out[: len(values)] = values.to(dtype)  # int16 keeps the low 16 bits
    return out


# ---- from a compact Parameter to the layers and optimizers that hold it ------------------------


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


def find_optimizers() -> None:
    """Note every optimizer of this process that holds state for a compact Parameter.

    One that steps is known; one whose state was loaded, and which has not stepped since, is not.
    """
    if not _holders:
        return
    for found in gc.get_objects():
        if issubclass(type(found), Optimizer):  # isinstance would ask proxies what they stand for
            if not found.__dict__.get("state"):
                continue
            for group in found.param_groups:  # not the state's keys: LBFGS has one for all of them
                if any(holders_of(parameter) for parameter in group["params"]):
                    note_optimizer(found)


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
            holders = holders_of(parameter)
            if holders:
                note_optimizer(optimizer)
            for holder in holders:
                holder.written()


_prepare_outside_graph: Any = torch._disable_dynamo(_prepare)  # pyright: ignore
_tell_outside_graph: Any = torch._disable_dynamo(_tell_holders)  # pyright: ignore
