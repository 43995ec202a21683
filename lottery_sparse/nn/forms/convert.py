"""Whole models: dense layers to masked ones, masks out and in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from lottery_sparse.nn.forms.weight_types import none_to_mask
from lottery_sparse.nn.frozen import FrozenState, Source, keyed, prepare_frozen
from lottery_sparse.nn.masked import Masked, MaskedConv2d, MaskedLinear, masked_alike
from lottery_sparse.nn.supermask import Supermask
from lottery_sparse.pruning.mask_tensor import plain
from lottery_sparse.pruning.masks import Masks, as_mask
from lottery_sparse.pruning.names import keys_of, matched, prefix_of
from lottery_sparse.text import shown

MASKED_TYPES: dict[type[nn.Module], type[Masked]] = {
    nn.Linear: MaskedLinear,
    nn.Conv2d: MaskedConv2d,
}


# Modules that read the weights of their children instead of calling them (some on a fast path) ->
# the way out, for the message.
READERS: dict[str, str] = {
    "MultiheadAttention": "use an attention module that calls nn.Linear layers of its own "
    "(F.scaled_dot_product_attention between them)",
    "TransformerEncoderLayer": "use an encoder layer that calls them, as "
    "nn.TransformerDecoderLayer does",
    "LinearCrossEntropyLoss": "use nn.Linear, then nn.CrossEntropyLoss",  # torch 2.13
}


def mask_layers_(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> nn.Module:
    """Dense layers to masked ones: `ls.sparsify_`, which see. Other forms stay as they are."""
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, tuple(MASKED_TYPES))
        and not _has_form(module)
        and (filter_fn is None or filter_fn(module, name))
    }
    skipped = _refusals(model, candidates)
    for name, why in skipped.items():
        warnings.warn(f"sparsify_ skipped {name or 'the model itself'}: {why}.", stacklevel=3)
    taken = [m for name, m in candidates.items() if name not in skipped]
    for module in taken:
        mask = _take_from_prune(module) if hooks_of_prune(module) else None
        become(module, MASKED_TYPES[type(module)])
        cast(Masked, module)._enter_masked(mask)
    swapped = {id(module) for module in taken}
    _match_tied_masks(model, swapped)
    if not skipped and not any(map(_has_form, model.modules())):
        why = why_unmasked(model) or "filter_fn left out every layer that could have a mask"
        warnings.warn(f"sparsify_ masked nothing: {why}.", stacklevel=3)
    return model


def _refusals(model: nn.Module, candidates: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name -> why it cannot be masked, of those of the layers that cannot."""
    owners = owners_of(model)
    pruned = [name for name, m in candidates.items() if hooks_of_prune(m)]
    refused = {
        name: why
        for name, m in candidates.items()
        if (why := refusal_of(model, name, m, name in pruned))
    }
    for name in pruned:
        shared = len(owners[id(candidates[name]._parameters["weight_orig"])]) > 1
        if shared and name not in refused:
            refused[name] = "torch.nn.utils.prune masks its weight, which another layer shares"
    masked = {id(m) for name, m in candidates.items() if name not in refused}
    for name, module in candidates.items():
        if name in refused or name in pruned:
            continue
        others = [
            f"{owner_name} ({type(owner).__name__})"
            for owner_name, owner in owners[id(module._parameters["weight"])]
            if id(owner) not in masked and not isinstance(owner, Masked)
        ]
        if others:
            refused[name] = f"its weight is shared with {', '.join(others)}, which has no mask"
    return refused


def _has_form(module: nn.Module) -> bool:
    """Whether the layer is in one of our forms, or holds networks side by side."""
    ours = type(module).__module__.startswith("lottery_sparse.")
    return isinstance(module, Masked | Supermask) or (ours and isinstance(module, nn.Linear))


def masks_of(model: nn.Module) -> Masks:
    """A copy of the model's masks by parameter name ("0.weight"); tied weights come once.

    Names are those of the model's state_dict, wrapped or not. A supermask layer gives the mask that
    `ls.learning.use_masks_` has chosen, else the weights more probable than not.

    >>> ls.masks_of(model)
    Masks(2 tensors, 44 of 220 kept)
    """
    found = {name: plain(layers[0].weight_mask).clone() for name, layers in by_parameter(model)}
    for name, module in model.named_modules():
        if isinstance(module, Supermask):
            found[f"{prefix_of(name)}weight"] = module.weight_mask.clone()
    return Masks(found)


def set_masks_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    frozen: Source | Mapping[str, Source] = "zero",
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Set masks and the values of pruned weights, by parameter name; in place.

    Mask buffers keep their identity, so a compiled model runs on without a new graph. Parameters
    that `masks` leaves out keep their masks. If anything is wrong, nothing is changed.

    `layer.weight` holds the frozen values in its pruned entries from here on, and a weight that
    becomes kept again goes on from what it held while it was pruned: zero, as in RigL and SET, or
    its frozen value. To rewind it, write to `layer.weight` after this call.

    Averages that are copies of the model:

    - An average that copies buffers or averages them (AveragedModel, timm) follows.
    - An average of Parameters alone stays under its masks: call `ls.set_masks_(average, masks)`.
    - An average of a compact model goes slot by slot, and always needs that call: slots of two
      masks stand for different weights. Without it the next use of the copy raises RuntimeError.
    - Vectors outside of any layer (Lookahead, lists of shadow Parameters) cannot be checked: start
      them anew.

    >>> ls.set_masks_(model, {"0.weight": torch.rand(10, 20) < 0.5})
    >>> pruned = ~ls.masks_of(model)["0.weight"]
    >>> bool((model[0].weight[pruned] == 0).all())
    True

    Args:
        model: a model with masked layers, see `sparsify_`.
        masks: parameter name -> tensor of the weight's shape holding 0 and 1, 1 = kept. Names of
            the model wrapped otherwise will do (torch.compile, DistributedDataParallel, FSDP).
        frozen: the values of pruned weights: "zero", a tensor, `ls.frozen.Constant(c)` (sign x
            constant, with the signs of the current weight) or `ls.frozen.Seeded(law, seed)`; or a
            dict of these by name, where a name left out means zero.
        optimizer: if given, its per-element state (momentum, moments) is zeroed where pruned; the
            state of compact layers moves with the kept weights. A compact layer requires it once
            an optimizer holds such state. Without it, that is an error where the optimizer has
            stepped in this process; one whose state was loaded and that has not stepped since is
            not known, and must be given.

    Returns:
        `model`.

    Raises:
        ValueError, TypeError: no masked layer, an unknown name, a wrong shape, a mask with other
            values, or one that keeps more weights than a compact layer has slots; for a compact
            layer, an optimizer with state that cannot move, such as the history of LBFGS.

    Warns:
        UserWarning: a layer keeps no weight at all.
    """
    check_masked(model)
    parameters = dict(by_parameter(model))
    checked = Masks(masks)
    there, known = matched(checked, parameters, "masks"), ", ".join(parameters)
    for name in checked:
        if there[name] not in parameters:
            raise ValueError(
                f"masks names {shown(name)}, but masked parameters are: {shown(known, most=2000)}."
            )
    sources: Mapping[str, Source] = dict.fromkeys(there.values(), cast(Source, frozen))
    if isinstance(frozen, Mapping):
        here = matched(frozen, there.values(), "frozen")
        for name in frozen:
            if here[name] not in there.values():
                raise ValueError(
                    f"frozen names {shown(name)}, but masks only: "
                    f"{shown(', '.join(checked), most=2000)}."
                )
        sources = {here[name]: source for name, source in frozen.items()}
    checked = Masks({there[name]: mask for name, mask in checked.items()})
    keys = keys_of(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer | None):
        raise TypeError(f"optimizer must be one of torch.optim, got {type(optimizer).__name__}.")
    held: dict[str, FrozenState] = {}
    for name, mask in checked.items():
        layer = parameters[name][0]
        if mask.shape != layer.weight_mask.shape:
            raise ValueError(
                f"mask of {name} has shape {tuple(mask.shape)}, but the weight has "
                f"{tuple(layer.weight_mask.shape)}; they must be equal."
            )
        if layer.weight_mask.is_meta:
            raise ValueError(
                f"{name} is on the meta device, which holds no mask; load weights or call "
                "to_empty first."
            )
        layer._check_mask(name, mask, optimizer)
        held[name] = prepare_frozen(
            name, keyed(sources.get(name), keys[name]), layer.effective_weight.detach()
        )
    for name, mask in checked.items():  # before the first write: a warning may be an error
        if not mask.any():
            warnings.warn(f"{name} keeps no weight at all: a layer collapse.", stacklevel=2)
    for name, mask in checked.items():
        layers = parameters[name]
        for layer in layers:
            layer._set_mask(mask, held[name], layers[0], optimizer)
    return model


LEARNED = "the model's masks are learned ones; call ls.sparsify_(model) first."


def check_masked(model: nn.Module) -> None:
    """Raises ValueError for a model without masked layers: `sparsify_` was forgotten or in vain."""
    kinds = [m for m in model.modules() if isinstance(m, Masked | Supermask)]
    if not kinds:
        why = why_unmasked(model) or "call ls.sparsify_(model) first"
        raise ValueError(f"the model has no masked layer; {why}.")
    if not any(isinstance(m, Masked) for m in kinds):
        raise ValueError(LEARNED)


def why_unmasked(model: nn.Module) -> str | None:
    """Why `sparsify_` can mask no layer of a dense model; None: it can mask one."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, tuple(MASKED_TYPES))}
    refused = _refusals(model, layers)
    return none_to_mask(model, refused) if len(refused) == len(layers) else None


def check_not_learned(model: nn.Module) -> None:
    """Raises ValueError if any layer of the model learns its mask."""
    if any(isinstance(m, Supermask) for m in model.modules()):
        raise ValueError(LEARNED)


def check_own(prefix: str, layer: nn.Module, tensor: str) -> None:
    """Raises TypeError where a tensor of the layer is computed, and not a Parameter of it."""
    if tensor in layer._parameters:
        return
    undo = "torch.nn.utils.remove_weight_norm(layer), or what else undoes it,"
    if parametrize.is_parametrized(layer, tensor):
        undo = f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{tensor}")'
    raise TypeError(f"{prefix}{tensor} is computed, and no Parameter; call {undo} first.")


def check_tied(model: nn.Module) -> None:
    """Raises ValueError for layers that share a weight under two masks, or two frozen sources.

    This package makes no such layers; a user who writes to their buffers can.
    """
    names = {id(layer): f"{prefix}weight" for prefix, layer in masked_modules(model)}
    for name, (first, *others) in by_parameter(model):
        for layer in others:
            if not (first.weight_mask.is_meta or masked_alike(first, layer)):
                raise ValueError(
                    f"{name} and {names[id(layer)]} are one weight under two masks, or two kinds "
                    f"of frozen values; call ls.set_masks_(model, {{{name!r}: mask}}), which sets "
                    "both, or give each layer a weight of its own first."
                )


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class in place: identity, Parameters, hooks and flags all stay."""
    module.__class__ = kind


def masked_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, Masked]]:
    """(prefix ending in a dot, layer) of every masked layer, by default each module once.

    Prefixes are those of the state_dict.
    """
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, Masked):
            yield prefix_of(name), module


def by_parameter(model: nn.Module) -> list[tuple[str, list[Masked]]]:
    """(name of the weight, the layers that share it), the name as the state_dict has it."""
    found: dict[int, tuple[str, list[Masked]]] = {}
    for prefix, layer in masked_modules(model):
        owner = layer._parameters.get("weight", layer)  # a parametrized weight is one layer's own
        found.setdefault(id(owner), (f"{prefix}weight", []))[1].append(layer)
    return list(found.values())


def _match_tied_masks(model: nn.Module, new: set[int]) -> None:
    """Give layers that share a weight one mask, that of the layer which was masked first."""
    for _, layers in by_parameter(model):
        right = next((layer for layer in layers if id(layer) not in new), layers[0])
        for layer in layers:
            if layer is not right:
                layer.weight_mask.copy_(right.weight_mask)
                layer._set_frozen(right._frozen_state())
                layer._rests_here()


def owners_of(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """id of a parameter -> (name, module) of all that hold it."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append((name, module))
    return owners


def hooks_of_prune(module: nn.Module, tensor: str = "weight") -> list[int]:
    """Keys of the forward pre-hooks by which torch.nn.utils.prune computes the weight, or bias."""
    return [
        key
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, torch_prune.BasePruningMethod) and hook._tensor_name == tensor
    ]


def _take_from_prune(module: nn.Module) -> Tensor:
    """Undo torch.nn.utils.prune, values under the mask included; the mask."""
    for key in hooks_of_prune(module):
        del module._forward_pre_hooks[key]
    mask = module._buffers.pop("weight_mask")
    assert mask is not None
    module._non_persistent_buffers_set.discard("weight_mask")
    del module.weight  # what the hook computed last
    others = {name: p for name, p in module._parameters.items() if name != "weight_orig"}
    module._parameters = {"weight": module._parameters["weight_orig"], **others}
    return as_mask("weight", mask)


def refusal_of(model: nn.Module, name: str, module: nn.Module, pruned: bool = False) -> str | None:
    """Why this layer cannot be masked, or None."""
    for parent in model.modules():  # by identity: a layer may be registered under other names too
        kind = _reader(parent)
        if kind and any(child is module for child in parent.children()):
            return (
                f"nn.{kind} reads its weight without calling it, so a mask would not hold; "
                f"to mask it, {READERS[kind]}, or leave it out with filter_fn"
            )
    weight = module._parameters.get("weight")
    if isinstance(weight, UninitializedParameter):
        return "its weight has no shape yet; run one forward first"
    if type(module) not in MASKED_TYPES:
        return f"{type(module).__name__} is a subclass with behaviour of its own"
    if pruned:
        try:
            as_mask(f"{name}.weight", cast(Tensor, module._buffers["weight_mask"]))
        except ValueError as error:
            return str(error).rstrip(".")
    elif weight is None:
        return "its weight is computed (weight_norm, torch.nn.utils.prune); remove that first"
    if "forward" in vars(module):
        return "its forward was replaced on the instance and may use the raw weight"
    return None


def _reader(parent: nn.Module) -> str | None:
    """The key of READERS that the module is an instance of."""
    kinds = ((name, getattr(nn, name, None)) for name in READERS)  # one of them: since torch 2.13
    return next((name for name, kind in kinds if kind and isinstance(parent, kind)), None)
