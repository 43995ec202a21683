"""Slots of compact Parameters whose copies have different masks.

Slot n holds the weight of the n-th kept entry of the mask. An average of two vectors of slots means
something only if both vectors belong to one mask. So when a layer takes another mask, its live
copies note what their slots hold. A copy that then takes the new mask moves its weights to their
new slots. A copy whose slots were written since, by anything but an optimizer or a load, mixes
weights of two masks, and is refused.

Copies are found in families: layers of one shape whose masks keep the same columns as often. Only
they are compared, and not all compact layers that live.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from lottery_sparse.nn.compact.moving import Watch, check_optimizers, version_of
from lottery_sparse.nn.compact.registry import twins_of
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.compact.reference import gather_kept, kept_weight
from lottery_sparse.pruning.mask_tensor import MaskTensor, plain

MIXED = (
    "the slots of this {kind} of {shape} were written after it, or a layer that it is a copy of, "
    "took another mask: an average that goes slot by slot would mix different weights. Call "
    "ls.set_masks_ on the average, too, whenever the model's masks change; or average masked "
    "models (ls.sparsify_); or start the average anew by load_state_dict(model.state_dict()). "
    "If this is no average and its numbers are meant, call ls.nn.refresh_ on it."
)

# (shape, a number made of the kept columns) -> layers, which keep the set alive
_families: WeakValueDictionary[tuple[Any, ...], WeakSet[Any]] = WeakValueDictionary()


class Slots(NamedTuple):
    """The contents of a Parameter when its slots last matched the lists of its layer."""

    version: int
    watch: Watch

    @classmethod
    def of(cls, layer: Any) -> Slots:
        return cls(version_of(layer.weight), Watch(layer.weight.detach(), layer.kept.starts))

    def were_written(self, weight: Tensor) -> bool:
        return version_of(weight) != self.version or self.watch.sees_a_write(weight.detach())


def family_of(mask: Tensor) -> WeakSet[Any]:
    """The family of the layers whose lists are those of this mask."""
    if type(mask) is not Tensor or mask.is_meta:  # or a stand-in of torch.export
        return WeakSet()
    columns = mask.flatten(1).sum(0)
    numbers = torch.arange(1, len(columns) + 1, device=mask.device)
    return _families.setdefault((mask.shape, int((columns * numbers).sum())), WeakSet())


def join(layer: Any, family: WeakSet[Any]) -> None:
    """Put a layer into a family, and out of the one that it is in."""
    layer._derived.family.discard(layer)
    layer._derived.family = family
    family.add(layer)


def _copies(layer: Any, mask: Tensor, family: WeakSet[Any]) -> Iterator[Any]:
    """The other layers of a family that have this mask, and a Parameter of their own."""
    for other in list(family):
        if other.weight is layer.weight or other.weight.is_meta or not hasattr(other, "_derived"):
            continue
        its, fits = plain(other.weight_mask), other.weight.shape == layer.weight.shape
        if fits and torch.equal(its, mask.to(its.device)):
            yield other


def leave_copies(layer: Any, mask: Tensor) -> None:
    """Make the live copies of a layer note their slots, before the layer takes another mask."""
    old = plain(layer.weight_mask)
    if not torch.equal(old, mask.to(old.device, torch.bool)):
        for other in _copies(layer, old, layer._derived.family):
            other._derived.slots_before = other._derived.slots_before or Slots.of(other)


def check(layer: Any) -> None:
    """Check that the noted slots of a layer still match its lists or its new mask.

    Raises:
        RuntimeError: the slots were written, and no live layer with the same mask has the same.
    """
    if not _is_written(layer):
        return
    if not _are_copied(layer, plain(layer.weight_mask)):
        text = MIXED.format(kind=type(layer).__name__, shape=tuple(layer.weight_mask.shape))
        raise RuntimeError(text)
    layer._derived.slots_before = None


def _are_copied(layer: Any, mask: Tensor) -> bool:
    """Whether a live layer with this mask has the slots of `layer`, and is no mixture itself."""
    mine = layer.weight.detach()
    return any(
        torch.equal(other.weight.detach().to(mine), mine)
        for other in _copies(layer, mask, family_of(mask))
        if not _is_written(other)
    )


def _is_written(layer: Any) -> bool:
    """Whether somebody wrote to the slots of a layer after they were noted."""
    noted = layer._derived.slots_before
    return noted is not None and noted.were_written(layer.weight)


def mask_is_written(layer: Any, source: MaskTensor | None) -> None:
    """Called before the mask of a layer takes that of `source`, and after any other write to it."""
    if source is not None and _are_copied(layer, plain(source)):
        layer._derived.slots_before = None  # everything is
        join(layer, family_of(plain(source)))
    elif layer._derived.slots_before is None:
        layer._derived.slots_before = Slots.of(layer)


def renew(layer: Any) -> None:
    """Called after a write that is known: noted slots hold what they should."""
    if layer._derived.slots_before is not None:
        note(layer, again=not layer._derived.is_current())  # of a mask that is yet to be followed


def note(layer: Any, again: bool) -> None:
    """Note what the slots hold now, or that nobody needs to know."""
    for twin in (layer, *twins_of(layer)):
        twin._derived.slots_before = Slots.of(twin) if again else None


@torch.no_grad()
def move(layer: Any, new: KeptLists) -> None:
    """Move the kept weights to the slots that a mask, written alone, gives them.

    Raises:
        ValueError: an optimizer holds state for them.
    """
    old, weight = layer.kept, layer.weight.detach()
    if all(torch.equal(a, b) for a, b in zip(old[:2], new[:2], strict=True)):
        return
    check_optimizers("the layer", layer.weight)
    dense = kept_weight(weight, layer._derived.dense, old.starts, old.columns)
    weight.copy_(gather_kept(dense, new.starts, new.columns))
    layer.weight.grad = None  # of weights that were kept
