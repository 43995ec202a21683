"""Compact: what masked layers whose Parameter holds kept weights only have in common."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lottery_sparse import backends, reference
from lottery_sparse.compact import KeptLists, find_optimizers, holders_of, register, written
from lottery_sparse.compact_parts import (
    Shrunk,
    as_matrix,
    check_capacity,
    check_optimizers,
    elementwise,
    follow,
    redraw_kept_,
    skips_pruned,
    version_of,
    versions_of,
)
from lottery_sparse.frozen import Held, remake
from lottery_sparse.mask_tensor import plain
from lottery_sparse.modules import Masked, normal


class Compact(Masked):
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

    Kept weights are copied into `weight_effective` whenever they change: by `ls.optim` as it steps,
    by a hook after any other torch optimizer's step, and by the next forward that finds that
    `weight` was written in between. Writes through `.data` go unnoticed: call `ls.refresh_`.
    Where kernels skip what is pruned and never read it (`lags`), that waits until someone does.

    state_dict and loading are those of `Masked`: the effective weight, the mask, the source.
    """

    masked_type: type[Masked]
    weight: nn.Parameter
    products: str = "auto"  # "sparse", "dense": what `ls.plan` measured to be faster
    fresh_version: int  # of `weight` when weight_effective last got its values
    kept: KeptLists
    _dense: Tensor  # `weight_effective` as it is, which may lag behind
    _skips: bool  # the kernels for this layer skip pruned weights
    _made_of: tuple[Any, ...]  # the buffers that `kept` and `_dense` are made of
    _made_at: tuple[int, ...]  # their versions then
    _known: weakref.ref | None  # the Parameter that the registry has for this layer

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._shrink(Shrunk.of(self, self.weight.shape[-self.rank :].numel()))

    def _put_back(self) -> bool:
        """Never at rest, as the Parameter has no pruned entries: readers get `_dense`."""
        return False

    # ---- becoming compact, and back --------------------------------------------------------------

    def _shrink(self, parts: Shrunk) -> None:
        """From plain to compact."""
        self._dense, self.kept = parts.effective, parts.kept
        self.weight = parts.parameter
        self._skips = parts.skips
        self._mark_made()
        self._mark_fresh()

    def _grow(self, parameter: nn.Parameter | None = None) -> None:
        """From compact to plain, with the Parameter of a layer that shares it, if there is one."""
        parameter = self._dense_parameter() if parameter is None else parameter
        for name in (
            "fresh_version", "kept", "_dense", "_known", "_made_at", "_made_of", "_skips",
        ):  # fmt: skip
            self.__dict__.pop(name, None)
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
            written(holder)

    def _dense_parameter(self) -> nn.Parameter:
        dense = normal(self.effective_weight.detach().clone())
        return nn.Parameter(dense, requires_grad=self.weight.requires_grad)

    def _list(self, kept: KeptLists) -> None:
        if [(t.shape, t.dtype) for t in kept] != [(t.shape, t.dtype) for t in self.kept]:
            self.kept = KeptLists(*map(normal, kept))
            return
        for held, numbers in zip(self.kept, kept, strict=True):
            held.copy_(numbers)  # the same tensors: a compiled model runs on

    def derived(self) -> list[Tensor]:
        """The tensors of the layer that are neither Parameters nor buffers."""
        return [self._dense, *self.kept]

    @property
    def capacity(self) -> int:
        """Slots per network: how many weights a mask may keep."""
        return self.weight.shape[-1]

    @property
    def zero(self) -> bool:
        """Whether pruned weights hold zero."""
        return self._buffers["weight_frozen"] is None

    # ---- the effective weight --------------------------------------------------------------------

    @property
    def effective_weight(self) -> Tensor:
        """The dense weight the layer computes with; differentiable in `weight`."""
        if self._is_foreign():
            return reference.effective_weight(
                self._spread(), plain(self.weight_mask), *self._held()[:2], self.rank
            )
        if not torch.compiler.is_compiling():
            self._keep_made()
        return reference.kept_weight(self.weight, self._dense, *self.kept[:2])

    @property
    def weight_effective(self) -> Tensor:
        """The dense weight as the layer holds it, without a gradient."""
        if self._is_foreign():
            return self.effective_weight.detach()
        weight = self._parameters.get("weight")
        if isinstance(weight, nn.Parameter) and not weight.is_meta:
            self._settle(weight)
        return self._dense

    def _spread(self) -> Tensor:
        """`weight` as the masked layer holds it, by the mask alone."""
        return reference.spread_kept(self.weight, plain(self.weight_mask))

    def _is_foreign(self) -> bool:
        """Whether the buffers are not those that `kept` and `_dense` are made of."""
        held, (mask, frozen, signs) = self._buffers, self._made_of
        same = held["weight_mask"] is mask and held["weight_frozen"] is frozen
        if same and held["weight_signs"] is signs:
            return False
        return not torch.compiler.is_exporting()  # which has tensors of its own for everything

    @property
    def lags(self) -> bool:
        """Whether no kernel reads `weight_effective`, so that it is refreshed for readers only."""
        return self._skips and self.products != "dense"

    def _note_kernels(self) -> None:
        self._skips = skips_pruned(self._dense, self.kept, self.zero)

    def refresh_(self) -> None:
        """Copy the kept weights into `weight_effective`."""
        self._keep_made()  # first: wrong lists would write over frozen values
        effective, kept = self._dense, self.kept
        args = (effective, self.weight.detach(), kept.starts, kept.columns)
        backends.kernel("scatter_kept_", effective.device, args)(*args)
        torch.autograd.graph.increment_version(effective)
        self._mark_fresh()

    def _mark_fresh(self) -> None:
        weight = self.weight
        self.fresh_version = version_of(weight)
        known = self.__dict__.get("_known")
        if known is None or known() is not weight:
            register(self)
            self._known = weakref.ref(weight)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """The kept weights, and `weight_effective` as it must be for them."""
        # the dicts of nn.Module, which are quicker than its attributes
        weight = self._parameters.get("weight")
        effective = self._dense
        if weight is None and "_is_replica" in self.__dict__:  # of nn.DataParallel
            weight: Any = self.__dict__["weight"]
        if weight is None:
            raise RuntimeError(
                "the weight of a compact layer cannot be computed (parametrizations, weight_norm); "
                "call ls.expand_ and parametrize the masked layer."
            )
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._keep_made()
        is_parameter = type(weight) is nn.Parameter or isinstance(weight, nn.Parameter)
        if not is_parameter or torch.compiler.is_exporting():
            # functional_call, a replica: not ours to keep; an exported graph may get other weights
            kept = self.kept
            args = weight.detach().to(effective.dtype), effective, kept.starts, kept.columns
            return weight, reference.kept_weight(*args)
        if not compiling and not self.lags:
            self._settle(weight)
        return weight, effective

    def _is_stale(self, weight: nn.Parameter) -> bool:
        if weight.is_inference():  # it counts no versions, and neither does who writes to it
            return True
        return weight._version != self.fresh_version or self._known() is not weight  # pyright: ignore

    def _settle(self, weight: nn.Parameter) -> None:
        if self._is_stale(weight):
            self.refresh_()

    def _mark_made(self) -> None:
        names = "weight_mask", "weight_frozen", "weight_signs"
        self._made_of = tuple(self._buffers[name] for name in names)
        self._made_at = versions_of(*self._made_of)

    def is_made(self) -> bool:
        """Whether nobody wrote to the buffers since lists and frozen values were made of them."""
        return versions_of(*self._made_of) == self._made_at

    def _keep_made(self) -> None:
        """Make anew what is made of buffers, if these were written: averaged, copied, broadcast."""
        if self.is_made() or self._is_foreign():
            return
        self._list(KeptLists.of(as_matrix(self.weight_mask, self.rank), self.capacity))
        self._refill()

    @torch.no_grad()
    def _refill(self) -> None:
        """Write frozen and kept values into `weight_effective` anew."""
        blank = torch.zeros_like(self._dense)
        self._dense.copy_(
            reference.effective_weight(blank, plain(self.weight_mask), *self._held()[:2], self.rank)
        )
        self._mark_made()
        self._note_kernels()
        self.refresh_()

    # ---- a new mask ------------------------------------------------------------------------------

    def _check_mask(self, name: str, mask: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        check_capacity(name, mask, self.rank, self.capacity)
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
        old, new = self.kept, KeptLists.of(as_matrix(mask, self.rank), self.capacity)
        blank = torch.zeros_like(self._dense)
        values, moved = self.weight.detach(), []
        if leader is self:
            values = reference.gather_kept(self.effective_weight, new.starts, new.columns)
            for slots in moving:
                dense = reference.kept_weight(slots, blank, old.starts, old.columns)
                moved.append(reference.gather_kept(dense, new.starts, new.columns))
        held_dense = reference.effective_weight(blank, mask, held.frozen, held.signs, self.rank)
        effective = reference.kept_weight(values, held_dense, new.starts, new.columns)
        skips = skips_pruned(self._dense, new, held.frozen is None)
        self._hold(held)
        self.weight_mask.copy_(mask)
        self._list(new)
        if leader is self:
            self.weight.copy_(values)
            for slots, there in zip(moving, moved, strict=True):
                slots.copy_(there)
        self._dense.copy_(effective)
        self._skips = skips
        self._mark_made()
        self._mark_fresh()

    # ---- moving, saving, loading -----------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # not the dtype of `weight`: a layer that shares it may have converted it already
        was_meta, was_dtype = self.weight_mask.is_meta, self._dense.dtype
        was_fresh = self.fresh_version == version_of(self.weight)
        if not was_meta:
            self._keep_made()
        nn.Module._apply(self, fn, recurse)
        self._hold_normal()
        if was_meta and not self.weight_mask.is_meta:
            raise RuntimeError(
                "a compact layer on the meta device has lost which weights it keeps; move the "
                "masked model with to_empty, load it, then call ls.compact_."
            )
        # lists follow the mask, so that to_empty leaves no numbers that are out of range
        self.kept = KeptLists(*(normal(follow(t, self.weight_mask)) for t in self.kept))
        self._dense = normal(fn(self._dense))
        self._mark_made()
        if self.weight.dtype != was_dtype:
            self._hold(remake(self._held(), self._dense))
            self._refill()
        self._note_kernels()
        if not self.weight.is_meta:
            self._mark_fresh()
            if not was_fresh:
                written(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        if not self.weight_mask.is_meta:
            self._keep_made()  # a copy cannot tell
        return self.__dict__ | {"_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.kept, self._dense = KeptLists(*map(normal, self.kept)), normal(self._dense)
        self._mark_made()
        if not self.weight.is_meta:  # a copy: its Parameter counts versions from 0 again
            self._mark_fresh()
            self.fresh_version = -1

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.effective_weight
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()

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
                find_optimizers()
                check_optimizers(names[0], self.weight)
        except (TypeError, ValueError) as error:
            if str(error) not in error_msgs:  # once, of layers that share a weight
                error_msgs.append(str(error))
            return
        if names[0] not in state_dict:
            missing_keys.append(names[0])
        like = self._dense
        if other_mask:
            self.weight.grad = None  # of weights that were kept
        with torch.no_grad():
            self.weight_mask.copy_(mask)
            self._list(KeptLists.of(as_matrix(self.weight_mask, self.rank), self.capacity))
            weight, kept = weight.to(like.device, like.dtype), self.kept
            state[names[0]] = normal(reference.gather_kept(weight, kept.starts, kept.columns))
        nn.Module._load_from_state_dict(
            self, state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._hold(held.like(like))
        self._refill()
