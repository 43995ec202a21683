"""Slots of compact Parameters whose copies have different masks.

Slot n holds the weight of the n-th kept entry of the mask. An average of two vectors of slots means
something only if both vectors belong to one mask. So when a layer takes another mask, its live
copies note what their slots hold. A copy that then takes the new mask moves its weights to their
new slots. A copy whose slots were written since, by anything but an optimizer or a load, mixes
weights of two masks, and is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lottery_sparse.nn import registry
from lottery_sparse.nn.compact.moving import Watch, version_of
from lottery_sparse.pruning import mask_tensor
from lottery_sparse.pruning.mask_tensor import MaskTensor, plain

MIXED = (
    "the slots of this {kind} of {shape} were written after it, or a layer that it is a copy of, "
    "took another mask: an average that goes slot by slot would mix different weights. Call "
    "ls.set_masks_ on the average, too, whenever the model's masks change; or average masked "
    "models (ls.sparsify_); or start the average anew by load_state_dict(model.state_dict()). "
    "If this is no average and its numbers are meant, call ls.nn.refresh_ on it."
)


class Slots(NamedTuple):
    """The contents of a Parameter when its slots last matched the lists of its layer."""

    version: int
    watch: Watch

    @classmethod
    def of(cls, layer: Any) -> Slots:
        return cls(version_of(layer.weight), Watch(layer.weight.detach(), layer.kept.starts))

    def were_written(self, weight: Tensor) -> bool:
        return version_of(weight) != self.version or self.watch.sees_a_write(weight.detach())


def leave_copies(layer: Any, mask: Tensor) -> None:
    """Make the live copies of a layer note their slots, before the layer takes another mask."""
    old = plain(layer.weight_mask)
    if torch.equal(old, mask.to(old.device, torch.bool)):
        return
    for other in registry.compact.all():
        if (
            other.weight is layer.weight
            or other._derived.slots_before is not None
            or other.weight.is_meta
        ):
            continue
        mask, fits = plain(other.weight_mask), other.weight.shape == layer.weight.shape
        if fits and mask.shape == old.shape and torch.equal(mask, old.to(mask.device)):
            other._derived.slots_before = Slots.of(other)


def check(layer: Any) -> None:
    """Check that the noted slots of a layer still match its lists or its new mask.

    Raises:
        RuntimeError: the slots were written, and no live layer with the same mask has the same.
    """
    if not layer._derived.slots_before.were_written(layer.weight):
        return
    if not _are_copied(layer, _age(layer)):
        text = MIXED.format(kind=type(layer).__name__, shape=tuple(layer.weight_mask.shape))
        raise RuntimeError(text)
    layer._derived.slots_before = None


def _age(layer: Any) -> int | None:
    """When the layer's mask was chosen; None: somebody put a tensor of torch in its place."""
    mask = layer.weight_mask
    return mask.age[0] if isinstance(mask, MaskTensor) else None


def _are_copied(layer: Any, age: int | None) -> bool:
    """Whether a live layer with a mask of this age has the same slots."""
    for other in registry.compact.all():
        if other is not layer and age is not None and _age(other) == age:
            weight, mine = other.weight.detach(), layer.weight.detach()
            if weight.shape == mine.shape and torch.equal(weight.to(mine), mine):
                return True
    return False


def _mask_is_written(mask: MaskTensor, source: MaskTensor | None) -> None:
    """Called before a mask takes the one of `source`, and after any other write to a mask."""
    for layer in registry.compact.all():
        if getattr(layer.weight_mask, "age", None) is not mask.age or layer.weight.is_meta:
            continue
        if source is not None and _are_copied(layer, source.age[0]):
            layer._derived.slots_before = None  # everything is
        elif layer._derived.slots_before is None:
            layer._derived.slots_before = Slots.of(layer)


mask_tensor.watchers.append(_mask_is_written)
