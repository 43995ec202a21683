"""What a compact layer derives from its Parameter and buffers: lists of kept weights, a dense one.

The lists say where kept weights are (`KeptLists`); they follow the mask. The dense weight holds
kept and frozen values; it follows the Parameter and the buffers. It is a cache for dense libraries
and for readers: where kernels skip what is pruned and never read it, it is a blank, a zero in every
place that takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lottery_sparse.nn.compact.moving import (
    Watch,
    as_matrix,
    blank_of,
    has_readers,
    is_blank,
    skips_pruned,
    version_of,
    versions_of,
    zeros_of,
)
from lottery_sparse.nn.frozen import FrozenState
from lottery_sparse.nn.masked import Masked, outside_inference_mode
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.compact.reference import gather_kept
from lottery_sparse.ops.limits import kernels_take
from lottery_sparse.ops.masked.reference import effective_weight
from lottery_sparse.pruning.mask_tensor import plain

BUFFERS = "weight_mask", "weight_frozen", "weight_signs"


class CompactParts(NamedTuple):
    """What a masked layer needs to become compact: all of it that takes memory.

    Made before the layer changes, so that it stays as it is where there is too little.
    """

    dense: Tensor  # a blank where no op reads it
    kept: KeptLists
    parameter: nn.Parameter
    skips_pruned: bool

    @classmethod
    def of(
        cls, layer: Masked, capacity: int, parameter: nn.Parameter | None = None
    ) -> CompactParts:
        """For so many slots, with the Parameter of a layer that shares it, if there is one."""
        dense = effective_weight(
            layer.weight.detach(), layer.weight_mask, *layer._frozen_state()[:2], layer.rank
        )  # fmt: skip
        dense = outside_inference_mode(dense.contiguous())
        lists = KeptLists.of(as_matrix(layer.weight_mask, layer.rank), capacity)
        kept = KeptLists(*map(outside_inference_mode, lists))
        if parameter is None:
            values = outside_inference_mode(gather_kept(dense, kept.starts, kept.columns))
            parameter = nn.Parameter(values, requires_grad=layer.weight.requires_grad)
        skips = skips_pruned(dense, kept, layer.weight_frozen is None)
        skips = skips and kernels_take(getattr(layer, "stride", ()))
        return cls(blank_of(dense, dense.shape) if skips else dense, kept, parameter, skips)


class Derived:
    """The lists and the dense weight of one compact layer, and what they were made of.

    Attributes:
        kept: where kept weights are.
        dense: what ops get: the dense weight, or a blank.
        is_blank: `dense` is a blank.
        skips_pruned: kernels for this layer skip pruned weights.
        lent: the dense weight that readers have; a write to it is one to the Parameter.
        is_shared: another layer may have the same dense weight.
        weight_version: of the Parameter when the dense weight last got its values; -1: it has not.
        parameter_id: of the Parameter that the registry has for this layer.
        slots_before: what the Parameter held before this mask, or that of a copy, changed.
    """

    __slots__ = (
        "_buffers", "_lent_version", "_plain", "_versions", "_watch", "dense", "is_blank",
        "is_shared", "kept", "lent", "parameter_id", "skips_pruned", "slots_before",
        "weight_version",
    )  # fmt: skip

    kept: KeptLists
    dense: Tensor
    lent: Tensor | None
    parameter_id: int | None
    slots_before: Any
    _watch: Watch | None

    def __init__(self, parts: CompactParts, buffers: Mapping[str, Any]):
        self.kept, self.dense, self.skips_pruned = parts.kept, parts.dense, parts.skips_pruned
        self.is_blank, self.is_shared = is_blank(parts.dense), False
        self.lent = self.parameter_id = self.slots_before = self._watch = None
        self._lent_version, self.weight_version = 0, -1
        self.note_buffers(buffers)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has a Parameter and readers of its own, which nobody has looked at yet."""
        state = {name: getattr(self, name) for name in self.__slots__}
        noted = self.slots_before is not None
        gone = dict.fromkeys(("lent", "parameter_id", "_watch", "_buffers", "_plain", "_versions"))
        return state | gone | {"slots_before": noted or None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def real(self) -> Tensor | None:
        """The dense weight that takes memory, if there is one."""
        return self.lent if self.is_blank else self.dense

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
        mask, frozen, _ = self._plain
        if frozen is None:
            return self._versions == (mask._version,)
        return self._versions == versions_of(*self._plain)

    def lent_was_written(self) -> bool:
        """Whether a reader wrote to the dense weight that it was lent."""
        return self.lent is not None and self.lent._version != self._lent_version

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
        # of torch's own type, quicker to ask
        self._plain = plain(mask), frozen, None if signs is None else plain(signs)
        self._versions = versions_of(*self._plain)

    def note_weight(self, weight: Tensor) -> None:
        """Say that the dense weight has the values of the Parameter."""
        self.weight_version = version_of(weight)
        dense = self.real
        if dense is None:
            return
        if self.lent is not None:
            self._lent_version = dense._version
        if self._watch is None or not self._watch.notes(weight):
            self._watch = Watch(weight, self.kept.starts)

    def note_kernels(self, zero: bool) -> None:
        """Find out whether the kernels for the layer skip pruned weights."""
        self.skips_pruned = skips_pruned(self.dense, self.kept, zero)

    def set_lists(self, kept: KeptLists) -> None:
        self._watch = None  # other slots are in use
        if [(t.shape, t.dtype) for t in kept] != [(t.shape, t.dtype) for t in self.kept]:
            self.kept = KeptLists(*map(outside_inference_mode, kept))
            return
        for held, numbers in zip(self.kept, kept, strict=True):
            held.copy_(numbers)  # the same tensors: a compiled model runs on

    # ---- the dense weight ------------------------------------------------------------------------

    def set_dense(self, dense: Tensor | None) -> None:
        """Have ops get this dense weight, or zeros that take memory."""
        self.dense = outside_inference_mode(zeros_of(self.dense)) if dense is None else dense
        self.is_blank = False

    def release(self) -> None:
        self.dense, self.is_blank = blank_of(self.dense, self.dense.shape), True

    def lend(self, dense: Tensor | None) -> None:
        """Have readers get the dense weight: this one, or zeros, where ops have a blank."""
        if self.is_blank:
            self.weight_version = -1
            self.lent = outside_inference_mode(zeros_of(self.dense)) if dense is None else dense
        else:
            self.lent = self.dense
        self._lent_version = self.lent._version

    def is_lent(self) -> bool:
        """Whether somebody still has the dense weight that was lent; else it is no longer lent."""
        if self.lent is not None and not has_readers(self.lent):
            self.lent = None
        return self.lent is not None

    @torch.no_grad()
    def fill(self, mask: Tensor, held: FrozenState, rank: int) -> None:
        """Write frozen values into the dense weight, if there is one, and zero where kept."""
        dense = self.real
        if dense is not None:
            blank = torch.zeros_like(dense)
            dense.copy_(effective_weight(blank, mask, held.frozen, held.signs, rank))
            self._lent_version = dense._version

    def scatter(self, weight: Tensor) -> None:
        """Write the kept weights into the dense weight, if there is one."""
        dense = self.real
        if dense is None:
            return
        args = (dense, weight, self.kept.starts, self.kept.columns)
        dispatch.kernel("scatter_kept_", dense.device, args)(*args)
        torch.autograd.graph.increment_version(dense)

    @torch.no_grad()
    def gather(self, dense: Tensor, weight: Tensor) -> None:
        """Write the kept weights of a dense one into the Parameter."""
        values = gather_kept(dense, self.kept.starts, self.kept.columns)
        if not torch.equal(values, weight):  # a write that changes nothing is none
            weight.copy_(values)

    def move(self, fn: Callable[[Tensor], Tensor], kept: KeptLists) -> bool:
        """Apply `fn`, which moves or converts; whether the dense weight is one nobody has filled.

        kept: the lists where they are then.
        """
        lent, dense = self.lent, self.dense
        self.kept, self._watch = kept, None
        if not self.is_blank:
            self.dense = outside_inference_mode(fn(dense))
            self.lent = lent if self.dense is dense else None
            return False
        # as few numbers as tell where to, and whether channels go last
        few = fn(dense.new_zeros([min(2, size) for size in dense.shape]))
        self.dense = blank_of(few, dense.shape)
        self.lent = lent if lent is not None and fn(lent) is lent else None
        self.is_blank = few.is_contiguous() and not few.is_meta
        if not self.is_blank:
            zeros = torch.zeros(dense.shape, dtype=few.dtype, device=few.device)
            last = few.dim() == 4 and not few.is_contiguous()
            self.dense = zeros.contiguous(memory_format=torch.channels_last) if last else zeros
            self.lent = None
        return not self.is_blank
