"""Masked models back to dense ones: layers, and state_dicts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from lottery_sparse.convert import (
    MASKED_TYPES,
    become,
    check_not_learned,
    check_own,
    hooks_of_prune,
    masked_modules,
)


def densify_(model: nn.Module) -> nn.Module:
    """Turn masked layers back into nn.Linear and nn.Conv2d that hold the effective weights.

    In place; Parameters keep their identity. The masks are gone: further training refills pruned
    weights. Returns `model`.

    Raises:
        ValueError: a layer learns its mask.
        TypeError: a layer computes its weight (weight_norm), or is a subclass with behaviour of its
            own, which a dense layer would lose.
    """
    check_not_learned(model)
    layers = []
    for prefix, layer in masked_modules(model):
        for name in {"weight": None} | dict.fromkeys(_parametrized(layer)):
            check_own(prefix, layer, name)
        if type(layer) not in MASKED_TYPES.values():
            raise TypeError(
                f"{prefix[:-1] or 'the model itself'} is a {type(layer).__name__}, which has no "
                "dense form of its own; take its weights from ls.dense_state_dict, or call "
                "ls.expand_ first if it is compact."
            )
        layers.append(layer)
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(layer.effective_weight)
    for layer in layers:
        become(layer, layer.dense_type)
        for name in ("weight_mask", "weight_frozen", "weight_signs"):
            del layer._buffers[name]
            layer._non_persistent_buffers_set.discard(name)
        del layer._frozen_descriptor, layer._rest
    return model


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A state_dict that the dense model loads strictly: effective weights and biases, no masks.

    What a parametrization of a masked layer computes (torch.nn.utils.parametrizations.weight_norm)
    is in it as one tensor, for the dense model without that parametrization: one with it would
    compute pruned weights anew.

    Raises:
        ValueError: a layer learns its mask.
        TypeError: hooks compute the weight of a masked layer (torch.nn.utils.weight_norm).
    """
    check_not_learned(model)
    layers = list(masked_modules(model, remove_duplicate=False))
    for prefix, layer in layers:
        if "weight" not in _parametrized(layer):
            check_own(prefix, layer, "weight")
    state = state_without_masks(model)
    for prefix, layer in layers:
        for name in _parametrized(layer):
            for part in [n for n in state if n.startswith(f"{prefix}parametrizations.{name}.")]:
                del state[part]
            value = layer.effective_weight if name == "weight" else getattr(layer, name)
            state[prefix + name] = value.detach()
        if hooks_of_prune(layer, "bias"):
            original, mask = (state.pop(f"{prefix}bias_{part}") for part in ("orig", "mask"))
            state[f"{prefix}bias"] = original * mask.to(original.dtype)
    return state


def state_without_masks(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict, dense: effective weights, without their masks and frozen values."""
    state = model.state_dict()
    for prefix, _ in masked_modules(model, remove_duplicate=False):
        for name in ("weight_mask", "weight_frozen"):
            state.pop(prefix + name, None)
    return state


def _parametrized(layer: nn.Module) -> list[str]:
    """The tensors of a layer that torch.nn.utils.parametrize computes."""
    return (
        list(getattr(layer, "parametrizations", ())) if parametrize.is_parametrized(layer) else []
    )


def settle_bias(module: nn.Module) -> None:
    """Where torch.nn.utils.prune computes the bias, what it leaves of it becomes the Parameter."""
    if hooks_of_prune(module, "bias"):
        torch_prune.remove(module, "bias")
