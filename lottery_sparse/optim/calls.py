"""Plans of optimizer steps, which last from call to call, and the tensors of one call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lottery_sparse.nn.compact import registry
from lottery_sparse.nn.registry import compact
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.eager import has_node

_HALVES = (torch.float16, torch.bfloat16)


@dataclass
class StepPlan:
    """Parameters of a group that one call of a kernel steps."""

    backend: str | None  # "cpu", "triton", "cuda"; None: torch's own step
    params: list[Tensor]
    layers: list[list[weakref.ref]]  # per Parameter: the compact layers that hold it
    refused: list[bool]  # per Parameter: the kernel does not take it

    def refuse(self, parameters: list[Tensor]) -> list[Tensor]:
        """Remember Parameters that the kernel did not take; returns them."""
        for parameter in parameters:
            self.refused[next(i for i, p in enumerate(self.params) if p is parameter)] = True
        return parameters


@dataclass
class GroupPlan:
    """The Parameters of a group, sorted by the backend that steps them."""

    params: list[Tensor]
    plans: list[StepPlan]
    forced: str | None
    registrations: int

    @classmethod
    def of(cls, params: list[Tensor], optimizer: Any, forced: str | None) -> GroupPlan:
        registrations = compact.count
        twice = len(set(map(id, params))) < len(params)
        plans: dict[Any, StepPlan] = {}
        for parameter in params:
            holders = registry.holders_of(parameter)
            if holders:
                registry.note_optimizer(optimizer)
                holders[0].fit_state(optimizer)
            backend = None if twice else _backend_of(parameter, forced, bool(holders))
            key = backend and (backend, parameter.device, parameter.dtype)
            plan = plans.setdefault(key, StepPlan(backend, [], [], []))
            plan.params.append(parameter)
            plan.layers.append([weakref.ref(holder) for holder in holders])
            plan.refused.append(backend is None)
        return cls(list(params), list(plans.values()), forced, registrations)

    def holds(self, params: list[Tensor], forced: str | None) -> bool:
        return (
            self.registrations == compact.count
            and self.forced == forced
            and len(self.params) == len(params)
            and all(map(is_, self.params, params))
        )


def _backend_of(parameter: Tensor, forced: str | None, kept: bool) -> str | None:
    """The backend whose kernel steps the Parameter, if its tensors turn out to fit.

    On a GPU, dense Parameters are left to torch until a run has shown that ours is faster; kept
    ones are ours, since their new values go on into the effective weight.
    """
    if not (
        type(parameter) in (Parameter, Tensor)
        and parameter.layout == torch.strided
        and parameter.is_contiguous()
    ):
        return None
    kind, dtype = parameter.device.type, parameter.dtype
    if forced is None and kind != "cpu" and not kept:
        return None
    name = forced or ("cpu" if kind == "cpu" else "triton")
    devices, narrow = dispatch.BACKENDS[name].devices, name != "cpu" and dtype in _HALVES
    if not (kind in devices and (dtype == torch.float32 or narrow) and dispatch.built(name)):
        return None
    return name if kind != "cuda" or dispatch.fits(name, parameter.device) else None


_NONE = torch.empty(0)


class Call:
    """The tensors of one call of a kernel, Parameter by Parameter."""

    __slots__ = (
        "columns", "effective", "grads", "group", "layers", "op", "options", "owners", "params",
        "plan", "starts", "states",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        plan: StepPlan,
        group: dict[str, Any],
        states: int,
        options: tuple[Any, ...],
    ) -> None:
        self.op = op_of(name, plan.backend)  # pyright: ignore[reportArgumentType]
        self.plan, self.group, self.options = plan, group, options
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: tuple[list[Tensor], ...] = tuple([] for _ in range(states))
        self.effective: list[Tensor] = []
        self.starts: list[Tensor] = []
        self.columns: list[Tensor] = []
        self.owners: list[int] = []  # position of each target's Parameter
        self.layers: list[Any] = []

    def add_targets(self, references: list[weakref.ref]) -> None:
        """Add the targets of the Parameter that was added last."""
        parameter, owner = self.params[-1], len(self.params) - 1
        for reference in references:
            layer: Any = reference()
            # the dict of nn.Module, which is quicker than its attributes
            if layer is None or layer._parameters.get("weight") is not parameter:
                continue
            kept, dense = layer.kept, layer.target
            # without an effective weight, a target only says which slots are kept
            self.effective.append(_NONE if dense is None else dense)
            self.starts.append(kept.starts)
            self.columns.append(kept.columns)
            self.owners.append(owner)
            self.layers.append(layer)

    def drop(self, position: int) -> Tensor:
        """Takes one Parameter out."""
        for tensors in (self.grads, *self.states):
            del tensors[position : position + 1]  # SGD without momentum has no state
        for t in reversed(range(len(self.owners))):
            if self.owners[t] == position:
                for held in (self.effective, self.starts, self.columns, self.owners, self.layers):
                    del held[t]
            elif self.owners[t] > position:
                self.owners[t] -= 1
        return self.params.pop(position)

    def prepare(self) -> None:
        """Takes the memory that the call needs, before another one is run."""
        if self.plan.backend == "triton":
            dispatch.function("prepare_step", "triton")(
                self.params, self.grads, self.states, self.effective, self.starts, self.columns,
                self.owners,
            )  # fmt: skip

    def run(self, strict: bool) -> list[Tensor]:
        """Calls the kernel; returns the Parameters that it does not take.

        If it is `strict`, one of these is enough to step none.
        """
        refused = []
        while self.params and not (strict and refused):
            position = self.op(
                self.params, self.grads, *self.states, self.effective, self.starts, self.columns,
                self.owners, *self.options,
            )  # fmt: skip
            if position < 0:
                torch.autograd.graph.increment_version(self.params + self.effective)
                for layer in self.layers:
                    layer.stepped()
                break
            refused.append(self.drop(position))
        return self.plan.refuse(refused)


def adam_state(parameter: Tensor, dtype: torch.dtype, device: Any = "cpu") -> dict[str, Tensor]:
    """The state of Adam before its first step, as torch makes it."""
    return {
        "step": torch.zeros((), dtype=dtype, device=device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


@functools.cache
def op_of(name: str, backend: str) -> Callable:
    """An op of a backend, the one of the kernel library in the quickest form that was built."""
    if backend == "cpu" and has_node():  # then _eager is loaded
        return getattr(torch.ops.lottery_sparse_eager, name).default
    return dispatch.function(name, backend)
