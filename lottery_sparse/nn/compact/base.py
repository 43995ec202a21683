"""Compact: what masked layers whose Parameter holds kept weights only have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lottery_sparse.nn.compact.effective import Effective
from lottery_sparse.nn.compact.init import apply_to
from lottery_sparse.nn.compact.moving import (
    Shrunk,
    as_matrix,
    blank_of,
    check_capacity,
    check_optimizers,
    elementwise,
    follow,
    is_blank,
    redraw_kept_,
    skips_pruned,
    version_of,
    zeros_of,
)
from lottery_sparse.nn.compact.registry import (
    holders_of,
    lends_no_more,
    optimizers_of,
)
from lottery_sparse.nn.compact.slots import Slots, leave_copies
from lottery_sparse.nn.frozen import Held, remake
from lottery_sparse.nn.loading import Load
from lottery_sparse.nn.masked import Masked, normal
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.compact.reference import gather_kept, kept_weight
from lottery_sparse.ops.masked.reference import effective_weight


class Compact(Effective):
    """What compact layers share. The Parameter `weight` is the vector of kept weights.

    `weight` is [C], or [E, C] for E networks side by side: kept weights in row-major order, then
    spare slots, which hold 0 and get no gradient. C is fixed when the layer becomes compact, so a
    change of masks changes no shape. Besides the buffers of `Masked`, and made of them:

        weight_effective   dense, what the layer computes with: kept and frozen values
        kept               where kept weights are, see `KeptLists`

    They move with the layer, but are no buffers: nobody broadcasts, averages or stacks them. Where
    buffers were written (DistributedDataParallel copies those of rank 0 as it wraps a model) the
    next forward makes them anew. A call that brings buffers of its own (torch.func, replicas of
    nn.DataParallel) computes with its own mask, as the masked layer would.

    The dense weight exists where a dense library or a reader asks for it; kernels that skip what
    is pruned (`lags`) need none. It follows `weight`: as `ls.optim` steps, by a hook after any
    other torch optimizer's step, and at the next eager forward after any other write that counts a
    version. Of writes that count none (`weight.data = t`, `weight.data.copy_(t)`,
    nn.utils.vector_to_parameters, another process in shared memory) that forward notices those
    that replace or change the whole vector, by its address and some sixteen of its slots; on other
    devices than the CPU, whose numbers it cannot read without waiting, by the address alone. After
    one that changes less call `ls.nn.refresh_`. A write during a forward is undefined.

    state_dict and loading are those of `Masked`: the effective weight, the mask, the source. The
    weight that state_dict() gives is that of the layer, as for a dense one: it goes on to follow
    the training, and what is written to it, with a version counted, is taken into `weight` by the
    next forward, optimizer step or state_dict(), while frozen values stay.
    """

    masked_type: type[Masked]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._shrink(Shrunk.of(self, self.weight.shape[-self.rank :].numel()))

    def _put_back(self) -> bool:
        """Never at rest, as the Parameter has no pruned entries: readers get `_dense`."""
        return False

    # ---- becoming compact, and back --------------------------------------------------------------

    def _shrink(self, parts: Shrunk) -> None:
        """From plain to compact."""
        self.kept, self.weight, self._skips = parts.kept, parts.parameter, parts.skips
        self._dense, self._blank = parts.effective, is_blank(parts.effective)
        self._lent, self._lent_at, self._watch, self._twins = None, 0, None, False
        self._known = None
        self._mark_made()
        shared = None if self._blank else self._shared_dense()
        self._dense = self._dense if shared is None else shared
        self.mark_fresh()

    def _grow(self, parameter: nn.Parameter | None = None) -> None:
        """From compact to plain, with the Parameter of a layer that shares it, if there is one."""
        parameter = self._dense_parameter() if parameter is None else parameter
        for name in (
            "fresh_version", "kept", "slots_before", "_blank", "_dense", "_known", "_lent",
            "_lent_at", "_made_at", "_made_of", "_skips", "_twins", "_watch",
        ):  # fmt: skip
            self.__dict__.pop(name, None)
        lends_no_more(self)
        self.weight = parameter

    def reset_parameters(self) -> None:
        """Draw kept weights and the bias anew as the dense layer does; masks and the rest stay.

        A dense weight is drawn, of which the kept entries are taken: those that the masked layer
        has after the same global seed. Of E networks side by side each one, in order.
        """
        if "kept" not in self.__dict__:  # the constructor of the dense layer
            self.dense_type.reset_parameters(self)  # pyright: ignore[reportAttributeAccessIssue]
            return
        self._keep_made()
        redraw_kept_(self.weight, self.bias, self.kept, self._dense, self.dense_type, self.rank)
        for holder in holders_of(self.weight):
            holder.written()

    def apply(self, fn: Any) -> Any:
        """As nn.Module.apply; torch's functions get the dense weight where `fn` gives the compact.

        So an `fn` that initialises by the weight's fans (torch.nn.init) draws what it would draw
        for the masked layer. Pruned entries keep their frozen values.
        """
        weight = self._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.is_meta or self._is_foreign():
            return super().apply(fn)
        for child in self.children():
            child.apply(fn)
        apply_to(self, fn)
        return self

    def _dense_parameter(self) -> nn.Parameter:
        dense = normal(self.effective_weight.detach().clone())
        return nn.Parameter(dense, requires_grad=self.weight.requires_grad)

    def derived(self) -> list[Tensor]:
        """The tensors of the layer that are neither Parameters nor buffers."""
        dense = self._real()
        return [*self.kept] if dense is None else [dense, *self.kept]

    @property
    def capacity(self) -> int:
        """Slots per network: how many weights a mask may keep."""
        return self.weight.shape[-1]

    def _fit_states(self) -> None:
        for known in optimizers_of(self.weight):
            self.fit_state(known)

    # ---- a new mask ------------------------------------------------------------------------------

    def _check_mask(self, name: str, mask: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        check_capacity(name, mask, self.rank, self.capacity)
        self._fit_states()
        if optimizer is not None:
            self.fit_state(optimizer)
        check_optimizers(name, self.weight, optimizer)

    @torch.no_grad()
    def _set_mask(self, mask: Tensor, held: Held, leader: Masked, optimizer: Any) -> None:
        """Keep other weights: values, gradient and optimizer state move to their new slots.

        A weight that was pruned starts from what it held, with a state of zero. `leader` is the
        layer that moves the Parameter which several layers may share.
        """
        state = {} if optimizer is None else optimizer.state.get(self.weight, {})
        moving = [self.weight.grad] if self.weight.grad is not None else []
        moving += elementwise(state, self.weight)
        self._keep_made()  # or the old lists may be those of another mask
        # first all that takes memory: where there is too little, nothing has changed
        mask = mask.to(self.weight_mask.device, torch.bool)
        leave_copies(self, mask)
        old, new = self.kept, KeptLists.of(as_matrix(mask, self.rank), self.capacity)
        values, moved, blank = self.weight.detach(), [], blank_of(self._dense, self._dense.shape)
        if leader is self:
            values = gather_kept(self.effective_weight, new.starts, new.columns)
            for slots in moving:
                dense = kept_weight(slots, blank, old.starts, old.columns)
                moved.append(gather_kept(dense, new.starts, new.columns))
        skips = skips_pruned(self._dense, new, held.frozen is None)
        lags = skips and self._has_kernels()
        effective, real = None, self._real()
        if real is None and not lags:
            real = normal(zeros_of(self._dense))
        if real is not None:
            effective = kept_weight(
                values,
                effective_weight(blank, mask, held.frozen, held.signs, self.rank),
                new.starts,
                new.columns,
            )
        self._hold(held)
        self.weight_mask.copy_(mask)
        self._list(new)
        if leader is self:
            self.weight.copy_(values)
            for slots, there in zip(moving, moved, strict=True):
                slots.copy_(there)
        self._skips = skips
        if real is not None and effective is not None:
            real.copy_(effective)
            if not lags:
                self._dense, self._blank = real, False
        self._note_slots(again=False)
        self._mark_made()
        self.mark_fresh()

    # ---- moving, saving, loading -----------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # not the dtype of `weight`: a layer that shares it may have converted it already
        was_meta, was_dtype = self.weight_mask.is_meta, self._dense.dtype
        if not was_meta:
            self._keep_made()
        was_fresh = self.fresh_version == version_of(self.weight)
        nn.Module._apply(self, fn, recurse)
        self._hold_normal()
        if was_meta and not self.weight_mask.is_meta:
            raise RuntimeError(
                "a compact layer on the meta device has lost which weights it keeps; move the "
                "masked model with to_empty, load it, then call ls.compact_."
            )
        # lists follow the mask, so that to_empty leaves no numbers that are out of range
        self.kept = KeptLists(*(normal(follow(t, self.weight_mask)) for t in self.kept))
        self._watch, anew = None, self._move_dense(fn)
        if self.slots_before is not None and not self.weight.is_meta:
            self.slots_before = Slots.of(self)
        self._mark_made()
        if self.weight.dtype != was_dtype:
            self._hold(remake(self._held(), self._dense))
            anew = True
        if self.weight.is_meta:
            return self
        if anew or not was_fresh:
            self._fill()
        else:
            self._note_kernels()
            self.mark_fresh()
        shared = self._shared_dense() if self._twins and not self._blank else None
        self._dense = self._dense if shared is None else shared
        return self

    def _move_dense(self, fn: Any) -> bool:
        """Apply `fn` to the dense weight; whether it is another one, which nobody has filled."""
        lent, dense = self._lent, self._dense
        if not self._blank:
            self._dense = normal(fn(dense))
            self._lent = lent if self._dense is dense else None
            return False
        # as few numbers as tell where to, and whether channels go last
        few = fn(dense.new_zeros([min(2, size) for size in dense.shape]))
        self._dense = blank_of(few, dense.shape)
        self._lent = lent if lent is not None and fn(lent) is lent else None
        self._blank = few.is_contiguous() and not few.is_meta
        if not self._blank:
            zeros = torch.zeros(dense.shape, dtype=few.dtype, device=few.device)
            last = few.dim() == 4 and not few.is_contiguous()
            self._dense = zeros.contiguous(memory_format=torch.channels_last) if last else zeros
            self._lent = None
        return not self._blank

    def __getstate__(self) -> dict[str, Any]:
        if not self.weight_mask.is_meta:
            self._keep_made()  # a copy cannot tell
        noted = self.slots_before is not None
        return self.__dict__ | {
            "_known": None, "_lent": None, "_watch": None, "slots_before": noted or None,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.kept, self._dense = KeptLists(*map(normal, self.kept)), normal(self._dense)
        self._mark_made()
        if not self.weight.is_meta:  # a copy: its Parameter counts versions from 0 again
            self.mark_fresh()
            self.fresh_version = -1
            self.slots_before = Slots.of(self) if self.slots_before else None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = (
            self.effective_weight if keep_vars else self.weight_effective
        )

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + name for name in ("weight", "weight_mask", "weight_frozen")]
        try:  # check all of it before anything is written
            entries = self._entries(state_dict, prefix)
            state = {name: value for name, value in state_dict.items() if name not in names}
            if entries is None:  # "weight" is then reported as missing
                nn.Module._load_from_state_dict(
                    self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                    error_msgs,
                )  # fmt: skip
                return
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
        except (TypeError, ValueError) as error:
            if str(error) not in error_msgs:  # once, of layers that share a weight
                error_msgs.append(str(error))
            return
        if names[0] not in state_dict:
            missing_keys.append(names[0])
        self._report_shared(names, state_dict, missing_keys)
        like = self._dense
        if other_mask:
            self.weight.grad = None  # of weights that were kept
            leave_copies(self, mask)
        with torch.no_grad():
            self.weight_mask.copy_(mask)
            self._list(KeptLists.of(as_matrix(self.weight_mask, self.rank), self.capacity))
            weight, kept = weight.to(like.device, like.dtype), self.kept
            state[names[0]] = normal(gather_kept(weight, kept.starts, kept.columns))
        nn.Module._load_from_state_dict(
            self, state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._hold(held.like(like))
        self._note_slots(again=False)
        self._fill()
        if local_metadata.get("assign_to_params_buffers", False):
            Load.of(self, Masked, state_dict, prefix).tie(self)
