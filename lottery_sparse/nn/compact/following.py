"""How a compact layer stays true to itself: who may write to what, and what follows.

    weight            the Parameter: optimizers, loads, everybody
    buffers           mask, frozen values, signs: copies and averages of models, broadcasts
    a lent weight     the dense weight that a reader has: averages that write to a state_dict
    lists             ours alone; they follow the mask
    dense weight      ours until it is lent; it follows buffers and weight

`Derived` notes the versions of the first three whenever all five agree. `follow` runs before each
use, compares them, and takes in what was written, in this order: new buffers (`fill`; the weights
move to their new slots first, see `slots`), then a lent weight, whose kept entries enter `weight`.
A write to `weight` itself is taken in by `scatter`, where somebody reads the dense weight.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from lottery_sparse.nn.common import outside_inference_mode
from lottery_sparse.nn.compact import slots
from lottery_sparse.nn.compact.moving import as_matrix, skips_pruned, zeros_of
from lottery_sparse.nn.compact.registry import register, twins_of
from lottery_sparse.nn.masked import masked_alike
from lottery_sparse.nn.rest import put_back_
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.compact.reference import gather_kept
from lottery_sparse.pruning.mask_tensor import MaskTensor, plain


def follow(layer: Any) -> None:
    """Take in what others wrote to the buffers of a layer, or to the dense weight that was lent.

    Raises:
        RuntimeError: the slots of an average mix weights of two masks.
        ValueError: the mask keeps more weights than there are slots, or an optimizer holds state
            for the old ones.
    """
    derived = layer._derived
    written, current = derived.is_lent and derived.lent_was_written(), derived.is_current()
    if current and not written and derived.slots_before is None:
        return
    if layer._buffers_were_swapped():
        return
    if derived.slots_before is not None:
        slots.check(layer)
    if current and not written:
        return
    noted = derived.slots_before is not None
    if not current:
        mask = plain(layer.weight_mask)
        new = KeptLists.of(as_matrix(mask, layer.rank), layer.capacity)
        if noted and not written:
            slots.move(layer, new)
        set_lists(layer, new)
    if written:
        gather(layer)
    fill(layer)
    if noted:
        slots.note(layer, again=current)


def start(layer: Any, family: WeakSet[Any]) -> None:
    """Say that all five agree, in a layer that has new lists. It takes no memory of tensors."""
    note_buffers(layer)
    slots.join(layer, family)
    if not layer.weight.is_meta:
        note_weight(layer)


def set_lists(layer: Any, kept: KeptLists) -> None:
    """Give a layer the lists of the mask that it has."""
    layer._derived.set_lists(kept)
    slots.join(layer, slots.family_of(plain(layer.weight_mask)))


@torch.no_grad()
def fill(layer: Any) -> None:
    """Write frozen and kept values into the dense weight anew, for buffers that lists are of."""
    derived = layer._derived
    note_buffers(layer)
    derived.skips_pruned = skips_pruned(derived.dense, derived.kept, layer.zero)
    if not layer.refreshes_lazily:
        make_dense(layer)
    if derived.real is not None:
        mask, frozen, signs = derived.plain
        put_back_(derived.real, mask, frozen, signs, layer.rank)
    scatter(layer)


def scatter(layer: Any) -> None:
    """Write the kept weights into the dense weight, if there is one."""
    weight, dense = layer.weight.detach(), layer._derived.real
    if dense is not None:
        if weight.device != dense.device:
            raise RuntimeError(
                f"weight is on {weight.device}, but the {type(layer).__name__} that holds it on "
                f"{dense.device}; move the whole layer, layer.to(device), or put it back."
            )
        args = (dense, weight, layer.kept.starts, layer.kept.columns)
        dispatch.kernel("scatter_kept_", dense.device, args)(*args)
        torch.autograd.graph.increment_version(dense)
    note_weight(layer)


@torch.no_grad()
def gather(layer: Any) -> None:
    """Write the kept weights of the lent dense weight into `weight`."""
    values, weight = gather_kept(layer._derived.real, *layer.kept[:2]), layer.weight.detach()
    if not torch.equal(values, weight):  # a write that changes nothing is none
        weight.copy_(values)


def note_buffers(layer: Any) -> None:
    """Say that lists and frozen values are those of the buffers."""
    layer._derived.note_buffers(layer._buffers)
    if isinstance(layer.weight_mask, MaskTensor):  # else somebody has put in a tensor of torch
        layer.weight_mask.age.readers.add(layer)


def note_weight(layer: Any) -> None:
    """Say that the dense weight has the values of `weight`."""
    weight, derived = layer.weight, layer._derived
    derived.note_weight(weight)
    if derived.is_shared and derived.real is not None:
        for twin in twins_of(layer):
            if twin._derived.real is derived.real:
                twin._derived.note_weight(weight)
    if derived.parameter_id != id(weight):
        register(layer)
        derived.parameter_id = id(weight)


# ---- the dense weight: there, read by ops, shared by layers with the same Parameter --------------


def make_real(layer: Any) -> None:
    """Have a dense weight, that of a twin or a new one; the kept weights are yet to enter it.

    A new one holds zero where pruned: there is one already where frozen values are others.
    """
    derived = layer._derived
    if derived.real is None:
        derived.real, derived.weight_version = _shared_dense(layer), -1
        if derived.real is None:
            derived.real = outside_inference_mode(zeros_of(derived.dense))


def make_dense(layer: Any) -> None:
    """Have ops get a dense weight."""
    derived = layer._derived
    if derived.is_blank:
        make_real(layer)
        derived.read()


def share_dense(layer: Any) -> None:
    """Have ops get the dense weight of a twin, where there is one."""
    derived = layer._derived
    shared = None if derived.is_blank else _shared_dense(layer)
    if shared is not None:
        derived.real = shared
        derived.read()


def _shared_dense(layer: Any) -> Tensor | None:
    """That of a layer with the same Parameter, mask and frozen values: one is enough."""
    like = layer._derived.dense
    for twin in twins_of(layer):
        real = twin._derived.real
        if real is None or (real.dtype, real.device) != (like.dtype, like.device):
            continue
        if masked_alike(layer, twin):
            twin._derived.is_shared = layer._derived.is_shared = True
            return real
    return None
