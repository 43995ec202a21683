"""Compact, the base of layers whose Parameter holds the kept weights only."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lottery_sparse.nn import registry
from lottery_sparse.nn.common import outside_inference_mode, redraw_
from lottery_sparse.nn.compact import following, slots
from lottery_sparse.nn.compact.derived import Derived, derive
from lottery_sparse.nn.compact.init import apply_to
from lottery_sparse.nn.compact.moving import (
    as_matrix,
    blank_of,
    check_capacity,
    check_optimizers,
    elementwise,
    fit_state,
    skips_pruned,
    version_of,
)
from lottery_sparse.nn.compact.registry import holders_of, lends, lends_no_more, optimizers_of
from lottery_sparse.nn.frozen import FrozenState, remake
from lottery_sparse.nn.loading import LayerLoad, Load
from lottery_sparse.nn.masked import Masked
from lottery_sparse.nn.rest import put_back_
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.compact.reference import gather_kept, kept_weight, spread_kept
from lottery_sparse.ops.masked.reference import effective_weight
from lottery_sparse.pruning.mask_tensor import MaskTensor, plain

# of layers in older pickles: attributes, and buffers
OLD_ATTRIBUTES = (
    "fresh_version", "kept", "slots_before", "_blank", "_dense", "_known", "_lent", "_lent_at",
    "_listed", "_made_at", "_made_of", "_skips", "_twins", "_watch", "weight_effective",
    "kept_starts", "kept_columns", "kept_column_starts", "kept_rows", "kept_positions",
)  # fmt: skip


class Compact(Masked):
    """The base of compact layers, whose Parameter `weight` is the vector of kept weights.

    `weight` is [C], or [E, C] for E networks side by side: kept weights in row-major order, then
    spare slots, which hold 0 and get no gradient. C is fixed when the layer becomes compact, so a
    change of masks changes no shape. A layer derives two things from the buffers of `Masked`:

        weight_effective   dense, what the layer computes with: kept and frozen values
        kept               the places of kept weights, see `KeptLists`

    Both move with the layer, but are no buffers: nobody broadcasts, averages or stacks them. After
    a write to the buffers (DistributedDataParallel copies those of rank 0 as it wraps a model) the
    next forward derives them again. A call that brings buffers of its own (torch.func, replicas of
    nn.DataParallel) computes with its own mask, as the masked layer would.

    The dense weight exists only if a dense library or a reader asks for it; kernels that skip
    pruned weights (`refreshes_lazily`) need none. It follows `weight`:

    - `ls.optim` writes it in the step; a hook does so after the step of any other torch optimizer.
    - The next eager forward notices every other write that counts a version.
    - A write without a version (`weight.data = t`, `weight.data.copy_(t)`, vector_to_parameters,
      another process in shared memory) is noticed if it replaces or changes the whole vector: by
      the address and some sixteen slots, on devices other than the CPU by the address alone. After
      a smaller one call `ls.nn.refresh_`. A write during a forward is undefined.

    state_dict and loading are those of `Masked`: the effective weight, the mask, the frozen source.
    The weight in a state_dict is live, as that of a dense layer: it follows the training. The next
    forward, optimizer step or state_dict() takes a write to it into `weight`, if the write counted
    a version; frozen values stay.
    """

    masked_type: type[Masked]
    weight: nn.Parameter
    products: str = "auto"  # "sparse", "dense": what `ls.plan` measured to be faster
    _derived: Derived

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._enter_compact(*derive(self, self.weight.shape[-self.rank :].numel()))

    def _put_back(self) -> bool:
        """A compact layer is never at rest: its Parameter has no pruned entries to write."""
        return False

    # ---- becoming compact, and back --------------------------------------------------------------

    def _enter_compact(self, derived: Derived, parameter: nn.Parameter) -> None:
        """Turn the masked layer into a compact one."""
        registry.masked.drop(self)
        self.weight, self._derived = parameter, derived
        following.start(self, derived.family)
        following.share_dense(self)

    def _leave_compact(self, parameter: nn.Parameter | None = None) -> None:
        """Turn the compact layer into a masked one; `parameter`: of a layer that shares it."""
        parameter = self._dense_parameter() if parameter is None else parameter
        del self._derived
        if isinstance(self.weight_mask, MaskTensor):
            self.weight_mask.age.readers.discard(self)
        lends_no_more(self)
        registry.compact.drop(self)
        self.weight = parameter

    def _dense_parameter(self) -> nn.Parameter:
        dense = outside_inference_mode(self.effective_weight.detach().clone())
        return nn.Parameter(dense, requires_grad=self.weight.requires_grad)

    def reset_parameters(self) -> None:
        """Draw kept weights and the bias anew as the dense layer does; masks and the rest stay.

        A dense weight is drawn, of which the kept entries are taken: those that the masked layer
        has after the same global seed. Of E networks side by side each one, in order.
        """
        if "_derived" not in self.__dict__:  # the constructor of the dense layer
            self.dense_type.reset_parameters(self)  # pyright: ignore[reportAttributeAccessIssue]
            return
        following.follow(self)
        dense = torch.zeros_like(self._derived.dense)
        redraw_(dense, self.bias, self.dense_type, self.rank)
        with torch.no_grad():
            self.weight.copy_(gather_kept(dense, *self.kept[:2]))
        for holder in holders_of(self.weight):
            holder.weight_changed()

    def apply(self, fn: Any) -> Any:
        """nn.Module.apply, in which torch's functions get the dense weight in place of the vector.

        So an `fn` that initialises by the weight's fans (torch.nn.init) draws what it would draw
        for the masked layer. Pruned entries keep their frozen values.
        """
        weight = self._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.is_meta or self._buffers_were_swapped():
            return super().apply(fn)
        for child in self.children():
            child.apply(fn)
        apply_to(self, fn)
        return self

    # ---- for readers -----------------------------------------------------------------------------

    @property
    def kept(self) -> KeptLists:
        """Where kept weights are."""
        return self._derived.kept

    @property
    def zero(self) -> bool:
        """Whether pruned weights hold zero."""
        return self._buffers["weight_frozen"] is None

    @property
    def capacity(self) -> int:
        """Slots per network: how many weights a mask may keep."""
        return self.weight.shape[-1]

    @property
    def effective_weight(self) -> Tensor:
        """The dense weight the layer computes with; differentiable in `weight`."""
        if self._buffers_were_swapped():
            return effective_weight(
                self._spread(), plain(self.weight_mask), *self._frozen_state()[:2], self.rank
            )
        if not torch.compiler.is_compiling():
            following.follow(self)
        return kept_weight(self.weight, self._derived.dense, *self.kept[:2])

    @property
    def weight_effective(self) -> Tensor:
        """The dense weight without a gradient, lent: a write to it is one to `weight`."""
        weight, derived = self._parameters.get("weight"), self._derived
        if self._buffers_were_swapped() or not isinstance(weight, nn.Parameter):
            return self.effective_weight.detach()
        if weight.is_meta:
            return derived.dense
        following.follow(self)
        if not derived.is_lent:
            following.make_real(self)
            derived.lend()
            lends(self)
        if derived.is_stale(weight):
            self.refresh_()
        assert derived.real is not None
        return derived.real.detach()  # readers are counted by who shares its memory

    def derived(self) -> list[Tensor]:
        """The tensors of the layer that are neither Parameters nor buffers."""
        real = self._derived.real
        return [*self.kept] if real is None else [real, *self.kept]

    def _spread(self) -> Tensor:
        """`weight` as the masked layer holds it, by the mask alone."""
        return spread_kept(self.weight, plain(self.weight_mask))

    def _buffers_were_swapped(self) -> bool:
        """Whether the buffers are not those that lists and frozen values are made of."""
        if self._derived.follows(self._buffers):
            return False
        return not torch.compiler.is_exporting()  # which has tensors of its own for everything

    # ---- for ops and optimizers ------------------------------------------------------------------

    @property
    def refreshes_lazily(self) -> bool:
        """Whether no kernel reads the dense weight, so that it is made for readers only."""
        lazily = self._derived.skips_pruned and self.products != "dense"
        return lazily and self._has_kernels()

    def _has_kernels(self) -> bool:
        """Whether the layer is of a kind that kernels take."""
        return True

    @property
    def target(self) -> Tensor | None:
        """The dense weight that a step writes the new values into, if ops read one."""
        derived = self._derived
        return None if derived.is_blank or self.refreshes_lazily else derived.dense

    def stepped(self) -> None:
        """Called by a step that wrote `weight`, and `target` where there is one."""
        if self.target is None:
            self.weight_changed()
            return
        slots.renew(self)
        self.mark_fresh()

    def weight_changed(self) -> None:
        """Called by what wrote `weight` alone: the dense weight follows now, or when it is read."""
        slots.renew(self)
        if self.refreshes_lazily and not self._derived.is_lent:
            self._derived.weight_version = -1
        else:
            self.refresh_()

    def fit_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Give state of other slots, which was loaded, the slots that the weight has here."""
        fit_state(self, optimizer)

    def _fit_states(self) -> None:
        for known in optimizers_of(self.weight):
            self.fit_state(known)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """The kept weights, and the dense weight as ops need it for them."""
        # the dicts of nn.Module, which are quicker than its attributes
        weight = self._parameters.get("weight")
        if weight is None and "_is_replica" in self.__dict__:  # of nn.DataParallel
            weight: Any = self.__dict__["weight"]
        if weight is None:
            raise RuntimeError(
                "the weight of a compact layer cannot be computed (parametrizations, weight_norm); "
                "call ls.sparsify_ and parametrize the masked layer."
            )
        derived, compiling = self._derived, torch.compiler.is_compiling()
        if not compiling:
            following.follow(self)
        is_parameter = type(weight) is nn.Parameter or isinstance(weight, nn.Parameter)
        lazily = self.refreshes_lazily
        blank = derived.is_blank and not lazily  # a conv2d whose stride was changed
        if not is_parameter or (compiling and (blank or torch.compiler.is_exporting())):
            # functional_call, a replica: not ours to keep; an exported graph may get other weights
            kept = derived.kept
            args = weight.detach().to(derived.dense.dtype), derived.dense, kept.starts, kept.columns
            return weight, kept_weight(*args)
        if not compiling:
            if derived.is_lent:
                self.take_back()
            if derived.is_lent or not lazily:
                self.refresh_if_stale(weight)
        return weight, derived.dense

    # ---- keeping it true, see `following` --------------------------------------------------------

    def refresh_if_stale(self, weight: nn.Parameter) -> None:
        """Make the dense weight that of `weight`, if this was written."""
        if self._derived.is_blank and not self.refreshes_lazily:
            following.make_dense(self)
        if self._derived.is_stale(weight):
            self.refresh_()

    def refresh_(self) -> None:
        """Copy the kept weights into the dense weight, if there is one."""
        following.follow(self)  # first: wrong lists would write over frozen values
        following.scatter(self)

    def mark_fresh(self) -> None:
        """Say that the dense weight has the values of `weight`."""
        following.note_weight(self)

    def take_back(self) -> bool:
        """Take over what others wrote to the dense weight; whether they still have it."""
        if not self._derived.is_lent or self._buffers_were_swapped():
            return False
        following.follow(self)
        return self._derived.take_back()

    def release(self) -> None:
        """Give up a dense weight that no op reads, and nobody else has."""
        if self.refreshes_lazily and not self._derived.is_blank and not self.take_back():
            self._derived.release()

    def mask_is_written(self, mask: MaskTensor, source: MaskTensor | None) -> None:
        """Called before the mask takes that of `source`, and after any other write to it."""
        if getattr(self.weight_mask, "age", None) is mask.age and not self.weight.is_meta:
            slots.mask_is_written(self, source)

    # ---- a new mask ------------------------------------------------------------------------------

    def _check_mask(self, name: str, mask: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        check_capacity(name, mask, self.rank, self.capacity)
        self._fit_states()
        if optimizer is not None:
            self.fit_state(optimizer)
        check_optimizers(name, self.weight, optimizer)

    @torch.no_grad()
    def _set_mask(self, mask: Tensor, held: FrozenState, leader: Masked, optimizer: Any) -> None:
        """Keep other weights: values, gradient and optimizer state move to their new slots.

        A weight that was pruned starts from its frozen value, with a state of zero. Several layers
        may share the Parameter; only the one that is `leader` moves it.
        """
        state = {} if optimizer is None else optimizer.state.get(self.weight, {})
        moving = [self.weight.grad] if self.weight.grad is not None else []
        moving += elementwise(state, self.weight)
        following.follow(self)  # or the old lists may be those of another mask
        # everything is allocated first, so that a lack of memory changes nothing
        mask = mask.to(self.weight_mask.device, torch.bool)
        slots.leave_copies(self, mask)
        derived, old = self._derived, self.kept
        new, family = (
            KeptLists.of(as_matrix(mask, self.rank), self.capacity),
            slots.family_of(plain(mask)),
        )
        values, moved, dense = self.weight.detach(), [], None
        blank = blank_of(derived.dense, derived.dense.shape)
        if leader is self:
            values = gather_kept(self.effective_weight, *new[:2])
            moved = [gather_kept(kept_weight(v, blank, *old[:2]), *new[:2]) for v in moving]
        skips = skips_pruned(derived.dense, new, held.frozen is None)
        lazily = skips and self._has_kernels()
        if derived.real is not None or not lazily:
            dense = outside_inference_mode(kept_weight(values, blank, *new[:2]))
            put_back_(dense, mask, held.frozen, held.signs, self.rank)
        self._set_frozen(held)
        self.weight_mask.copy_(mask)
        derived.set_lists(new)
        if leader is self:
            for there, value in zip((self.weight, *moving), (values, *moved), strict=True):
                there.copy_(value)
        derived.skips_pruned = skips
        if dense is not None:
            derived.real = dense if derived.real is None else derived.real.copy_(dense)
            if not lazily:
                derived.read()
        slots.note(self, again=False)
        following.start(self, family)

    # ---- moving, saving, loading -----------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # not the dtype of `weight`: a layer that shares it may have converted it already
        derived = self._derived
        was_meta, was_dtype = self.weight_mask.is_meta, derived.dense.dtype
        if not was_meta:
            following.follow(self)
        was_fresh = derived.weight_version == version_of(self.weight)
        nn.Module._apply(self, fn, recurse)
        self._buffers_outside_inference_mode()
        if was_meta and not self.weight_mask.is_meta:
            raise RuntimeError(
                "a compact layer on the meta device has lost which weights it keeps; move the "
                "masked model with to_empty, load it, then call ls.compact_."
            )
        anew = derived.move(fn, self.weight_mask)
        if self.weight.dtype != was_dtype:
            self._set_frozen(remake(self._frozen_state(), derived.dense))
            anew = True
        following.note_buffers(self)
        if self.weight.is_meta:
            return self
        if derived.slots_before is not None:
            derived.slots_before = slots.Slots.of(self)
        derived.skips_pruned = skips_pruned(derived.dense, self.kept, self.zero)
        if anew or not was_fresh or (derived.is_blank and not self.refreshes_lazily):
            following.fill(self)
        else:
            self.mark_fresh()
        if derived.is_shared:
            following.share_dense(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        if not self.weight_mask.is_meta:
            following.follow(self)  # a copy cannot tell
        return super().__getstate__() | {"_derived": copy.copy(self._derived)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_derived" not in self.__dict__:
            self._derive_anew()
        following.start(self, slots.family_of(plain(self.weight_mask)))
        self._derived.weight_version = -1  # a copy's Parameter counts versions from 0 again
        noted = self._derived.slots_before and not self.weight.is_meta
        self._derived.slots_before = slots.Slots.of(self) if noted else None

    def _derive_anew(self) -> None:
        """Derive everything from the mask, in a pickle of before there was a `Derived`."""
        for name in OLD_ATTRIBUTES:
            self.__dict__.pop(name, None)
            self._buffers.pop(name, None)
        mask = plain(self.weight_mask)
        kept = KeptLists.of(as_matrix(mask, self.rank), self.capacity)
        dense = torch.zeros_like(mask, dtype=self.weight.dtype)
        self._derived = Derived(dense, kept, False)
        following.fill(self)
        self.release()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = (
            self.effective_weight if keep_vars else self.weight_effective
        )

    def _entries(self, load: LayerLoad) -> Any:
        """The mask, its lists and source; torch is given the weights that the mask keeps."""
        entries = super()._entries(load)
        if entries is None:
            return None
        names = load.names("weight", "weight_mask", "weight_frozen")
        if self.weight_mask.is_meta:
            raise ValueError(
                f"{names[0]} is compact and on the meta device, where it has lost which "
                "weights it keeps; load the masked model, then call ls.compact_."
            )
        weight, mask, held = entries
        mask = mask.to(self.weight_mask.device)
        check_capacity(names[0], mask, self.rank, self.capacity)
        other_mask = not torch.equal(mask, self.weight_mask)
        if other_mask:
            self._fit_states()
            check_optimizers(names[0], self.weight)
        like = self._derived.dense
        with torch.no_grad():
            new = KeptLists.of(as_matrix(mask, self.rank), self.capacity)
            weight = weight.to(like.device, like.dtype)
            values = outside_inference_mode(gather_kept(weight, new.starts, new.columns))
        load.hide(names)
        load.seen[names[0]] = values
        if names[0] not in load.state:
            load.missing.append(names[0])
        return mask, new, held.like(like), other_mask

    def _take(self, load: LayerLoad, entries: Any) -> None:
        mask, new, held, other_mask = entries
        self._report_shared(load)
        if other_mask:
            self.weight.grad = None  # of weights that were kept
            slots.leave_copies(self, mask)
        with torch.no_grad():
            self.weight_mask.copy_(mask)
            following.set_lists(self, new)
        self._set_frozen(held)
        slots.note(self, again=False)
        following.fill(self)
        if load.assign:
            Load.of(self, Masked, load.state, load.prefix).tie(self)
