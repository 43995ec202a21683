"""What compact layers share: blanks, a watch on a Parameter, and checks of optimizers' state."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lottery_sparse.nn.common import outside_inference_mode
from lottery_sparse.nn.compact.registry import optimizers_of
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.torch_private import storage_uses
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.compact.reference import gather_kept
from lottery_sparse.ops.limits import may_lag

# About so many of a network's kept weights are compared to see writes. Not a whole number: in a
# layer that keeps all, those compared would lie in one column, whose weights may never move.
SLOTS = 16.618
# What torch's optimizers hold for each element of a weight, of its shape.
PER_ELEMENT = {
    "acc_delta", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq",
    "momentum_buffer", "prev", "square_avg", "step_size", "sum",
}  # fmt: skip


def skips_pruned(effective: Tensor, kept: KeptLists, zero: bool) -> bool:
    """Whether the kernels for such a layer skip pruned weights."""
    return (
        effective.dtype == torch.float32
        and (effective.is_contiguous() or is_blank(effective))
        and dispatch.built("cpu")
        and not effective.is_meta
        and may_lag(effective, kept.starts, zero)
    )


def blank_of(like: Tensor, shape: torch.Size) -> Tensor:
    """A zero in every place of a dense weight, in the memory of one."""
    zero = torch.zeros(1, dtype=like.dtype, device=like.device)
    return outside_inference_mode(zero).as_strided(shape, (0,) * len(shape))


def is_blank(dense: Tensor) -> bool:
    return not any(dense.stride())


def zeros_of(blank: Tensor) -> Tensor:
    """A blank's zeros, each with memory of its own."""
    return torch.zeros(blank.shape, dtype=blank.dtype, device=blank.device)


def has_readers(tensor: Tensor) -> bool:
    """Whether other tensors share the memory of this one."""
    return storage_uses(tensor.untyped_storage()._cdata) > 2  # its own, and the storage object here


def _in_place(tensor: Tensor, kind: str) -> np.ndarray:
    """The numbers of a contiguous tensor on the CPU where they lie, which no one keeps there."""
    size = tensor.numel() * tensor.element_size()
    memory: Any = (ctypes.c_char * size).from_address(tensor.data_ptr())
    return np.frombuffer(memory, kind).reshape(tensor.shape)


class Watch:
    """The contents of a Parameter when a layer last read it, to notice writes without a version.

    Such are `p.data = t`, `p.data.copy_()`, vector_to_parameters and those of another process to
    shared memory. One that replaces or changes the whole vector changes its address or one of the
    numbers compared here, bit by bit: sixteen to thirty-three per network, spread over the kept
    ones. On other devices than the CPU, where reading them would wait, it is the address alone.
    """

    __slots__ = ("address", "count", "seen", "slots")

    def __init__(self, weight: Tensor, starts: Tensor):
        plain = type(weight) in (Tensor, nn.Parameter)
        self.address = weight.data_ptr() if plain else 0
        self.count, self.slots, self.seen = weight.numel(), None, b""
        if plain and weight.is_cpu and self.count and weight.is_contiguous():
            # in place, which takes no memory: read only where the weight still lies there
            kept = int(_in_place(starts, "i8")[..., -1].max())
            numbers = _in_place(weight, f"V{weight.element_size()}")
            self.slots = numbers[..., : max(kept, 1) : max(int(kept / SLOTS), 1)]
            self.seen = self.slots.tobytes()

    def notes(self, weight: Tensor) -> bool:
        """Note the contents of the weight; False: it has moved, so a new Watch is needed."""
        if self._lies_elsewhere(weight):
            return False
        if self.slots is not None:
            self.seen = self.slots.tobytes()
        return True

    def sees_a_write(self, weight: Tensor) -> bool:
        if self._lies_elsewhere(weight):
            return True
        return self.slots is not None and self.slots.tobytes() != self.seen

    def _lies_elsewhere(self, weight: Tensor) -> bool:
        if not self.address:
            return False
        return weight.data_ptr() != self.address or weight.numel() != self.count


def as_matrix(dense: Tensor, rank: int) -> Tensor:
    """[..., O, I, kh, kw] as [..., O, I kh kw]."""
    return dense.flatten(dense.dim() - rank + 1) if rank > 2 else dense


def follow(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor where the other one is: on its device, shared between processes if it is."""
    tensor = tensor.to(other.device)
    return tensor.share_memory_() if other.is_cpu and other.is_shared() else tensor


def version_of(weight: Tensor) -> int:
    return -2 if weight.is_inference() else weight._version  # -1 is that of a written one


def most_kept(mask: Tensor, rank: int) -> int:
    """Entries that the fullest network of a mask keeps."""
    return int((mask != 0).flatten(-rank).sum(-1).max()) if mask.numel() else 0


def elementwise(state: dict[str, Any], parameter: Tensor) -> list[Tensor]:
    """The tensors of an optimizer's state that have an element per weight."""
    return [
        v
        for v in state.values()
        if isinstance(v, Tensor) and v.dim() and v.shape == parameter.shape
    ]


def check_capacity(name: str, mask: Tensor, rank: int, capacity: int) -> None:
    """Raises ValueError for a mask that keeps more weights than there are slots."""
    most = most_kept(mask, rank)
    if most > capacity:
        raise ValueError(
            f"mask of {name} keeps {most} weights, but the compact layer has {capacity} "
            "slots; call ls.sparsify_, set the mask, then ls.compact_."
        )


def fit_state(layer: Any, optimizer: torch.optim.Optimizer) -> None:
    """Give state of other slots, which was loaded, the slots that the weight of a layer has.

    Kept weights fill the first slots of both; spare ones hold zero. State of the dense weight,
    of a masked model, gives what it has for kept ones.

    Raises:
        ValueError: the state has fewer slots than this layer keeps weights.
    """
    state, shape = optimizer.state.get(layer.weight) or {}, layer.weight.shape
    for name, value in state.items():
        if name not in PER_ELEMENT or not isinstance(value, Tensor) or value.shape == shape:
            continue
        if value.shape == layer.weight_mask.shape:
            state[name] = gather_kept(value, *layer.kept[:2])
        elif value.dim() == len(shape) and value.shape[:-1] == shape[:-1]:
            most, slots = most_kept(layer.weight_mask, layer.rank), value.shape[-1]
            if slots < most:
                raise ValueError(
                    f"{type(optimizer).__name__} holds state of {slots} kept weights, but a "
                    f"{type(layer).__name__} of {tuple(layer.weight_mask.shape)} keeps {most}; "
                    "load the model before the optimizer, in the form that was saved."
                )
            state[name] = value.new_zeros(shape)
            state[name][..., :slots] = value[..., : shape[-1]]


def check_optimizers(
    name: str, weight: nn.Parameter, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Raises ValueError for optimizers' state that a new mask would misplace.

    That of `optimizer` moves along, if it can.
    """

    def others() -> list[torch.optim.Optimizer]:
        return [
            o
            for o in optimizers_of(weight)
            if o is not optimizer
            and (elementwise(o.state.get(weight, {}), weight) or is_immovable(o, weight))
        ]

    if optimizer is not None:
        check_movable(name, weight, optimizer)
    if others():
        gc.collect()  # one that nobody uses any more may wait for it
    for other in others():
        check_movable(name, weight, other)
        raise ValueError(
            f"{type(other).__name__} holds state for the kept weights of {name}, which a new mask "
            "would misplace; pass it: set_masks_(..., optimizer=optimizer)."
        )


def check_movable(name: str, weight: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for state that cannot go with the weights to other places."""
    if is_immovable(optimizer, weight):
        kind = type(optimizer).__name__
        raise ValueError(
            f"{kind} keeps state for {name} in a form that cannot move with the weights; empty it "
            f"first, optimizer.state.clear(), or build the {kind} anew afterwards."
        )


def is_immovable(optimizer: torch.optim.Optimizer, weight: Tensor) -> bool:
    """Whether the optimizer holds state of a weight that has not one number per element.

    Such as a list (a history), or numbers per block, row or column. LBFGS keeps one history for
    all of its parameters, in which each weight has its place, under the first of them.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        return any(
            weight is p and any(optimizer.state.values())
            for group in optimizer.param_groups
            for p in group["params"]
        )
    return any(
        any(isinstance(t, Tensor) for t in v)
        if isinstance(v, list | tuple)
        else isinstance(v, Tensor) and v.numel() > 1 and v.shape != weight.shape
        for v in optimizer.state.get(weight, {}).values()
    )
