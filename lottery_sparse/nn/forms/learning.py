"""Learned masks of whole models: make supermask layers, choose their masks, fix these."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lottery_sparse.nn.forms.convert import become, masks_of, owners_of, refusal_of, why_unmasked
from lottery_sparse.nn.masked import Masked, MaskedConv2d, MaskedLinear
from lottery_sparse.nn.supermask import (
    EVALUATIONS,
    Supermask,
    SupermaskConv2d,
    SupermaskLinear,
)
from lottery_sparse.ops.random.op import as_seed, stream_of
from lottery_sparse.pruning.masks import Masks
from lottery_sparse.pruning.names import keys_of, matched, prefix_of

SUPERMASK_TYPES: dict[type[nn.Module], type[Supermask]] = {
    nn.Linear: SupermaskLinear,
    nn.Conv2d: SupermaskConv2d,
}
FIXED_TYPES: dict[type[nn.Module], type[Masked]] = {
    SupermaskLinear: MaskedLinear,
    SupermaskConv2d: MaskedConv2d,
}


def supermask_layers_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool],
    seed: int | torch.Generator | None,
    **options: Any,
) -> nn.Module:
    """`ls.supermask_` for dense layers."""
    seed = as_seed(seed)
    owners = owners_of(model)
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, tuple(SUPERMASK_TYPES))
        and not isinstance(module, Masked | Supermask)
        and filter_fn(module, name)
    }
    if not chosen:
        raise ValueError(f"model has no layer to learn a mask for; {_why_none(model)}.")
    for name, module in chosen.items():
        why = refusal_of(model, name, module)
        if not why and len(owners[id(module.weight)]) > 1:
            why = "its weight is shared with another layer"
        if why:
            raise TypeError(
                f"{name or 'the model itself'} cannot learn a mask: {why}; "
                "or leave it out with filter_fn."
            )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    scores = {name: f"{prefix_of(name)}score" for name in chosen}
    keys = keys_of(scores.values())
    for name, module in chosen.items():
        become(module, SUPERMASK_TYPES[type(module)])
        assert isinstance(module, Supermask)
        module._enter_supermask(**options, seed=seed, stream=stream_of(keys[scores[name]]))
    return model


def _why_none(model: nn.Module) -> str:
    if any(isinstance(m, Supermask) for m in model.modules()):
        return "its layers learn masks already; ls.densify_ takes the masks away"
    return why_unmasked(model) or "filter_fn left out every layer that could have one"


def use_masks_(model: nn.Module, masks: str | int | Mapping[str, Tensor]) -> nn.Module:
    """Choose the masks that supermask layers evaluate with (model.eval()), and `masks_of` gives.

    >>> ls.supermask_(model).eval()
    >>> ls.learning.use_masks_(model, "threshold")  # one mask, the same in every call
    >>> torch.equal(model(x), model(x))
    True

    Args:
        masks: "sample": a fresh mask in every call; "threshold": the weights more probable than
            not; a number i: evaluation sample i, the same whenever it is asked for; or masks by
            parameter name, as from `masks_of`. Numbers and masks stay until the next choice.

    The choice is part of the state_dict, so a loaded model evaluates as the saved one did.
    Training draws its masks as before.

    Returns:
        `model`.

    Raises:
        ValueError: the model has no supermask layer, or `masks` is none of these.
    """
    layers = learned_layers(model)
    if isinstance(masks, str):
        if masks not in EVALUATIONS:
            raise ValueError(
                f"masks must be {' or '.join(EVALUATIONS)}, a number or masks by name; "
                f"got {masks!r}."
            )
        for layer in layers.values():
            layer.evaluation = masks
            layer.evaluate_with(None)
        return model
    if isinstance(masks, Mapping):
        there = matched(masks, layers, "masks")
        given = Masks({there[name]: mask for name, mask in masks.items()})
        for name, layer in layers.items():
            if name not in given or given[name].shape != layer.score.shape:
                got = tuple(given[name].shape) if name in given else "none"
                raise ValueError(
                    f"masks must hold {name} of shape {tuple(layer.score.shape)}, got {got}."
                )
        for name, layer in layers.items():
            layer.evaluate_with(given[name])
        return model
    if isinstance(masks, bool) or not isinstance(masks, int) or masks < 0:
        raise ValueError(f"a sample has a number, at least 0, got {masks!r}.")
    for layer in layers.values():
        layer.evaluate_with(layer.sample(masks))
    return model


def sampled(model: nn.Module, samples: int) -> Iterator[Masks]:
    """Go through `samples` evaluation samples of the masks; each is yielded while it is in use.

    >>> ls.supermask_(model).eval()
    >>> accuracies = [accuracy(model) for masks in ls.learning.sampled(model, 10)]

    A sample is a function of the scores, the seed and its number. Afterwards the model evaluates
    as before, and its training draws as if nothing had happened.
    """
    layers = learned_layers(model).values()
    before = [layer.held_mask for layer in layers]
    try:
        for number in range(samples):
            use_masks_(model, number)
            yield masks_of(model)
    finally:
        for layer, held in zip(layers, before, strict=True):
            layer.held_mask = held


@torch.no_grad()
def fix_masks_(
    model: nn.Module,
    masks: str | int | Mapping[str, Tensor] | None = None,
    leaves: Collection[int] = (),
) -> nn.Module:
    """Turn supermask layers into masked ones; the weights are multiplied by what rescales them.

    Args:
        masks: as for `use_masks_`, except that "sample" is sample 0; None: those of `masks_of`.
        leaves: ids of layers that stay as they are.
    """
    layers = {name: m for name, m in learned_layers(model).items() if id(m) not in leaves}
    for name, layer in layers.items():
        if type(layer) not in FIXED_TYPES:
            raise TypeError(
                f"{name} belongs to a {type(layer).__name__}, a subclass with behaviour of its "
                "own, which a masked layer would lose."
            )
    if masks is not None:
        use_masks_(model, 0 if isinstance(masks, str) and masks == "sample" else masks)
    for layer in layers.values():
        module: Any = layer
        mask = layer.weight_mask.clone()
        if layer.rescale:
            own = tuple(range(-layer.rank, 0))
            size = mask.shape[-layer.rank :].numel()
            layer.weight.mul_(size / mask.sum(own, keepdim=True).clamp(min=1))
        layer._leave_supermask()
        become(module, FIXED_TYPES[type(layer)])
        module._enter_masked(mask)
    return model


def learned_layers(model: nn.Module) -> dict[str, Supermask]:
    """Parameter name of the weight -> layer.

    Raises:
        ValueError: there is none.
    """
    layers = {
        f"{prefix_of(name)}weight": module
        for name, module in model.named_modules()
        if isinstance(module, Supermask)
    }
    if not layers:
        raise ValueError("model has no supermask layer; call ls.supermask_ first.")
    return layers
