"""replicate and select: E networks side by side in one module, and one of them alone again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from lottery_sparse.nn.common import outside_inference_mode
from lottery_sparse.nn.compact.base import Compact
from lottery_sparse.nn.compact.layers import COMPACT_TYPES
from lottery_sparse.nn.compact.moving import most_kept
from lottery_sparse.nn.forms.compacting import shrink_layers_
from lottery_sparse.nn.forms.convert import become
from lottery_sparse.nn.frozen import Constant, FrozenState, prepare_frozen
from lottery_sparse.nn.masked import Masked, MaskedConv2d, MaskedLinear
from lottery_sparse.nn.supermask import Supermask, SupermaskConv2d, SupermaskLinear
from lottery_sparse.ops.masked.reference import effective_weight, linear
from lottery_sparse.pruning.mask_tensor import MaskTensor

# Modules that map each number by itself, so that leading dimensions do not matter.
ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.Dropout, nn.ELU, nn.GELU, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6,
    nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Tanh,
)  # fmt: skip
# Modules of [B, C, H, W] without parameters.
PER_IMAGE: tuple[type[nn.Module], ...] = (
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d,
)  # fmt: skip


def replicate(
    model: nn.Module | Sequence[nn.Module],
    E: int | None = None,
    seeds: Sequence[int] | None = None,
) -> nn.Module:
    """E networks side by side as one module: x [B, ...], shared, or [E, B, ...] -> [E, B, out].

    Parameters, masks and frozen values of linear, masked and compact layers get a leading
    dimension E; compact layers hold as many slots as the fullest network needs. Networks do not
    interact: with the sum over E of each network's mean as the loss, every network trains as it
    would alone, under any optimizer that works element by element.

    >>> models = ls.ensemble.replicate(model, seeds=[1, 2, 3])
    >>> models(x).shape  # [E, B, out]
    torch.Size([3, 8, 2])

    Args:
        model: an nn.Sequential (nested too) of linear and masked layers, elementwise modules,
            pooling and nn.Flatten, of which E copies are made; or a list of such models of equal
            structure. A single layer too. It is not changed.
        E: number of copies of one model; None = as many as there are seeds.
        seeds: a seed per copy: its layers are initialised anew by their `reset_parameters`, in
            order, as after torch.manual_seed(seed); pruned weights stay pruned.

    Returns:
        A new module. Where x could be shared or one per network, its first nn.Flatten takes it for
        shared, unless it is [E, B, K].

    Raises:
        TypeError: a module has no form for E networks; the message names it.
        ValueError: models that differ in structure, or arguments that contradict each other.
    """
    models = _models(model, E, seeds)
    names = [[f"{n} {type(m).__name__}" for n, m in inside(one)] for one in models]
    for e, other in enumerate(names):
        if other != names[0]:
            at = next((a for a, b in zip(names[0], other, strict=False) if a != b), "its length")
            raise ValueError(f"models[{e}] differs from models[0] in structure, at {at}.")
    owners: dict[int, str] = {}
    for name, module in inside(models[0]):
        _check(name, module)
        for parameter in module._parameters.values():
            if parameter is not None and owners.setdefault(id(parameter), name) != name:
                raise TypeError(
                    f"{name} shares a parameter with {owners[id(parameter)]}; replicate takes "
                    "layers with parameters of their own."
                )
    count = len(models) if seeds is not None or E is None else E
    plains = [map_modules(one, plain_copy) for one in models]
    if seeds is not None:
        for seed, plain in zip(seeds, plains, strict=True):
            _reset(plain, seed)
    if len(plains) < count:
        plains *= count
    return _side_by_side(plains, models, count)


def select(model: nn.Module, e: int) -> nn.Module:
    """Network e of a module from `replicate`, as a new module with Parameters of its own.

    >>> models = ls.ensemble.replicate(model, E=3)
    >>> torch.allclose(ls.ensemble.select(models, 1)(x), model(x), atol=1e-6)
    True

    Raises:
        ValueError: there is no such network, or the module holds only one.
    """
    counts = {c for _, m in inside(model) if (c := networks_of(m)) is not None}
    if len(counts) != 1:
        raise ValueError(
            "model holds a single network; select takes one from ls.ensemble.replicate."
        )
    count = counts.pop()
    if not 0 <= e < count:
        raise ValueError(f"e is {e}, but there are {count} networks: 0 to {count - 1}.")

    def one(layer: nn.Module) -> nn.Module:
        if isinstance(layer, _Flatten):
            return nn.Flatten(layer.start_dim, layer.end_dim)
        if isinstance(layer, _PerImage):
            return _bare(layer.inner)
        if networks_of(layer) is None:
            return _bare(layer)
        compact = isinstance(layer, Compact)
        new = plain_copy(layer)
        for key, parameter in new._parameters.items():
            if parameter is not None:
                new._parameters[key] = parameter_like(parameter.detach()[e].clone(), parameter)
        if isinstance(new, Masked):
            new._buffers["weight_mask"] = MaskTensor.of(
                outside_inference_mode(new.weight_mask[e].clone())
            )
            new._set_frozen(_held_of(layer, e))
            new.__dict__.pop("_sources", None)
        elif isinstance(new, Supermask):
            for key, buffer in new._buffers.items():
                new._buffers[key] = (
                    None if buffer is None else outside_inference_mode(buffer[e].clone())
                )
        elif type(new) is LinearNetworks:
            become(new, nn.Linear)
        return shrink_layers_(new) if compact else new

    return map_modules(model, one)


# ---- modules that know of E -------------------------------------------------------------------


class LinearNetworks(nn.Linear):
    """nn.Linear with weight [E, N, K] and bias [E, N]."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _Flatten(nn.Flatten):
    """[B, ...] -> [B, K], [E, B, ...] -> [E, B, K]."""

    def __init__(self, networks: int, features: int | None):
        super().__init__()
        self.networks, self.features = networks, features

    def forward(self, input: Tensor) -> Tensor:
        if self.features is None:  # after a layer: x is [E, B, ...]
            return input.flatten(2)
        return as_rows(input, self.networks, self.features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, networks={self.networks}"


class _PerImage(nn.Module):
    """A module of [B, C, H, W], for [E, B, C, H, W] too."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() < 5:
            return self.inner(input)
        return self.inner(input.flatten(0, 1)).unflatten(0, input.shape[:2])


def as_rows(x: Tensor, networks: int | None, features: int) -> Tensor:
    """The input of the first layer as [B, K], or with an x per network [E, B, K].

    Raises:
        ValueError: neither fits.
    """
    if x.dim() == 3 and x.shape[0] == networks and x.shape[2] == features:
        return x
    for leading in (1, 2):
        fits = x.dim() > leading and x.shape[leading:].numel() == features
        if fits and (leading == 1 or x.shape[0] == networks):
            return x.flatten(leading)
    raise ValueError(
        f"x has shape {tuple(x.shape)}, but the first layer has {features} inputs: expected "
        f"[B, ...]{'' if networks is None else f' or [{networks}, B, ...]'} with as many elements."
    )


# ---- making them ------------------------------------------------------------------------------


def _models(model: Any, count: int | None, seeds: Sequence[int] | None) -> list[nn.Module]:
    if count is not None and not isinstance(count, SupportsIndex):
        raise TypeError(f"E must be an int, the number of copies, got {type(count).__name__}.")
    if seeds is not None and (
        isinstance(seeds, str) or not all(isinstance(s, SupportsIndex) for s in seeds)
    ):
        raise TypeError(f"seeds must be ints, one per copy, got {seeds!r}.")
    if isinstance(model, nn.Module):
        if seeds is not None and count not in (None, len(seeds)):
            raise ValueError(f"E is {count}, but there are {len(seeds)} seeds; they must be equal.")
        number = len(seeds) if seeds is not None else count
        if number is None or number < 1:
            raise ValueError(f"E must be at least 1, or seeds given; got {count}.")
        return [model] * (number if seeds is not None else 1)
    models = list(model) if isinstance(model, Iterable) else []
    if not models or not all(isinstance(m, nn.Module) for m in models):
        raise TypeError("model must be an nn.Module or a list of at least one.")
    if seeds is not None or count not in (None, len(models)):
        raise ValueError(f"a list of {len(models)} models takes no seeds, and E only as that many.")
    return models


def inside(module: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """(name, module) inside nested Sequentials, in order; one that is used twice comes twice."""
    if type(module) is not nn.Sequential:
        return [(name or "the model", module)]
    prefix = f"{name}." if name else ""
    children: Any = module._modules.items()
    return [pair for n, m in children for pair in inside(m, prefix + n)]


def _check(name: str, module: nn.Module) -> None:
    known = (nn.Linear, nn.Flatten, MaskedLinear, MaskedConv2d, *COMPACT_TYPES.values())
    known = (*known, SupermaskLinear, SupermaskConv2d)
    if type(module) not in (*known, *ELEMENTWISE, *PER_IMAGE):
        hint = "call ls.sparsify_ first, or " if type(module) is nn.Conv2d else ""
        raise TypeError(
            f"{name} is a {type(module).__name__}, which has no form for networks side by side; "
            f"{hint}write the model as an nn.Sequential of masked layers, pooling and activations."
        )
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        raise TypeError(f"{name} is a {module}; replicate takes one of dimensions 1 to -1.")
    if networks_of(module) is not None:
        raise TypeError(f"{name} holds networks side by side already; select one first.")
    if isinstance(module, nn.Linear | Masked) and "weight" not in module._parameters:
        raise TypeError(f"{name} computes its weight; remove the parametrization first.")
    if isinstance(module, Masked | Supermask) and module.weight.is_meta:
        raise TypeError(f"{name} is on the meta device, which holds no mask; load it first.")


def networks_of(module: nn.Module) -> int | None:
    """E of a layer with a leading E, else None."""
    if isinstance(module, Masked):
        mask = module.weight_mask
        return mask.shape[0] if mask.dim() > module.rank else None
    if isinstance(module, Supermask):
        return module.key.shape[0] if module.key.dim() > 1 else None
    return module.weight.shape[0] if type(module) is LinearNetworks else None


def map_modules(module: nn.Module, change: Any) -> nn.Module:
    """A new tree of Sequentials, with every other module replaced by change(module)."""
    if type(module) is not nn.Sequential:
        return change(module)
    new = _bare(module)
    for name, child in module._modules.items():
        assert child is not None
        new._modules[name] = map_modules(child, change)
    return new


def _bare(module: nn.Module) -> nn.Module:
    """A new module that holds the same tensors, in dicts of its own."""
    new = type(module).__new__(type(module))
    new.__dict__ = {
        k: v.copy() if isinstance(v, dict | set) else v for k, v in vars(module).items()
    }
    if isinstance(new, Masked):
        new._rest = None  # its tensors will be its own
    return new


def parameter_like(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=like.requires_grad)


def plain_copy(module: nn.Module) -> nn.Module:
    """A new module with Parameters of its own; masked if the module is compact."""
    new = _bare(module)
    if isinstance(new, Compact):
        new._leave_compact()
        become(new, new.masked_type)
    for key, parameter in module._parameters.items():
        if parameter is not None and new._parameters[key] is parameter:
            new._parameters[key] = parameter_like(parameter.detach().clone(), parameter)
    if isinstance(new, Supermask):  # they are written to
        new._buffers = {k: None if b is None else b.clone() for k, b in new._buffers.items()}
    return new


def _reset(model: nn.Module, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for _, module in inside(model):
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            if isinstance(module, Supermask):
                module.reseed(seed)


def _side_by_side(plains: list[nn.Module], models: list[nn.Module], count: int) -> nn.Module:
    layers = [[module for _, module in inside(plain)] for plain in plains]
    before = [[module for _, module in inside(one)] for one in models]
    position = 0
    first = True  # no layer with parameters so far: x may be shared

    def stack(module: nn.Module) -> nn.Module:
        nonlocal position, first
        at, position = position, position + 1
        each = [one[at] for one in layers]
        if type(module) is nn.Flatten:
            following = (m for m in layers[0][at:] if isinstance(m, nn.Linear))
            features = next(following).in_features if first else None  # pyright: ignore
            return _Flatten(count, features)
        if type(module) in PER_IMAGE:
            return _PerImage(module)
        if not module._parameters:
            return module
        first = False
        new = _bare(module)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                values = [m._parameters[key].detach() for m in each]  # pyright: ignore
                if any(v.shape != values[0].shape for v in values):
                    raise ValueError(f"models differ in the shape of layer {at}.")
                new._parameters[key] = parameter_like(torch.stack(values), parameter)
        if isinstance(new, Supermask):
            _stack_buffers(new, each)
            return new
        if not isinstance(new, Masked):
            become(new, LinearNetworks)
            return new
        masks = torch.stack([m.weight_mask for m in each])  # pyright: ignore
        new._buffers["weight_mask"] = MaskTensor.of(outside_inference_mode(masks))
        held = [m._frozen_state() for m in each]  # pyright: ignore
        new._set_frozen(_stacked(held, each))
        sources = tuple("zero" if h.frozen is None else h.descriptor for h in held)
        new.__dict__["_sources"] = (new.weight_frozen, sources)
        original = [one[at] for one in before]
        if isinstance(original[0], Compact):
            capacity = max(layer.capacity for layer in original)  # pyright: ignore
            shrink_layers_(new, spare=max(0, capacity - most_kept(new.weight_mask, new.rank)))
        return new

    return map_modules(plains[0], stack)


def _stack_buffers(new: nn.Module, each: list[Any]) -> None:
    for option in ("rescale", "round_mask", "evaluation"):  # one for all networks of a layer
        if len(values := {getattr(m, option) for m in each}) > 1:
            raise ValueError(
                f"models differ in {option} of their learned masks: {sorted(values)}; make it the "
                "same in all of them first."
            )
    for key in new._buffers:
        values = [m._buffers[key] for m in each]
        if any(v is None for v in values) != all(v is None for v in values):
            raise ValueError(
                "some models hold a mask to evaluate with and others do not; call "
                "ls.learning.use_masks_ on all of them first."
            )
        new._buffers[key] = (
            None if values[0] is None else outside_inference_mode(torch.stack(values))
        )


def _stacked(held: list[FrozenState], layers: list[Any]) -> FrozenState:
    """The frozen values of E networks as one source."""
    if all(h.frozen is None for h in held):
        return FrozenState()
    common = held[0].descriptor
    if isinstance(common, Constant) and all(h.descriptor == common for h in held):
        return FrozenState(held[0].frozen, torch.stack([h.signs for h in held]), common)  # pyright: ignore
    nothing = [torch.zeros_like(layer.weight_mask) for layer in layers]
    return FrozenState(
        torch.stack(
            [
                effective_weight(
                    torch.zeros_like(m.weight).detach(), none, h.frozen, h.signs, m.rank
                )
                for m, none, h in zip(layers, nothing, held, strict=True)
            ]
        )
    )


def _held_of(layer: Any, e: int) -> FrozenState:
    """The frozen values of network e, with the descriptor it came with."""
    held = layer._frozen_state()
    if held.frozen is None:
        return FrozenState()
    frozen, sources = layer.__dict__.get("_sources", (None, ()))
    source = sources[e] if frozen is held.frozen else held.descriptor
    if source == "zero":
        return FrozenState()
    if isinstance(source, Constant):
        return prepare_frozen("weight", source, layer.effective_weight.detach()[e])
    return FrozenState(held.frozen[e].clone(), None, source)
