"""SGD, Adam and AdamW of torch.optim, with a step that is one call of a kernel.

Each class is a subclass of torch's and takes its place, with the same arguments, state, hooks and
schedulers, and state_dicts in both directions. `step` updates all contiguous float32 Parameters on
the CPU in one call. On CUDA one launch updates all Parameters of a device and dtype, float16 and
bfloat16 among them. `step` also writes the new values of compact Parameters (`ls.compact_`) into
the dense effective weights of their layers. It does not touch spare slots of compact Parameters.

On CUDA a step can be captured in a graph: SGD as it is, Adam with `capturable` or `fused`, where
one more launch counts the steps; `lr` may then be a float32 tensor on the device.

`param_groups` sorts the Parameters of a model by whether weight decay is for them.

What the kernels do not take goes through torch's own step: other devices and dtypes, sparse
gradients, subclasses of Tensor, amsgrad, differentiable, other tensors as hyperparameters, gradient
scaling inside a fused step, the backends "reference" and "dense" if forced. Under
torch.compile a step runs as it is, outside the graph: a compiled function that takes steps breaks
its graph there and goes on, and with fullgraph=True it fails (compile the loss alone, and step
outside).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lottery_sparse.nn.compact import registry
from lottery_sparse.nn.registry import after_step, masked, put_to_rest
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.torch_private import (
    disable_dynamo,
    global_post_hooks,
    global_pre_hooks,
    profiler_is_enabled,
    step_dtype,
)
from lottery_sparse.optim.calls import Call, GroupPlan, StepPlan, adam_state


def _unhooked(step: Any) -> Callable:
    """A step method of torch without torch's wrapper that runs hooks; ours runs them."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _hooked(step: Callable) -> Callable:
    """A step method that goes through torch's wrapper only if somebody needs it.

    The wrapper tells the profiler of the step, which takes 6 us without profiling too, and runs
    hooks.
    """
    full: Any = Optimizer.profile_hook_step(step)

    # a compiled function breaks its graph here: traced, an effective weight would stay stale
    outside_graph = disable_dynamo(full)

    @functools.wraps(step)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return outside_graph(self, *args, **kwargs)
        if type(self).step is not run:  # a subclass's own step, which torch has wrapped
            return step(self, *args, **kwargs)
        watched = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or profiler_is_enabled()
        )
        if not watched and _only_ours():
            registry.take_back()
            loss = step(self, *args, **kwargs)  # which tells compact layers by itself
            if masked:
                put_to_rest(self)
            return loss
        return full(self, *args, **kwargs)

    run.__dict__["hooked"] = True  # what torch asks
    return run


def _only_ours() -> bool:
    """Whether nobody but this package has hooks on the steps of all optimizers."""
    before, after = global_pre_hooks.values(), global_post_hooks.values()
    return all(hook is registry.before_step for hook in before) and all(
        hook is after_step for hook in after
    )


_WITH_KERNELS = (None, "cpu", "triton", "cuda")  # backends that may be forced


class _KernelStep:
    """The common part of the steps; a base class, before the class of torch."""

    state: Any
    param_groups: list[dict[str, Any]]
    _torch_step: Callable
    _plans: tuple[GroupPlan | None, ...] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # pyright: ignore[reportAttributeAccessIssue]
        self._plans = ()  # load_state_dict brings other states

    def _plain(self, group: dict[str, Any], backend: str | None) -> bool:
        """Whether the kernel supports the options of the group."""
        raise NotImplementedError

    def _collect(self, plan: StepPlan, group: dict[str, Any], calls: list[Call]) -> list[Tensor]:
        """Add the calls for Parameters that the kernel takes; returns the other Parameters."""
        raise NotImplementedError

    def _note(self, call: Call) -> None:
        """Keep the states that a call has made."""

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
        forced = dispatch.forced()
        # a GradScaler leaves these for fused steps
        scaled = "grad_scale" in self.__dict__ or "found_inf" in self.__dict__
        if scaled or forced not in _WITH_KERNELS:
            self._step_by_torch(self.param_groups)
            return loss
        was_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        try:
            left, calls = [], []
            for i in range(len(self.param_groups)):  # memory first: if it runs out, nothing moved
                left += self._collect_group(i, forced, calls)
            if not (left and forced):
                if len(calls) > 1:
                    for call in calls:
                        call.prepare()
                for call in calls:
                    rest = call.run(strict=bool(forced))
                    if rest:
                        left.append(dict(call.group, params=rest))
                        if forced:
                            break
                    self._note(call)
        finally:
            torch.set_grad_enabled(was_enabled)
        if left and forced:
            raise RuntimeError(self._why_not(left, forced))
        if left:
            self._step_by_torch(left)
        return loss

    step = _hooked(step)

    def _collect_group(self, i: int, forced: str | None, calls: list[Call]) -> list[dict[str, Any]]:
        """Adds the calls of a group; Parameters that kernels do not take come back as a group."""
        group = self.param_groups[i]
        params = group["params"]
        if len(self._plans) != len(self.param_groups):
            self._plans = (None,) * len(self.param_groups)
        plan = self._plans[i]
        if plan is None or not plan.holds(params, forced):
            plan = GroupPlan.of(params, self, forced)
            self._plans = (*self._plans[:i], plan, *self._plans[i + 1 :])
        rest = []
        for part in plan.plans:
            plain = part.backend is not None and self._plain(group, part.backend)
            rest += self._collect(part, group, calls) if plain else part.params
        return [dict(group, params=rest)] if rest else []

    def _why_not(self, left: list[dict[str, Any]], forced: str) -> str:
        params = [parameter for group in left for parameter in group["params"]]
        built = dispatch.built(forced)
        reasons = (dispatch.unfit(forced, p.device) for p in params) if built else ()
        why = next(filter(None, reasons), None) or (
            "it takes contiguous float32 tensors on its device and numbers as options."
        )
        return (
            f"{type(self).__name__}.step cannot run on the forced backend {forced} for "
            f"{len(params)} of the Parameters: {why}"
        )

    def _step_by_torch(self, groups: list[dict[str, Any]]) -> None:
        held = self.param_groups
        self.param_groups = groups
        try:
            self._torch_step()
        finally:
            self.param_groups = held
        for group in groups:
            for parameter in group["params"]:
                for holder in registry.holders_of(parameter):
                    holder.weight_changed()  # a fused step of torch raises no version


def _numbers(*values: Any) -> bool:
    return not any(isinstance(value, Tensor) for value in values)


def _is_rate(lr: Any, backend: str | None) -> bool:
    """Whether the kernel reads such a learning rate: a number, or on CUDA a tensor."""
    return not isinstance(lr, Tensor) or (
        backend in ("triton", "cuda") and lr.dtype == torch.float32
    )


class SGD(_KernelStep, torch.optim.SGD):
    """Stochastic gradient descent, torch.optim.SGD with a quicker step.

    With g the gradient (negated if `maximize`), for each Parameter w:

        g ← g + weight_decay · w
        b ← momentum · b + (1 − dampening) · g      (b ← g in the first step)
        w ← w − lr · (g + momentum · b if nesterov, else b; g if momentum = 0)

    Arguments, groups and state (`momentum_buffer`) are torch's. `foreach` and `fused` choose
    nothing where the kernel runs.

    >>> ls.compact_(model)
    >>> train(model, ls.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    """

    _torch_step = _unhooked(torch.optim.SGD.step)

    def _plain(self, group: dict[str, Any], backend: str | None) -> bool:
        if group["differentiable"] or not _numbers(group["weight_decay"]):
            return False
        return _is_rate(group["lr"], backend)

    def _collect(self, plan: StepPlan, group: dict[str, Any], calls: list[Call]) -> list[Tensor]:
        momentum = group["momentum"]
        options = (
            group["lr"], momentum, group["dampening"], group["weight_decay"], group["nesterov"],
            group["maximize"],
        )  # fmt: skip
        held = Call("sgd_step", plan, group, 1, (*options, False))  # with a momentum buffer
        new = Call("sgd_step", plan, group, 1, (*options, True))  # in their first step
        rest = []
        for parameter, layers, refused in zip(plan.params, plan.layers, plan.refused, strict=True):
            grad = parameter.grad
            if grad is None:
                continue
            if refused:
                rest.append(parameter)
                continue
            call = held
            if momentum != 0:
                buffer = self.state[parameter].get("momentum_buffer")
                if buffer is None:
                    call, buffer = new, torch.empty_like(parameter)
                call.states[0].append(buffer)
            call.params.append(parameter)
            call.grads.append(grad)
            if layers:
                call.add_targets(layers)
        calls += [call for call in (held, new) if call.params]
        return rest

    def _note(self, call: Call) -> None:
        *_, first = call.options
        if first:
            for parameter, buffer in zip(call.params, call.states[0], strict=True):
                self.state[parameter]["momentum_buffer"] = buffer


class _AdamStep(_KernelStep):
    def _plain(self, group: dict[str, Any], backend: str | None) -> bool:
        if group["amsgrad"] or group["differentiable"]:
            return False
        if group["capturable"] and backend == "cpu":
            return False
        if not (group["capturable"] or group["fused"] or _numbers(group["lr"])):
            return False
        return _is_rate(group["lr"], backend) and _numbers(group["weight_decay"], *group["betas"])

    def _collect(self, plan: StepPlan, group: dict[str, Any], calls: list[Call]) -> list[Tensor]:
        options = (
            group["lr"], *group["betas"], group["eps"], group["weight_decay"],
            group["decoupled_weight_decay"], group["maximize"],
        )  # fmt: skip
        call, state = Call("adam_step", plan, group, 3, options), self.state
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
                beside = group["capturable"] or group["fused"]
                device = parameter.device if beside else "cpu"
                held |= adam_state(parameter, step_dtype(group["fused"]), device)  # all or nothing
            params.append(parameter)
            grads.append(grad)
            first.append(held["exp_avg"])
            second.append(held["exp_avg_sq"])
            steps.append(held["step"])
            if layers:
                call.add_targets(layers)
        if params:
            calls.append(call)
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

    >>> ls.compact_(model)
    >>> train(model, ls.optim.Adam(model.parameters(), lr=1e-3))

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980.
    """

    _torch_step = _unhooked(torch.optim.Adam.step)


class AdamW(_AdamStep, torch.optim.AdamW):
    """Adam with decoupled weight decay, torch.optim.AdamW with a quicker step.

    `Adam` with w ← (1 − lr · weight_decay) w before the step, instead of weight decay in g.

    >>> ls.compact_(model)
    >>> train(model, ls.optim.AdamW(ls.optim.param_groups(model, 0.01), lr=1e-3))

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
    """

    _torch_step = _unhooked(torch.optim.AdamW.step)
