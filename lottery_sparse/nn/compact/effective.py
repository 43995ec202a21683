"""Effective: the lists of kept weights of a compact layer, and its dense weight as a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lottery_sparse.nn.compact import slots as compact_slots
from lottery_sparse.nn.compact.moving import (
    Watch,
    as_matrix,
    blank_of,
    check_optimizers,
    has_readers,
    most_kept,
    skips_pruned,
    version_of,
    versions_of,
    zeros_of,
)
from lottery_sparse.nn.compact.registry import holders_of, lends, register
from lottery_sparse.nn.compact.slots import Slots
from lottery_sparse.nn.masked import Masked, normal
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.compact.reference import gather_kept, kept_weight, spread_kept
from lottery_sparse.ops.masked import reference as masked_reference
from lottery_sparse.pruning.mask_tensor import plain

# What torch's optimizers hold for each element of a weight, of its shape.
PER_ELEMENT = {
    "acc_delta", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq",
    "momentum_buffer", "prev", "square_avg", "step_size", "sum",
}  # fmt: skip


class Effective(Masked):
    """The part of a compact layer that makes its dense weight, and keeps it true.

    Ops get `_dense`. Where kernels skip what is pruned and never read it (`lags`) it is a blank, a
    zero in every place that takes no memory, until a dense library needs it. Those who read
    `weight_effective` or state_dict()["weight"] are lent a dense weight; the layer holds it for as
    long as they do, and takes over what they write to it.
    """

    weight: nn.Parameter
    products: str = "auto"  # "sparse", "dense": what `ls.plan` measured to be faster
    kept: KeptLists
    fresh_version: int  # of `weight` when the dense weight last got its values
    slots_before: Slots | None = None  # before this mask, or that of a copy, changed
    _dense: Tensor
    _blank: bool  # `_dense` is one
    _skips: bool  # the kernels for this layer skip pruned weights
    _lent: Tensor | None  # the dense weight that others have
    _lent_at: int  # its version when the layer last wrote to it
    _watch: Watch | None  # what `weight` held then
    _made_of: tuple[Any, ...]  # the buffers that lists and frozen values are made of
    _made_at: tuple[int, ...]  # their versions then
    _twins: bool  # another layer has the same dense weight
    _known: int | None  # id of the Parameter that the registry has for this layer

    # ---- for readers -----------------------------------------------------------------------------

    @property
    def zero(self) -> bool:
        """Whether pruned weights hold zero."""
        return self._buffers["weight_frozen"] is None

    @property
    def effective_weight(self) -> Tensor:
        """The dense weight the layer computes with; differentiable in `weight`."""
        if self._is_foreign():
            return masked_reference.effective_weight(
                self._spread(), plain(self.weight_mask), *self._held()[:2], self.rank
            )
        if not torch.compiler.is_compiling():
            self._keep_made()
        return kept_weight(self.weight, self._dense, *self.kept[:2])

    @property
    def weight_effective(self) -> Tensor:
        """The dense weight without a gradient, lent: a write to it is one to `weight`."""
        if self._is_foreign():
            return self.effective_weight.detach()
        weight = self._parameters.get("weight")
        if not isinstance(weight, nn.Parameter):
            return self.effective_weight.detach()
        if weight.is_meta:
            return self._dense
        self._keep_made()
        if self._lent is None:
            dense = self._dense
            if self._blank:
                shared = self._shared_dense()
                dense = normal(zeros_of(dense)) if shared is None else shared
                self.fresh_version = -1
            self._lent, self._lent_at = dense, dense._version
            lends(self)
        if self._is_stale(weight):
            self.refresh_()
        assert self._lent is not None
        return self._lent.detach()  # has_readers counts those that share its memory

    def _spread(self) -> Tensor:
        """`weight` as the masked layer holds it, by the mask alone."""
        return spread_kept(self.weight, plain(self.weight_mask))

    def _is_foreign(self) -> bool:
        """Whether the buffers are not those that lists and frozen values are made of."""
        held, (mask, frozen, signs) = self._buffers, self._made_of
        same = held["weight_mask"] is mask and held["weight_frozen"] is frozen
        if same and held["weight_signs"] is signs:
            return False
        return not torch.compiler.is_exporting()  # which has tensors of its own for everything

    # ---- for ops and optimizers ------------------------------------------------------------------

    @property
    def lags(self) -> bool:
        """Whether no kernel reads the dense weight, so that it is made for readers only."""
        return self._skips and self.products != "dense" and self._has_kernels()

    @property
    def target(self) -> Tensor | None:
        """The dense weight that a step writes the new values into, if ops read one."""
        return None if self._blank or self.lags else self._dense

    def stepped(self) -> None:
        """Called by a step that wrote `weight`, and `target` where there is one."""
        if self.slots_before is not None:  # a network of its own, whose mask may be yet to follow
            self._note_slots(again=not self.is_made())
        if self.target is not None:
            self.mark_fresh()
        else:
            self.written()

    def written(self) -> None:
        """Called by what wrote `weight` alone: the dense weight follows now, or when it is read."""
        if self.slots_before is not None:  # a network of its own, whose mask may be yet to follow
            self._note_slots(again=not self.is_made())
        if self.lags and self._lent is None:
            object.__setattr__(self, "fresh_version", -1)  # past nn.Module's, which costs 2 us
        else:
            self.refresh_()

    def fit_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Give state of other slots, which was loaded, the slots that the weight has here.

        Kept weights fill the first slots of both; spare ones hold zero. State of the dense weight,
        of a masked model, gives what it has for kept ones.

        Raises:
            ValueError: the state has fewer slots than this layer keeps weights.
        """
        state, shape = optimizer.state.get(self.weight) or {}, self.weight.shape
        for name, value in state.items():
            if name not in PER_ELEMENT or not isinstance(value, Tensor) or value.shape == shape:
                continue
            if value.shape == self.weight_mask.shape:
                state[name] = gather_kept(value, *self.kept[:2])
            elif value.dim() == len(shape) and value.shape[:-1] == shape[:-1]:
                most, slots = most_kept(self.weight_mask, self.rank), value.shape[-1]
                if slots < most:
                    raise ValueError(
                        f"{type(optimizer).__name__} holds state of {slots} kept weights, but a "
                        f"{type(self).__name__} of {tuple(self.weight_mask.shape)} keeps {most}; "
                        "load the model before the optimizer, in the form that was saved."
                    )
                state[name] = value.new_zeros(shape)
                state[name][..., :slots] = value[..., : shape[-1]]

    def _weights(self) -> tuple[Tensor, Tensor]:
        """The kept weights, and `_dense` as it must be for them."""
        # the dicts of nn.Module, which are quicker than its attributes
        weight = self._parameters.get("weight")
        if weight is None and "_is_replica" in self.__dict__:  # of nn.DataParallel
            weight: Any = self.__dict__["weight"]
        if weight is None:
            raise RuntimeError(
                "the weight of a compact layer cannot be computed (parametrizations, weight_norm); "
                "call ls.sparsify_ and parametrize the masked layer."
            )
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._keep_made()
        is_parameter = type(weight) is nn.Parameter or isinstance(weight, nn.Parameter)
        blank = self._blank and not self.lags  # a conv2d whose stride was changed
        if not is_parameter or (compiling and (blank or torch.compiler.is_exporting())):
            # functional_call, a replica: not ours to keep; an exported graph may get other weights
            kept = self.kept
            args = weight.detach().to(self._dense.dtype), self._dense, kept.starts, kept.columns
            return weight, kept_weight(*args)
        if not compiling:
            if self._lent is not None:
                self.take_back()
            if self._lent is not None or not self.lags:
                self.settle(weight)
        return weight, self._dense

    def settle(self, weight: nn.Parameter) -> None:
        """Make the dense weight that of `weight`, if this was written."""
        if self._blank and not self.lags:
            self.make_dense()
        if self._is_stale(weight):
            self.refresh_()

    def take_back(self) -> bool:
        """Take over what others wrote to the dense weight; whether they still have it."""
        if self._lent is None or self._is_foreign():
            return False
        self._keep_made()
        if not has_readers(self._lent):
            self._lent = None
        return self._lent is not None

    # ---- keeping it true -------------------------------------------------------------------------

    def _is_stale(self, weight: nn.Parameter) -> bool:
        if weight.is_inference():  # it counts no versions, and neither does who writes to it
            return True
        if weight._version != self.fresh_version or self._known != id(weight):
            return True
        return self._watch is not None and self._watch.sees_a_write(weight)

    def refresh_(self) -> None:
        """Copy the kept weights into the dense weight, if there is one."""
        self._keep_made()  # first: wrong lists would write over frozen values
        dense, kept = self._real(), self.kept
        if dense is not None:
            weight = self.weight.detach()
            if weight.device != dense.device:
                raise RuntimeError(
                    f"weight is on {weight.device}, but the {type(self).__name__} that holds it on "
                    f"{dense.device}; move the whole layer, layer.to(device), or put it back."
                )
            args = (dense, weight, kept.starts, kept.columns)
            dispatch.kernel("scatter_kept_", dense.device, args)(*args)
            torch.autograd.graph.increment_version(dense)
        self.mark_fresh()

    def mark_fresh(self) -> None:
        """Say that the dense weight has the values of `weight`."""
        weight, dense = self.weight, self._real()
        own = self.__dict__
        own["fresh_version"] = version_of(weight)  # past nn.Module's __setattr__
        if dense is not None:
            self._note(weight, dense)
            if own["_twins"]:
                for twin in self._others():
                    if twin._real() is dense:
                        twin.fresh_version = own["fresh_version"]
                        twin._note(weight, dense)
        if own.get("_known") != id(weight):
            register(self)
            own["_known"] = id(weight)

    def _note(self, weight: Tensor, dense: Tensor) -> None:
        own = self.__dict__
        if own["_lent"] is not None:
            own["_lent_at"] = dense._version
        watch = own["_watch"]
        if watch is None or not watch.notes(weight):
            own["_watch"] = Watch(weight, self.kept.starts)

    def _real(self) -> Tensor | None:
        """The dense weight that takes memory, if there is one."""
        return self._lent if self._blank else self._dense

    def make_dense(self) -> None:
        """Have `_dense` hold numbers, for ops that read it."""
        if not self._blank:
            return
        dense = self._shared_dense() if self._lent is None else self._lent
        self._dense = normal(zeros_of(self._dense)) if dense is None else dense
        self._blank = False
        self._fill()

    def release(self) -> None:
        """Give up a dense weight that no op reads, and nobody else has."""
        if self.lags and not self._blank and not self.take_back():
            self._dense, self._blank = blank_of(self._dense, self._dense.shape), True

    def _shared_dense(self) -> Tensor | None:
        """That of a layer with the same Parameter, mask and frozen values: one is enough."""
        for twin in self._others():
            dense = twin._real()
            if dense is not None and self._computes_as(twin, dense):
                twin._twins = self._twins = True
                return dense
        return None

    def _others(self) -> list[Effective]:
        """The other layers with this Parameter."""
        holders = holders_of(self.weight)
        return [layer for layer in holders if isinstance(layer, Effective) and layer is not self]

    def _computes_as(self, twin: Effective, dense: Tensor) -> bool:
        mine, theirs = (
            (layer.weight_mask, layer.weight_frozen, layer.weight_signs) for layer in (self, twin)
        )
        like = self._dense
        return (dense.dtype, dense.device) == (like.dtype, like.device) and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(mine, theirs, strict=True)
        )

    def _note_kernels(self) -> None:
        self._skips = skips_pruned(self._dense, self.kept, self.zero)
        if not self.lags:
            self.make_dense()

    def _has_kernels(self) -> bool:
        """Whether the layer is of a kind that kernels take."""
        return True

    # ---- what it is made of ----------------------------------------------------------------------

    def _list(self, kept: KeptLists) -> None:
        self._watch = None  # other slots are in use
        if [(t.shape, t.dtype) for t in kept] != [(t.shape, t.dtype) for t in self.kept]:
            self.kept = KeptLists(*map(normal, kept))
            return
        for held, numbers in zip(self.kept, kept, strict=True):
            held.copy_(numbers)  # the same tensors: a compiled model runs on

    def _mark_made(self) -> None:
        names = "weight_mask", "weight_frozen", "weight_signs"
        self._made_of = tuple(self._buffers[name] for name in names)
        self._made_at = versions_of(*self._made_of)

    def is_made(self) -> bool:
        """Whether nobody wrote to the buffers since lists and frozen values were made of them."""
        return versions_of(*self._made_of) == self._made_at

    def _keep_made(self) -> None:
        """Follow what others wrote: to buffers (averaged, copied, broadcast), to a lent weight."""
        lent = self._lent
        wrote = lent is not None and lent._version != self._lent_at
        made = self.is_made()
        if (made and not wrote and self.slots_before is None) or self._is_foreign():
            return
        if self.slots_before is not None:
            compact_slots.check(self)
        if made and not wrote:
            return
        noted = self.slots_before is not None
        if not made:
            mask = as_matrix(plain(self.weight_mask), self.rank)
            new = KeptLists.of(mask, self.weight.shape[-1])
            if noted and not wrote:
                self._move(new)
            self._list(new)
        if noted:
            self._note_slots(again=False)
        if wrote:
            assert lent is not None
            self._gather(lent)
        self._fill()
        if noted and made:
            self._note_slots(again=True)

    def _note_slots(self, again: bool) -> None:
        """Note what the slots hold after a write that is known, or that nobody needs to know."""
        for layer in (self, *self._others()):
            layer.slots_before = Slots.of(layer) if again else None

    @torch.no_grad()
    def _move(self, new: KeptLists) -> None:
        """Move the kept weights to the slots that a mask, written alone, gives them."""
        old = self.kept
        if all(torch.equal(a, b) for a, b in zip(old[:2], new[:2], strict=True)):
            return
        check_optimizers("the layer", self.weight)
        weight = self.weight.detach()
        dense = kept_weight(weight, self._dense, old.starts, old.columns)
        weight.copy_(gather_kept(dense, new.starts, new.columns))
        self.weight.grad = None  # of weights that were kept

    @torch.no_grad()
    def _gather(self, dense: Tensor) -> None:
        """Take the kept weights from a dense one."""
        weight, kept = self.weight.detach(), self.kept
        values = gather_kept(dense, kept.starts, kept.columns)
        if not torch.equal(values, weight):  # a write that changes nothing is none
            weight.copy_(values)

    @torch.no_grad()
    def _fill(self) -> None:
        """Write frozen and kept values into the dense weight anew."""
        dense = self._real()
        if dense is not None:
            blank = torch.zeros_like(dense)
            dense.copy_(
                masked_reference.effective_weight(
                    blank, plain(self.weight_mask), *self._held()[:2], self.rank
                )
            )
            self._lent_at = dense._version
        self._mark_made()
        self._note_kernels()
        self.refresh_()
