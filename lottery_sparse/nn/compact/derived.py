"""What a compact layer derives: lists of its kept weights and, where one is read, a dense weight.

The lists follow the mask. The dense weight holds frozen values, which follow the buffers, and kept
ones, which follow the Parameter. It is a cache, in one of three states:

    none    `real` is None     kernels skip pruned weights and nobody reads it; ops get a blank,
                               a zero in every place that takes no memory
    lent    `is_lent`          readers have it, and may write to it; ops get the blank
    read    `dense is real`    ops read it; it may be lent, too

`Derived` is what there is and how it looked when it was last true; `following` keeps it true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lottery_sparse.nn.common import outside_inference_mode
from lottery_sparse.nn.compact.moving import (
    Watch,
    as_matrix,
    blank_of,
    follow,
    has_readers,
    is_blank,
    skips_pruned,
    version_of,
)
from lottery_sparse.nn.compact.slots import family_of
from lottery_sparse.nn.masked import Masked
from lottery_sparse.nn.rest import versions_of
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.compact.reference import gather_kept
from lottery_sparse.ops.limits import kernels_take
from lottery_sparse.ops.masked.reference import effective_weight
from lottery_sparse.pruning.mask_tensor import plain

BUFFERS = "weight_mask", "weight_frozen", "weight_signs"


class Derived:
    """The lists and the dense weight of one compact layer, and what they were made of.

    Attributes:
        kept: where kept weights are.
        real: the dense weight, if there is one.
        dense: what ops get: `real`, or a blank.
        is_blank: `dense` is a blank; a word of its own, since compiled graphs guard what they ask.
        plain: mask, frozen values and signs, of torch's own type, which is quicker to ask.
        is_lent: readers have `real`; a write to it is one to the Parameter.
        is_shared: another layer may have the same dense weight.
        skips_pruned: kernels for this layer skip pruned weights.
        weight_version: of the Parameter when the dense weight last got its values; -1: it has not.
        parameter_id: of the Parameter that the registry has for this layer.
        slots_before: what the Parameter held before this mask, or that of a copy, changed.
        family: the layers among which copies of this one are, see `slots`.
    """

    def __init__(self, dense: Tensor, kept: KeptLists, skips_pruned: bool):
        self.__setstate__({"dense": dense, "kept": kept, "skips_pruned": skips_pruned})

    def __getstate__(self) -> dict[str, Any]:
        """A copy has a Parameter and readers of its own, which nobody has looked at yet."""
        state = {name: getattr(self, name) for name in ("dense", "kept", "skips_pruned")}
        return state | {"is_shared": self.is_shared, "slots_before": bool(self.slots_before)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.dense: Tensor = outside_inference_mode(state["dense"])
        self.kept = KeptLists(*map(outside_inference_mode, state["kept"]))
        self.skips_pruned: bool = state["skips_pruned"]
        self.is_shared: bool = state.get("is_shared", False)
        self.slots_before: Any = state.get("slots_before")
        self.is_blank = is_blank(self.dense)
        self.real: Tensor | None = None if self.is_blank else self.dense
        self.family: WeakSet[Any] = WeakSet()
        self.parameter_id: int | None = None
        self._watch: Watch | None = None
        self.is_lent, self._lent_version, self.weight_version = False, 0, -1

    # ---- whether they are still true -------------------------------------------------------------

    def follows(self, buffers: Mapping[str, Any]) -> bool:
        """Whether these are the buffers that lists and frozen values were made of."""
        mask, frozen, signs = self._buffers
        return (
            buffers["weight_mask"] is mask
            and buffers["weight_frozen"] is frozen
            and buffers["weight_signs"] is signs
        )

    def is_current(self) -> bool:
        """Whether nobody wrote to the buffers since; each forward asks."""
        mask, frozen, _ = self.plain
        if frozen is None:
            return self._versions == (mask._version,)
        return self._versions == versions_of(*self.plain)

    def lent_was_written(self) -> bool:
        """Whether a reader wrote to the dense weight that it was lent."""
        return self.is_lent and self.real._version != self._lent_version  # pyright: ignore

    def is_stale(self, weight: nn.Parameter) -> bool:
        """Whether somebody wrote to the Parameter, as far as can be seen."""
        if weight.is_inference():  # it counts no versions, and neither does who writes to it
            return True
        if weight._version != self.weight_version or self.parameter_id != id(weight):
            return True
        return self._watch is not None and self._watch.sees_a_write(weight)

    # ---- what they are made of -------------------------------------------------------------------

    def note_buffers(self, buffers: Mapping[str, Any]) -> None:
        """Say that lists and frozen values are those of the buffers."""
        self._buffers: tuple[Any, ...] = tuple(buffers[name] for name in BUFFERS)
        mask, frozen, signs = self._buffers
        signs = None if signs is None else plain(signs)
        self.plain: tuple[Tensor, Tensor | None, Tensor | None] = plain(mask), frozen, signs
        self._versions = versions_of(*self.plain)

    def note_weight(self, weight: Tensor) -> None:
        """Say that the dense weight has the values of the Parameter."""
        self.weight_version = version_of(weight)
        if self.real is None:
            return
        self._lent_version = self.real._version
        if self._watch is None or not self._watch.notes(weight):
            self._watch = Watch(weight, self.kept.starts)

    def set_lists(self, kept: KeptLists) -> None:
        self._watch = None  # other slots are in use
        if [(t.shape, t.dtype) for t in kept] != [(t.shape, t.dtype) for t in self.kept]:
            self.kept = KeptLists(*map(outside_inference_mode, kept))
            return
        for held, numbers in zip(self.kept, kept, strict=True):
            held.copy_(numbers)  # the same tensors: a compiled model runs on

    # ---- the dense weight ------------------------------------------------------------------------

    def read(self) -> None:
        """Have ops get the dense weight."""
        assert self.real is not None
        self.dense, self.is_blank = self.real, False

    def lend(self) -> None:
        """Say that readers get the dense weight."""
        assert self.real is not None
        self.is_lent, self._lent_version = True, self.real._version

    def take_back(self) -> bool:
        """Whether somebody still has the dense weight that was lent; else it is no longer lent."""
        if self.is_lent and not has_readers(self.real):  # pyright: ignore
            self.is_lent = False
            self.real = None if self.is_blank else self.real
        return self.is_lent

    def release(self) -> None:
        """Give up the dense weight, of which nobody reads anything."""
        self.dense, self.is_blank = blank_of(self.dense, self.dense.shape), True
        self.real = None

    def move(self, fn: Callable[[Tensor], Tensor], mask: Tensor) -> bool:
        """Apply `fn`, which moves or converts; whether the dense weight is one nobody has filled.

        mask: the mask where it is then. The lists follow it, so that to_empty leaves no numbers
            that are out of range.
        """
        self.kept = KeptLists(*(outside_inference_mode(follow(t, mask)) for t in self.kept))
        self._watch = None
        dense, real = self.dense, self.real
        if not self.is_blank:
            self.dense = self.real = outside_inference_mode(fn(dense))
            self.is_lent = self.is_lent and self.real is dense
            return False
        # as few numbers as tell where to, and whether channels go last
        few = fn(dense.new_zeros([min(2, size) for size in dense.shape]))
        self.dense = blank_of(few, dense.shape)
        if few.is_contiguous() and not few.is_meta:
            if real is None or fn(real) is not real:
                self.real, self.is_lent = None, False
            return False
        zeros = torch.zeros(dense.shape, dtype=few.dtype, device=few.device)
        last = few.dim() == 4 and not few.is_contiguous()
        self.dense = zeros.contiguous(memory_format=torch.channels_last) if last else zeros
        self.real, self.is_blank, self.is_lent = self.dense, False, False
        return True


def derive(
    layer: Masked, capacity: int, parameter: nn.Parameter | None = None
) -> tuple[Derived, nn.Parameter]:
    """What a masked layer needs to become compact, with so many slots: all that takes memory.

    Made before the layer changes, so that it stays as it is where there is too little.

    Args:
        parameter: of a layer that shares it; None: a new one.
    """
    dense = effective_weight(
        layer.weight.detach(), layer.weight_mask, *layer._frozen_state()[:2], layer.rank
    )  # fmt: skip
    dense = outside_inference_mode(dense.contiguous())
    kept = KeptLists.of(as_matrix(layer.weight_mask, layer.rank), capacity)
    if parameter is None:
        values = outside_inference_mode(gather_kept(dense, kept.starts, kept.columns))
        parameter = nn.Parameter(values, requires_grad=layer.weight.requires_grad)
    skips = skips_pruned(dense, kept, layer.weight_frozen is None)
    skips = skips and kernels_take(getattr(layer, "stride", ()))
    derived = Derived(blank_of(dense, dense.shape) if skips else dense, kept, skips)
    derived.family = family_of(plain(layer.weight_mask))
    return derived, parameter
