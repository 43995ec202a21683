"""Sparse models back to dense ones: layers, and state_dicts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from lottery_sparse.nn.compact.base import Compact
from lottery_sparse.nn.compact.layers import COMPACT_TYPES
from lottery_sparse.nn.forms.compacting import expand_layers_
from lottery_sparse.nn.forms.convert import (
    MASKED_TYPES,
    become,
    check_not_learned,
    check_own,
    check_tied,
    hooks_of_prune,
    masked_modules,
)
from lottery_sparse.nn.packed import PackedLinear
from lottery_sparse.nn.packed_formats import FORMATS
from lottery_sparse.pruning.names import prefix_of


def densify_layers_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """`ls.densify_` for masked, compact and packed layers."""
    check_not_learned(model)
    check_tied(model)
    known = {*MASKED_TYPES.values(), *COMPACT_TYPES.values(), PackedLinear}
    masked = list(masked_modules(model))
    packed = list(packed_modules(model))
    for prefix, layer in masked:
        for name in {"weight": None} | dict.fromkeys(_parametrized(layer)):
            check_own(prefix, layer, name)
        if layer.weight_mask.dim() != layer.rank:
            raise TypeError(
                f"{prefix[:-1] or 'the model itself'} holds several networks side by side, which "
                "have no dense layer; take one of them, ls.ensemble.select(model, e)."
            )
    for prefix, layer in [*masked, *packed]:
        if type(layer) not in known:
            raise TypeError(
                f"{prefix[:-1] or 'the model itself'} is a {type(layer).__name__}, which has no "
                "dense form: a subclass may behave in a way of its own; take its weights from "
                "ls.dense_state_dict."
            )
    if any(isinstance(layer, Compact) for _, layer in masked):
        expand_layers_(model, optimizer)
    with torch.no_grad():
        for _, layer in masked:
            layer.weight.copy_(layer.effective_weight)
    for _, layer in masked:
        layer._leave_masked()
        become(layer, layer.dense_type)
    for _, layer in packed:
        unpack_(layer)
    return model


def unpack_(layer: PackedLinear) -> None:
    """A class swap, as in `pack_`: hooks, name and identity stay."""
    layer._leave_packed()
    become(layer, nn.Linear)


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A state_dict that the dense model loads strictly: effective weights and biases, no masks.

    The tensors are live, as in any state_dict: they change as the model trains; clone what must
    stay. Packed weights are decoded: a ternary weight is exactly its magnitude times its signs.

    A parametrized weight of a masked layer (torch.nn.utils.parametrizations.weight_norm) becomes
    one tensor, for the dense model without the parametrization. The dense model with it would
    compute pruned weights anew.

    >>> dense().load_state_dict(ls.dense_state_dict(model))
    <All keys matched successfully>

    Raises:
        ValueError: a layer learns its mask, or layers share a weight under two masks.
        TypeError: hooks compute the weight of a masked layer (torch.nn.utils.weight_norm).
    """
    check_not_learned(model)
    check_tied(model)
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
    for prefix, layer in packed_modules(model, remove_duplicate=False):
        for name in FORMATS[layer.format].names:
            del state[prefix + name]
        state[f"{prefix}weight"] = layer.effective_weight
    return state


def packed_modules(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, PackedLinear]]:
    """(prefix ending in a dot, layer) of every packed layer."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, PackedLinear):
            yield prefix_of(name), module


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
    """Make a Parameter of a bias that torch.nn.utils.prune computes, zero where pruned."""
    if hooks_of_prune(module, "bias"):
        torch_prune.remove(module, "bias")
