"""train_step: forward, loss, backward and optimizer step of a small network in one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lottery_sparse.nn.compact import following
from lottery_sparse.nn.compact.layers import CompactLinear
from lottery_sparse.nn.compact.registry import note_optimizer, take_back
from lottery_sparse.nn.forms.replicate import LinearNetworks, as_rows, inside
from lottery_sparse.nn.supermask import SupermaskLinear
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.limits import MAX_DENSITY_STEP, MAX_DENSITY_STEP_SAMPLED
from lottery_sparse.optim import optimizers
from lottery_sparse.optim.calls import adam_state
from lottery_sparse.pruning.mask_tensor import plain

OTHERWISE = "train it through the modules: loss.backward() and optimizer.step()"

_LISTS = len(KeptLists._fields) + 1  # and the mask


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[Tensor, Tensor], Tensor]:
    """A whole training step of a stack of linear layers as one call.

    The model is an nn.Sequential of an optional nn.Flatten and CompactLinear, nn.Linear or
    SupermaskLinear layers with nn.ReLU between them, float32 on the CPU; the loss is softmax
    cross-entropy, averaged over the batch. The result is that of

        loss = F.cross_entropy(model(x), y); loss.backward(); optimizer.step()

    in training mode, within float32 rounding. Parameters, optimizer state, effective weights and
    the keys of learned masks are updated in place; the masks are those that the modules would draw.
    For E networks side by side (`ls.ensemble.replicate`) the call makes E such steps; a network
    gets the same bits alone, in company, and with any number of threads. In small networks most of
    a step by modules is the overhead of their calls, which this call avoids.

    >>> ls.compact_(model)
    >>> step = ls.train_step(model, ls.optim.Adam(model.parameters()))
    >>> loss = step(x, y)

    Args:
        model: the network; forward hooks are not run.
        optimizer: SGD, Adam or AdamW of `torch.optim` or `ls.optim`, or a subclass with
            their `step`, without step hooks, over exactly the model's parameters (those that
            train). Its options are read in every call, so schedulers work; its state stays its
            own, so that steps by modules can follow.

    Returns:
        (x, y) -> loss: x [B, ...], or [E, B, ...] with inputs of each network's own; y int64 [B],
        or [E, B]; loss [], or [E].

    Raises:
        ValueError, TypeError: the op cannot do something in the model or the optimizer; the message
            says what.
        RuntimeError: raised by the step, if another backend than "cpu" is forced.
    """
    return _Step(model, optimizer)


class _Layer:
    """A layer's tensors as the op takes them, and the state of the layer when they were read."""

    def __init__(self, layer: nn.Linear):
        self.layer: Any = layer
        self.compact = isinstance(layer, CompactLinear)
        self.learned = isinstance(layer, SupermaskLinear)
        self.name = "score" if self.learned else "weight"  # of the Parameter that trains
        self.weight: nn.Parameter = layer._parameters[self.name]  # pyright: ignore
        self.bias = layer.bias
        self.addresses: tuple[int, ...] | None = None  # None: not looked up yet
        self.version = -1  # of the mask
        self.products: str | None = None  # as `ls.plan` has set it
        self.made: tuple[Any, ...] = (None,) * 4  # its lists, effective weight, mask, frozen values
        self.parameters: list[Tensor] = []  # weight and bias, detached
        self.effective = self.frozen = self.key = self.empty = torch.empty(0)
        self.lists: list[Tensor] = [self.empty] * _LISTS
        self.zero = True
        self.dense = True  # whether the op reads `effective`
        self.keep = False  # whether the op writes `effective`

    def look(self) -> bool:
        """Refresh the effective weight if the op reads it; whether a tensor was replaced."""
        # the dicts of nn.Module, which are quicker than its attributes
        held, buffers = self.layer._parameters, self.layer._buffers
        weight, bias = self.weight, self.bias
        if held[self.name] is not weight or held["bias"] is not bias:
            raise ValueError(
                "a parameter of a layer was replaced after train_step was called; call it anew, "
                "with an optimizer of the new parameters."
            )
        addresses = weight.data_ptr(), 0 if bias is None else bias.data_ptr()
        same = addresses == self.addresses and self.layer.__dict__.get("products") is self.products
        if self.compact:
            made, mask = self.layer._derived, buffers["weight_mask"]
            now = made.kept, made.dense, mask, buffers["weight_frozen"]
            same = same and all(map(is_, now, self.made)) and plain(mask)._version == self.version
            if not (same and made.is_current()):
                same = False
                self._list()
        if self.learned:
            frozen, key = held["weight"], buffers["key"]
            addresses = *addresses, frozen.data_ptr(), key.data_ptr()
            same = addresses == self.addresses
            if self.layer.round_mask:
                raise ValueError(f"a layer rounds its mask (round_mask=True); {OTHERWISE}.")
            self.frozen, self.key = frozen.detach(), key
        if not same:
            self.addresses = addresses
            self.parameters = [self.empty if p is None else p.detach() for p in (weight, bias)]
            if not self.compact and not self.learned:
                self.effective = self.parameters[0]
        if self.compact and self.dense:
            self.layer.refresh_if_stale(weight)
        return not same

    def _list(self) -> None:
        layer = self.layer
        following.follow(layer)
        mask, self.zero = layer.weight_mask, layer.zero
        self.lists, self.version = [*layer.kept, plain(mask)], plain(mask)._version
        self.products = layer.__dict__.get("products")
        most = int(layer.kept.starts[..., -1].max())
        size = layer.in_features * layer.out_features
        self.dense = not self.zero or most / max(size, 1) > MAX_DENSITY_STEP
        self.keep = self.dense or not layer.refreshes_lazily  # else made when someone reads it
        if self.keep:
            following.make_dense(layer)
            layer.refresh_if_stale(self.weight)
        self.effective = layer._derived.dense if self.keep else self.empty
        self.made = layer.kept, layer._derived.dense, mask, layer.weight_frozen


class _Step:
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        if not dispatch.built("cpu"):
            raise ValueError(f"train_step needs the native kernels; build them, or {OTHERWISE}.")
        dispatch.library_of("cpu")
        self.optimizer = optimizer
        layers = _stack(model)
        self.layers = [_Layer(layer) for layer in layers]
        self.adam = _is_adam(optimizer)
        _check_hooks(optimizer)
        for group in optimizer.param_groups:
            _check_options(group)
        self.parameters: list[Tensor | None] = []  # that train, two per layer
        for layer in self.layers:
            self.parameters += [layer.weight, None if layer.learned else layer.bias]
        self._check_parameters(model)
        first = self.layers[0]
        weight, single = first.weight, 1 if first.compact else 2
        self.networks = weight.shape[0] if weight.dim() > single else None
        self.empty = first.empty
        self.no_step = torch.zeros(1)
        self.arguments: tuple[Any, ...] = ()
        self.states: Any = None  # the optimizer's
        if any(layer.compact for layer in self.layers):
            note_optimizer(optimizer)

    def _check_parameters(self, model: nn.Module) -> None:
        held = [p for p in self.parameters if p is not None]
        frozen = {id(p) for layer in self.layers if layer.learned for p in _frozen(layer.layer)}
        groups = self.optimizer.param_groups
        stepped = [p for g in groups for p in g["params"] if id(p) not in frozen]
        if {id(p) for p in held} != {id(p) for p in stepped} or len(held) != len(stepped):
            raise ValueError(
                f"optimizer holds {len(stepped)} parameters, which are not the {len(held)} of the "
                f"model; build it from model.parameters() after ls.compact_, or {OTHERWISE}."
            )
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32 or not parameter.is_cpu:
                raise ValueError(
                    f"{name} is {parameter.dtype} on {parameter.device}, train_step takes float32 "
                    f"on the CPU; {OTHERWISE}."
                )
            if parameter.requires_grad == (id(parameter) in frozen):
                does = "does not require" if id(parameter) not in frozen else "requires"
                raise ValueError(f"{name} {does} a gradient; {OTHERWISE}.")

    def _check_call(self) -> None:
        name = dispatch.forced()
        if name is not None and name != "cpu":
            raise RuntimeError(
                f"train_step runs on the backend cpu only, but {name!r} is forced (ls.use_backend, "
                f"LS_BACKEND); force none, or {OTHERWISE}."
            )
        _check_hooks(self.optimizer)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self._check_call()
        take_back()
        single = self.networks is None
        features = self.layers[0].layer.in_features
        if x.dim() != 2 or x.shape[1] != features:
            x = as_rows(x, self.networks, features)
        if not (x.is_cpu and y.is_cpu):
            raise ValueError(
                f"x is on {x.device} and y on {y.device}, but train_step runs on the CPU; move "
                f"them, or {OTHERWISE}."
            )
        if y.dtype != torch.int64 or y.dim() not in ((1,) if single else (1, 2)):
            raise ValueError(
                f"y must be int64 class numbers, [B]{'' if single else ' or [E, B]'}, got "
                f"{y.dtype} {tuple(y.shape)}."
            )
        changed = [layer.look() for layer in self.layers]  # all of them, so no generator
        if any(changed):
            self._collect()
        parameters, effective, lists, zero, keep, learned, stepped, raised = self.arguments
        first, second, steps, rates = self._state()
        try:
            loss = torch.ops.lottery_sparse_native.train_step(
                x.detach() if x.requires_grad else x, y, parameters, first, second, steps,
                effective, lists, zero, keep, *learned, rates, self.adam, self.networks or 1,
                torch.get_num_threads(), (MAX_DENSITY_STEP, MAX_DENSITY_STEP_SAMPLED),
            )  # fmt: skip
        except RuntimeError as error:
            labels = str(error).partition("labels must be")[1:]
            if not any(labels):
                raise
            said = "".join(labels).splitlines()[0].rstrip(".")
            raise ValueError(f"{said}; ignore_index is not supported; {OTHERWISE}.") from None
        if not self.adam:  # only now, or a call that failed would have been the first step
            for parameter, momentum in zip(self.parameters, first, strict=True):
                if parameter is not None and momentum is not self.empty:
                    self.optimizer.state[parameter]["momentum_buffer"] = momentum
        self.optimizer._opt_called = True  # pyright: ignore  # what schedulers look at
        torch.autograd.graph.increment_version(raised)
        for layer, keep in stepped:
            if keep:
                layer.mark_fresh()
            else:
                layer.stepped()
        return loss

    def _collect(self) -> None:
        """The arguments of the op that stay from step to step."""
        layers = self.layers
        written = [layer for layer in layers if layer.keep]
        self.arguments = (
            [p for layer in layers for p in layer.parameters],
            [layer.effective for layer in layers],
            [t for layer in layers for t in layer.lists],
            [layer.zero for layer in layers],
            [layer.keep for layer in layers],
            (
                [layer.frozen for layer in layers],
                [layer.key for layer in layers],
                [layer.learned and layer.layer.rescale for layer in layers],
            ),
            [(layer.layer, layer.keep) for layer in layers if layer.compact],
            [p for p in self.parameters if p is not None] + [layer.effective for layer in written],
        )

    def _state(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]:
        """The optimizer's state, made where it is missing, and its options per parameter."""
        options = {}
        for group in self.optimizer.param_groups:
            options |= dict.fromkeys(map(id, group["params"]), (group, self._options(group)))
        first, second, steps, rates = [], [], [], []
        states = self.optimizer.state
        if states is not self.states:  # load_state_dict has brought others
            self.states = states
            for layer in self.layers:
                if layer.compact:
                    layer.layer.fit_state(self.optimizer)
        for parameter in self.parameters:
            if parameter is None:
                first.append(self.empty)
                second.append(self.empty)
                steps.append(self.no_step)
                rates += [0.0] * 7
                continue
            group, numbers = options[id(parameter)]
            state = states[parameter]
            rates += numbers
            if self.adam:
                if not state:  # all or nothing, if memory runs out
                    state |= adam_state(parameter, torch.float32)
                first.append(state["exp_avg"])
                second.append(state["exp_avg_sq"])
                steps.append(state["step"])
                continue
            momentum = state.get("momentum_buffer") if group["momentum"] else self.empty
            if momentum is None:
                momentum = torch.zeros_like(parameter)
                rates[-1] = 1.0  # the first step
            first.append(momentum)
            second.append(self.empty)
            steps.append(self.no_step)
        return first, second, steps, rates

    def _options(self, group: dict[str, Any]) -> list[float]:
        """The options of a group, as the op takes them."""
        _check_options(group)
        if not self.adam:
            names = "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"
            return [*(float(group[name]) for name in names), 0.0]
        decoupled = isinstance(self.optimizer, torch.optim.AdamW)
        rates = (
            group["lr"], *group["betas"], group["eps"], group["weight_decay"],
            group.get("decoupled_weight_decay", decoupled), group["maximize"],
        )  # fmt: skip
        return list(map(float, rates))


def _function(step: Any) -> Any:
    """The step method without the wrappers of torch and its schedulers."""
    return inspect.unwrap(getattr(step, "__func__", step))


_ADAM_STEPS, _SGD_STEPS = (
    {_function(kind.step) for kind in kinds}
    for kinds in (
        (torch.optim.Adam, torch.optim.AdamW, optimizers.Adam, optimizers.AdamW),
        (torch.optim.SGD, optimizers.SGD),
    )
)


def _is_adam(optimizer: torch.optim.Optimizer) -> bool:
    step = _function(optimizer.step)
    # by type, too: one function is the step of all in ls.optim
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and step in _ADAM_STEPS:
        return True
    if isinstance(optimizer, torch.optim.SGD) and step in _SGD_STEPS:
        return False
    known = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.SGD)
    raise TypeError(
        f"optimizer must be SGD, Adam or AdamW for train_step, got {type(optimizer).__name__}"
        f"{' with a step of its own' if known else ''}; {OTHERWISE}."
    )


def _check_hooks(optimizer: torch.optim.Optimizer) -> None:
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError(
            f"optimizer has step hooks, which train_step does not run; remove them, or {OTHERWISE}."
        )


def _check_options(group: dict[str, Any]) -> None:
    for option in ("amsgrad", "capturable", "differentiable"):
        if group.get(option):
            raise ValueError(
                f"optimizer has {option}=True, which train_step does not do; {OTHERWISE}."
            )


def _stack(model: nn.Module) -> list[nn.Linear]:
    """The layers of a Sequential of Flatten, then CompactLinear or Linear with ReLU between."""
    layers: list[nn.Linear] = []
    relu = True  # whether a layer may come next
    for i, (name, module) in enumerate(inside(model)):
        if isinstance(module, nn.Flatten) and (i, module.start_dim, module.end_dim) == (0, 1, -1):
            continue
        if isinstance(module, nn.ReLU) and layers and not relu:
            relu = True
        elif type(module) in (CompactLinear, SupermaskLinear, nn.Linear, LinearNetworks) and relu:
            if "weight" not in module._parameters:
                raise ValueError(f"{name} computes its weight; {OTHERWISE}.")
            assert isinstance(module, nn.Linear)
            layers.append(module)
            relu = False
        else:
            hint = "call ls.compact_ first, or " if "Linear" in _kind(module) else ""
            raise ValueError(
                f"{name} is a {_kind(module)}, but train_step takes an "
                f"nn.Sequential of Flatten and compact or plain linear layers with ReLU between; "
                f"{hint}{OTHERWISE}."
            )
    if not layers or relu:
        raise ValueError(f"the model must end in a linear layer; {OTHERWISE}.")
    if len({id(layer) for layer in layers}) < len(layers):
        raise ValueError(f"a layer stands twice in the model; {OTHERWISE}.")
    return layers


def _frozen(layer: nn.Linear) -> list[Tensor]:
    """The tensors of a layer with a learned mask that do not train."""
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


def _kind(module: nn.Module) -> str:
    return type(module).__name__
