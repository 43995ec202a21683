"""Compact, the base of layers whose Parameter holds the kept weights only."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lottery_sparse.nn import registry
from lottery_sparse.nn.compact import slots as compact_slots
from lottery_sparse.nn.compact.derived import CompactParts, Derived
from lottery_sparse.nn.compact.init import apply_to
from lottery_sparse.nn.compact.moving import (
    as_matrix,
    blank_of,
    check_capacity,
    check_optimizers,
    elementwise,
    fit_state,
    follow,
    redraw_kept_,
    skips_pruned,
    version_of,
    zeros_of,
)
from lottery_sparse.nn.compact.registry import (
    holders_of,
    lends,
    lends_no_more,
    optimizers_of,
    register,
)
from lottery_sparse.nn.compact.slots import Slots, leave_copies
from lottery_sparse.nn.frozen import FrozenState, remake
from lottery_sparse.nn.loading import LayerLoad, Load
from lottery_sparse.nn.masked import Masked, outside_inference_mode
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.compact.reference import gather_kept, kept_weight, spread_kept
from lottery_sparse.ops.masked.reference import effective_weight
from lottery_sparse.pruning.mask_tensor import plain


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
        self._enter_compact(CompactParts.of(self, self.weight.shape[-self.rank :].numel()))

    def _put_back(self) -> bool:
        """A compact layer is never at rest: its Parameter has no pruned entries to write."""
        return False

    # ---- becoming compact, and back --------------------------------------------------------------

    def _enter_compact(self, parts: CompactParts) -> None:
        """Turn the masked layer into a compact one."""
        registry.masked.drop(self)
        self.weight = parts.parameter
        self._derived = Derived(parts, self._buffers)
        self._share_dense()
        self.mark_fresh()

    def _leave_compact(self, parameter: nn.Parameter | None = None) -> None:
        """Turn the compact layer into a masked one; `parameter`: of a layer that shares it."""
        parameter = self._dense_parameter() if parameter is None else parameter
        del self._derived
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
        self._update_derived()
        dense = self._derived.dense
        redraw_kept_(self.weight, self.bias, self.kept, dense, self.dense_type, self.rank)
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
            self._update_derived()
        return kept_weight(self.weight, self._derived.dense, *self.kept[:2])

    @property
    def weight_effective(self) -> Tensor:
        """The dense weight without a gradient, lent: a write to it is one to `weight`."""
        weight, derived = self._parameters.get("weight"), self._derived
        if self._buffers_were_swapped() or not isinstance(weight, nn.Parameter):
            return self.effective_weight.detach()
        if weight.is_meta:
            return derived.dense
        self._update_derived()
        if derived.lent is None:
            derived.lend(self._shared_dense() if derived.is_blank else None)
            lends(self)
        if derived.is_stale(weight):
            self.refresh_()
        assert derived.lent is not None
        return derived.lent.detach()  # readers are counted by who shares its memory

    def derived(self) -> list[Tensor]:
        """The tensors of the layer that are neither Parameters nor buffers."""
        dense = self._derived.real
        return [*self.kept] if dense is None else [dense, *self.kept]

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
        self._note_written_slots()
        self.mark_fresh()

    def weight_changed(self) -> None:
        """Called by what wrote `weight` alone: the dense weight follows now, or when it is read."""
        self._note_written_slots()
        if self.refreshes_lazily and self._derived.lent is None:
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
            self._update_derived()
        is_parameter = type(weight) is nn.Parameter or isinstance(weight, nn.Parameter)
        lazily = self.refreshes_lazily
        blank = derived.is_blank and not lazily  # a conv2d whose stride was changed
        if not is_parameter or (compiling and (blank or torch.compiler.is_exporting())):
            # functional_call, a replica: not ours to keep; an exported graph may get other weights
            kept = derived.kept
            args = weight.detach().to(derived.dense.dtype), derived.dense, kept.starts, kept.columns
            return weight, kept_weight(*args)
        if not compiling:
            if derived.lent is not None:
                self.take_back()
            if derived.lent is not None or not lazily:
                self.refresh_if_stale(weight)
        return weight, derived.dense

    # ---- keeping it true -------------------------------------------------------------------------

    def refresh_if_stale(self, weight: nn.Parameter) -> None:
        """Make the dense weight that of `weight`, if this was written."""
        if self._derived.is_blank and not self.refreshes_lazily:
            self.make_dense()
        if self._derived.is_stale(weight):
            self.refresh_()

    def refresh_(self) -> None:
        """Copy the kept weights into the dense weight, if there is one."""
        self._update_derived()  # first: wrong lists would write over frozen values
        dense = self._derived.real
        if dense is not None:
            weight = self.weight.detach()
            if weight.device != dense.device:
                raise RuntimeError(
                    f"weight is on {weight.device}, but the {type(self).__name__} that holds it on "
                    f"{dense.device}; move the whole layer, layer.to(device), or put it back."
                )
            self._derived.scatter(weight)
        self.mark_fresh()

    def mark_fresh(self) -> None:
        """Say that the dense weight has the values of `weight`."""
        weight, derived = self.weight, self._derived
        derived.note_weight(weight)
        if derived.is_shared and derived.real is not None:
            for twin in self._others():
                if twin._derived.real is derived.real:
                    twin._derived.note_weight(weight)
        if derived.parameter_id != id(weight):
            register(self)
            derived.parameter_id = id(weight)

    def take_back(self) -> bool:
        """Take over what others wrote to the dense weight; whether they still have it."""
        if self._derived.lent is None or self._buffers_were_swapped():
            return False
        self._update_derived()
        return self._derived.is_lent()

    def make_dense(self) -> None:
        """Have ops get a dense weight that holds numbers."""
        if self._derived.is_blank:
            lent = self._derived.lent
            self._derived.set_dense(self._shared_dense() if lent is None else lent)
            self._fill()

    def release(self) -> None:
        """Give up a dense weight that no op reads, and nobody else has."""
        if self.refreshes_lazily and not self._derived.is_blank and not self.take_back():
            self._derived.release()

    def _update_derived(self) -> None:
        """Follow what others wrote: to buffers (averaged, copied, broadcast), to a lent weight."""
        derived = self._derived
        wrote = derived.lent is not None and derived.lent_was_written()
        current, noted = derived.is_current(), False
        if (current and not wrote and derived.slots_before is None) or self._buffers_were_swapped():
            return
        if derived.slots_before is not None:
            compact_slots.check(self)
            noted = derived.slots_before is not None
        if current and not wrote:
            return
        if not current:
            mask = as_matrix(plain(self.weight_mask), self.rank)
            new = KeptLists.of(mask, self.weight.shape[-1])
            if noted and not wrote:
                self._move(new)
            derived.set_lists(new)
        if noted:
            self._note_slots(again=False)
        if wrote:
            assert derived.lent is not None
            derived.gather(derived.lent, self.weight.detach())
        self._fill()
        if noted and current:
            self._note_slots(again=True)

    @torch.no_grad()
    def _fill(self) -> None:
        """Write frozen and kept values into the dense weight anew."""
        self._derived.fill(plain(self.weight_mask), self._frozen_state(), self.rank)
        self._derived.note_buffers(self._buffers)
        self._note_kernels()
        self.refresh_()

    def _note_kernels(self) -> None:
        self._derived.note_kernels(self.zero)
        if not self.refreshes_lazily:
            self.make_dense()

    def _note_written_slots(self) -> None:
        if self._derived.slots_before is not None:  # of a network whose mask may be yet to follow
            self._note_slots(again=not self._derived.is_current())

    def _note_slots(self, again: bool) -> None:
        """Note what the slots hold after a write that is known, or that nobody needs to know."""
        for layer in (self, *self._others()):
            layer._derived.slots_before = Slots.of(layer) if again else None

    @torch.no_grad()
    def _move(self, new: KeptLists) -> None:
        """Move the kept weights to the slots that a mask, written alone, gives them."""
        old = self.kept
        if all(torch.equal(a, b) for a, b in zip(old[:2], new[:2], strict=True)):
            return
        check_optimizers("the layer", self.weight)
        weight = self.weight.detach()
        dense = kept_weight(weight, self._derived.dense, old.starts, old.columns)
        weight.copy_(gather_kept(dense, new.starts, new.columns))
        self.weight.grad = None  # of weights that were kept

    # ---- layers with the same Parameter ----------------------------------------------------------

    def _others(self) -> list[Compact]:
        """The other layers with this Parameter."""
        holders = holders_of(self.weight)
        return [layer for layer in holders if isinstance(layer, Compact) and layer is not self]

    def _shared_dense(self) -> Tensor | None:
        """That of a layer with the same Parameter, mask and frozen values: one is enough."""
        for twin in self._others():
            dense = twin._derived.real
            if dense is not None and self._computes_as(twin, dense):
                twin._derived.is_shared = self._derived.is_shared = True
                return dense
        return None

    def _share_dense(self) -> None:
        """Use the dense weight of another layer, where there is one."""
        derived = self._derived
        shared = None if derived.is_blank else self._shared_dense()
        derived.dense = derived.dense if shared is None else shared

    def _computes_as(self, twin: Compact, dense: Tensor) -> bool:
        mine, theirs = (
            (layer.weight_mask, layer.weight_frozen, layer.weight_signs) for layer in (self, twin)
        )
        like = self._derived.dense
        return (dense.dtype, dense.device) == (like.dtype, like.device) and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(mine, theirs, strict=True)
        )

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
        self._update_derived()  # or the old lists may be those of another mask
        # everything is allocated first, so that a lack of memory changes nothing
        mask = mask.to(self.weight_mask.device, torch.bool)
        leave_copies(self, mask)
        old, new = self.kept, KeptLists.of(as_matrix(mask, self.rank), self.capacity)
        derived = self._derived
        values, moved = self.weight.detach(), []
        blank = blank_of(derived.dense, derived.dense.shape)
        if leader is self:
            values = gather_kept(self.effective_weight, new.starts, new.columns)
            for slots in moving:
                dense = kept_weight(slots, blank, old.starts, old.columns)
                moved.append(gather_kept(dense, new.starts, new.columns))
        skips = skips_pruned(derived.dense, new, held.frozen is None)
        lazily = skips and self._has_kernels()
        effective, real = None, derived.real
        if real is None and not lazily:
            real = outside_inference_mode(zeros_of(derived.dense))
        if real is not None:
            effective = kept_weight(
                values,
                effective_weight(blank, mask, held.frozen, held.signs, self.rank),
                new.starts,
                new.columns,
            )
        self._set_frozen(held)
        self.weight_mask.copy_(mask)
        derived.set_lists(new)
        if leader is self:
            self.weight.copy_(values)
            for slots, there in zip(moving, moved, strict=True):
                slots.copy_(there)
        derived.skips_pruned = skips
        if real is not None and effective is not None:
            real.copy_(effective)
            if not lazily:
                derived.set_dense(real)
        self._note_slots(again=False)
        derived.note_buffers(self._buffers)
        self.mark_fresh()

    # ---- moving, saving, loading -----------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # not the dtype of `weight`: a layer that shares it may have converted it already
        derived = self._derived
        was_meta, was_dtype = self.weight_mask.is_meta, derived.dense.dtype
        if not was_meta:
            self._update_derived()
        was_fresh = derived.weight_version == version_of(self.weight)
        nn.Module._apply(self, fn, recurse)
        self._buffers_outside_inference_mode()
        if was_meta and not self.weight_mask.is_meta:
            raise RuntimeError(
                "a compact layer on the meta device has lost which weights it keeps; move the "
                "masked model with to_empty, load it, then call ls.compact_."
            )
        # lists follow the mask, so that to_empty leaves no numbers that are out of range
        kept = KeptLists(*(outside_inference_mode(follow(t, self.weight_mask)) for t in self.kept))
        anew = derived.move(fn, kept)
        if derived.slots_before is not None and not self.weight.is_meta:
            derived.slots_before = Slots.of(self)
        derived.note_buffers(self._buffers)
        if self.weight.dtype != was_dtype:
            self._set_frozen(remake(self._frozen_state(), derived.dense))
            anew = True
        if self.weight.is_meta:
            return self
        if anew or not was_fresh:
            self._fill()
        else:
            self._note_kernels()
            self.mark_fresh()
        if derived.is_shared:
            self._share_dense()
        return self

    def __getstate__(self) -> dict[str, Any]:
        if not self.weight_mask.is_meta:
            self._update_derived()  # a copy cannot tell
        return super().__getstate__() | {"_derived": copy.copy(self._derived)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        own = self.__dict__
        if "_derived" not in own:  # of a pickle that was written before there was one
            parts = CompactParts(own["_dense"], own["kept"], self.weight, own["_skips"])
            for name in (
                "fresh_version", "kept", "slots_before", "_blank", "_dense", "_known", "_lent",
                "_lent_at", "_made_at", "_made_of", "_skips", "_twins", "_watch",
            ):  # fmt: skip
                own.pop(name, None)
            own["_derived"] = Derived(parts, self._buffers)
        derived = self._derived
        derived.kept = KeptLists(*map(outside_inference_mode, derived.kept))
        derived.dense = outside_inference_mode(derived.dense)
        derived.note_buffers(self._buffers)
        if not self.weight.is_meta:  # a copy: its Parameter counts versions from 0 again
            self.mark_fresh()
            derived.weight_version = -1
            derived.slots_before = Slots.of(self) if derived.slots_before else None

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
            leave_copies(self, mask)
        with torch.no_grad():
            self.weight_mask.copy_(mask)
            self._derived.set_lists(new)
        self._set_frozen(held)
        self._note_slots(again=False)
        self._fill()
        if load.assign:
            Load.of(self, Masked, load.state, load.prefix).tie(self)
