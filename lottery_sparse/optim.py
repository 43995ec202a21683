"""SGD, Adam and AdamW of torch.optim, with a step that is one call of a CPU kernel.

Each is a subclass of torch's and takes its place: same arguments, same state, same hooks, same
schedulers, state_dicts in both directions. `step` updates all contiguous float32 Parameters on the
CPU in one call, which also writes the new values of compact Parameters (`ls.compact_`) into the
dense effective weights of their layers. Spare slots of compact Parameters are not touched.

What the kernel does not take goes through torch's own step: other devices and dtypes, sparse
gradients, subclasses of Tensor, amsgrad, capturable, differentiable, tensors as hyperparameters,
gradient scaling inside a fused step, any backend but "cpu" if one is forced. Under torch.compile
a step runs as it is, outside the graph: a compiled function that takes steps breaks its graph there
and goes on, and with fullgraph=True it fails (compile the loss alone, and step outside).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import Parameter
from torch.optim.optimizer import (
    Optimizer,
    _get_scalar_dtype,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from lottery_sparse import backends, compact
from lottery_sparse.ops import compact as products


def _unhooked(step: Any) -> Callable:
    """A step method of torch without the wrapper that runs hooks: here, ours does."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _hooked(step: Callable) -> Callable:
    """torch's wrapper of step methods, but only for calls that it has something to do for.

    It tells the profiler of the step and runs hooks. The first takes 6 us, profiling or not.
    """
    full: Any = Optimizer.profile_hook_step(step)

    # a compiled function breaks its graph here: traced, an effective weight would stay stale
    outside_graph = torch._disable_dynamo(full)  # pyright: ignore[reportPrivateImportUsage]

    @functools.wraps(step)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return outside_graph(self, *args, **kwargs)
        if type(self).step is not run:  # a subclass's own step, which torch has wrapped
            return step(self, *args, **kwargs)
        quiet = not (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _profiler_enabled()
        )
        if quiet and all(
            hook is compact._after_step for hook in _global_optimizer_post_hooks.values()
        ):  # which has nothing to do: the step itself refreshes
            return step(self, *args, **kwargs)
        return full(self, *args, **kwargs)

    run.__dict__["hooked"] = True  # what torch asks
    return run


@dataclass
class _Plan:
    """What is known of a group's Parameters from one step to the next."""

    params: list[Tensor]
    layers: list[list[weakref.ref]]  # per Parameter: the compact layers that hold it
    refused: list[bool]  # per Parameter: the kernel does not take it
    registrations: int

    @classmethod
    def of(cls, params: list[Tensor], optimizer: Any) -> _Plan:
        registrations = compact.registrations()
        layers = []
        for parameter in params:
            holders = compact.holders_of(parameter)
            if holders:
                compact.note_optimizer(parameter, optimizer)
            layers.append([weakref.ref(holder) for holder in holders])
        twice = len(set(map(id, params))) < len(params)
        return cls(list(params), layers, [twice or not _may_take(p) for p in params], registrations)

    def refuse(self, parameters: list[Tensor]) -> list[Tensor]:
        """Remembers what the kernel did not take."""
        for parameter in parameters:
            self.refused[next(i for i, p in enumerate(self.params) if p is parameter)] = True
        return parameters

    def holds(self, params: list[Tensor]) -> bool:
        return (
            self.registrations == compact.registrations()
            and len(self.params) == len(params)
            and all(map(is_, self.params, params))
        )


def _may_take(parameter: Tensor) -> bool:
    return (
        type(parameter) in (Parameter, Tensor)
        and parameter.device.type == "cpu"
        and parameter.dtype == torch.float32
        and parameter.layout == torch.strided
        and parameter.is_contiguous()
    )


_NONE = torch.empty(0)


class _Call:
    """The tensors of one call of the kernel, Parameter by Parameter."""

    __slots__ = ("columns", "effective", "grads", "layers", "owners", "params", "starts", "states")

    def __init__(self, states: int) -> None:
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: tuple[list[Tensor], ...] = tuple([] for _ in range(states))
        self.effective: list[Tensor] = []
        self.starts: list[Tensor] = []
        self.columns: list[Tensor] = []
        self.owners: list[int] = []  # position of each target's Parameter
        self.layers: list[Any] = []

    def add_targets(self, references: list[weakref.ref]) -> None:
        """Those of the Parameter that was added last."""
        parameter, owner = self.params[-1], len(self.params) - 1
        for reference in references:
            layer: Any = reference()
            # the dicts of nn.Module, which are quicker than its attributes
            if layer is None or layer._parameters.get("weight") is not parameter:
                continue
            buffers = layer._buffers
            # without an effective weight, a target only says which slots are kept
            self.effective.append(_NONE if layer.lags else buffers["weight_effective"])
            self.starts.append(buffers["kept_starts"])
            self.columns.append(buffers["kept_columns"])
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

    def run(self, op: Callable, options: tuple[Any, ...]) -> list[Tensor]:
        """Calls the kernel; returns the Parameters that it does not take."""
        refused = []
        while self.params:
            position = op(
                self.params, self.grads, *self.states, self.effective, self.starts, self.columns,
                self.owners, *options,
            )  # fmt: skip
            if position < 0:
                torch.autograd.graph.increment_version(self.params + self.effective)
                for layer, owner in zip(self.layers, self.owners, strict=True):
                    if not layer.lags:
                        object.__setattr__(layer, "fresh_version", self.params[owner]._version)
                break
            refused.append(self.drop(position))
        return refused


class _KernelStep:
    """What the steps share; comes before the class of torch among the bases."""

    state: Any
    param_groups: list[dict[str, Any]]
    _torch_step: Callable
    _plans: tuple[_Plan | None, ...] = ()

    def _plain(self, group: dict[str, Any]) -> bool:
        """Whether the kernel knows what the group's options ask for."""
        raise NotImplementedError

    def _step_plan(self, plan: _Plan, group: dict[str, Any]) -> list[Tensor]:
        """Steps what the kernel takes; returns the other Parameters."""
        raise NotImplementedError

    def step(self, closure: Any = None) -> Any:
        """One step of all Parameters that have a gradient.

        Args:
            closure: computes the loss anew, with gradients; called once, before the step.

        Returns:
            What `closure` returns, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._kernel_runs():
            self._step_by_torch(self.param_groups)
            return loss
        was_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        try:
            left = [rest for i in range(len(self.param_groups)) for rest in self._step_group(i)]
        finally:
            torch.set_grad_enabled(was_enabled)
        if left and backends.forced():
            raise RuntimeError(
                f"{type(self).__name__}.step cannot run on the forced backend cpu for "
                f"{sum(len(group['params']) for group in left)} of the Parameters; it takes "
                "contiguous float32 tensors on the CPU and numbers as options."
            )
        if left:
            self._step_by_torch(left)
        return loss

    step = _hooked(step)

    def _kernel_runs(self) -> bool:
        # a GradScaler leaves these for fused steps
        scaled = "grad_scale" in self.__dict__ or "found_inf" in self.__dict__
        return not scaled and backends.forced() in (None, "cpu") and backends.built("cpu")

    def _step_group(self, i: int) -> list[dict[str, Any]]:
        """Steps what the kernel takes; the other Parameters come back as a group."""
        group = self.param_groups[i]
        params = group["params"]
        if not self._plain(group):
            return [group]
        if len(self._plans) != len(self.param_groups):
            self._plans = (None,) * len(self.param_groups)
        plan = self._plans[i]
        if plan is None or not plan.holds(params):
            plan = _Plan.of(params, self)
            self._plans = (*self._plans[:i], plan, *self._plans[i + 1 :])
        rest = self._step_plan(plan, group)
        return [dict(group, params=rest)] if rest else []

    def _step_by_torch(self, groups: list[dict[str, Any]]) -> None:
        held = self.param_groups
        self.param_groups = groups
        try:
            self._torch_step()
        finally:
            self.param_groups = held
        for group in groups:
            for parameter in group["params"]:
                for holder in compact.holders_of(parameter):
                    compact.written(holder)  # a fused step of torch raises no version


def _numbers(*values: Any) -> bool:
    return not any(isinstance(value, Tensor) for value in values)


class SGD(_KernelStep, torch.optim.SGD):
    """Stochastic gradient descent, torch.optim.SGD with a quicker step.

    With g the gradient (negated if `maximize`), for each Parameter w:

        g ← g + weight_decay · w
        b ← momentum · b + (1 − dampening) · g      (b ← g in the first step)
        w ← w − lr · (g + momentum · b if nesterov, else b; g if momentum = 0)

    Arguments, groups and state (`momentum_buffer`) are torch's. `foreach` and `fused` choose
    nothing where the kernel runs.
    """

    _torch_step = _unhooked(torch.optim.SGD.step)

    def _plain(self, group: dict[str, Any]) -> bool:
        return not group["differentiable"] and _numbers(group["lr"], group["weight_decay"])

    def _step_plan(self, plan: _Plan, group: dict[str, Any]) -> list[Tensor]:
        momentum = group["momentum"]
        calls = _Call(1), _Call(1)  # with a momentum buffer, and in their first step
        rest = []
        for parameter, layers, refused in zip(plan.params, plan.layers, plan.refused, strict=True):
            grad = parameter.grad
            if grad is None:
                continue
            if refused:
                rest.append(parameter)
                continue
            call = calls[0]
            if momentum != 0:
                buffer = self.state[parameter].get("momentum_buffer")
                if buffer is None:
                    call, buffer = calls[1], torch.empty_like(parameter)
                call.states[0].append(buffer)
            call.params.append(parameter)
            call.grads.append(grad)
            if layers:
                call.add_targets(layers)
        options = (
            group["lr"], momentum, group["dampening"], group["weight_decay"], group["nesterov"],
            group["maximize"],
        )  # fmt: skip
        for first, call in enumerate(calls):
            if not call.params:
                continue
            refused = call.run(_op("sgd_step"), (*options, bool(first)))
            rest += plan.refuse(refused)
            if first:
                for parameter, buffer in zip(call.params, call.states[0], strict=True):
                    self.state[parameter]["momentum_buffer"] = buffer
        return rest


class _AdamStep(_KernelStep):
    def _plain(self, group: dict[str, Any]) -> bool:
        if group["amsgrad"] or group["capturable"] or group["differentiable"]:
            return False
        return _numbers(group["lr"], group["weight_decay"], *group["betas"])

    def _step_plan(self, plan: _Plan, group: dict[str, Any]) -> list[Tensor]:
        call, state = _Call(3), self.state
        params, grads, (first, second, steps) = call.params, call.grads, call.states
        rest = []
        for parameter, layers, refused in zip(plan.params, plan.layers, plan.refused, strict=True):
            grad = parameter.grad
            if grad is None:
                continue
            if refused:
                rest.append(parameter)
                continue
            held = state[parameter]
            if not held:
                held["step"] = torch.zeros((), dtype=_get_scalar_dtype(group["fused"]))
                held["exp_avg"] = torch.zeros_like(parameter)
                held["exp_avg_sq"] = torch.zeros_like(parameter)
            params.append(parameter)
            grads.append(grad)
            first.append(held["exp_avg"])
            second.append(held["exp_avg_sq"])
            steps.append(held["step"])
            if layers:
                call.add_targets(layers)
        if params:
            options = (
                group["lr"], *group["betas"], group["eps"], group["weight_decay"],
                group["decoupled_weight_decay"], group["maximize"],
            )  # fmt: skip
            rest += plan.refuse(call.run(_op("adam_step"), options))
        return rest


class Adam(_AdamStep, torch.optim.Adam):
    """Adam, torch.optim.Adam with a quicker step.

    With g the gradient (negated if `maximize`), for each Parameter w and its step t = 1, 2, …:

        g ← g + weight_decay · w
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        w ← w − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)

    With `decoupled_weight_decay` g stays as it is and w ← (1 − lr · weight_decay) w goes before.
    Arguments, groups and state (`step`, `exp_avg`, `exp_avg_sq`) are torch's. `foreach` and `fused`
    choose nothing where the kernel runs; `amsgrad` is torch's own step.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980.
    """

    _torch_step = _unhooked(torch.optim.Adam.step)


class AdamW(_AdamStep, torch.optim.AdamW):
    """Adam with decoupled weight decay, torch.optim.AdamW with a quicker step.

    `Adam` with w ← (1 − lr · weight_decay) w before the step, instead of weight decay in g.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
    """

    _torch_step = _unhooked(torch.optim.AdamW.step)


@functools.cache
def _op(name: str) -> Callable:
    """An op of the kernel library, in the quickest form that was built."""
    if products.has_node():  # then _eager is loaded
        return getattr(torch.ops.lottery_sparse_eager, name).default
    return getattr(backends.load("cpu"), name)
