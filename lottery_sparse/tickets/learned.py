"""The parts of a ticket of a model with learned masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lottery_sparse.nn.forms.convert import masks_of
from lottery_sparse.nn.forms.learning import learned_layers
from lottery_sparse.nn.frozen import Seeded, SignOf, drawn, keyed
from lottery_sparse.pruning.masks import Masks
from lottery_sparse.pruning.names import keys_of, matched


@torch.no_grad()
def masks_and_start(
    model: nn.Module, sources: Mapping[str, Seeded | SignOf] | None
) -> tuple[Masks, dict[str, Any], bool]:
    """The masks of `masks_of`, the start (tensors or sources), and whether layers rescale.

    See `Ticket.of`.
    """
    layers, sources = learned_layers(model), sources or {}
    there = matched(sources, layers, "sources")
    sources = {there[name]: source for name, source in sources.items()}
    unknown = sources.keys() - layers.keys()
    if unknown:
        raise ValueError(f"sources names {min(unknown)}, but weights are: {', '.join(layers)}.")
    rescales = {layer.rescale for layer in layers.values()}
    if len(rescales) > 1:
        raise ValueError("some layers rescale and others do not; a ticket does it for all or none.")
    masks = masks_of(model)
    start: dict[str, Any] = {}
    keys = keys_of(model.state_dict())
    learned = {"score", "key", "sample_key", "evaluates_with", "held_mask"}
    for name, value in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        weight = f"{prefix}.weight" if prefix else "weight"
        if weight in layers and last in learned:
            continue
        if name in sources:
            made = drawn(name, keyed(sources[name], keys[name]), value.shape)
            made = made.to(value.device, value.dtype)
            if not torch.equal(made, value):
                raise ValueError(
                    f"the source of {name} gives other weights than the layer holds "
                    f"({int((made != value).sum())} of {value.numel()} differ)."
                )
            start[name] = sources[name]
        elif name in layers and layers[name].rescale:
            ones = masks[name].sum().clamp(min=1)
            start[name] = value * (masks[name].numel() / ones)
        elif weight in layers and last == "bias" and not value.any():
            start[name] = "zero"
        else:
            start[name] = value.clone()
    return masks, start, rescales.pop()
