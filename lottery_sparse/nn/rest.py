"""A masked layer at rest: its Parameter holds what the layer computes with.

Pruned entries of `weight` hold their frozen values. Whatever can move them (an optimizer's step, a
load, a write in place) is followed by writing the frozen values again, so `layer.weight`, the
state_dict and the forward all see one weight.

A hook runs after each step of any torch optimizer (`registry`). The next forward, and state_dict(),
notice all other writes: by version counters, or, for writes that count no version (`.data`, another
process), by the address and by up to sixteen kept and sixteen pruned entries. A write that changes
every kept entry, or every pruned one, is seen. A write through `.data` to a part of the weight may
stay unseen until `ls.nn.refresh_`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.autograd import EagerFunction
from lottery_sparse.ops.common.eager import eager
from lottery_sparse.ops.limits import NEVER
from lottery_sparse.ops.masked.dense import INTEGERS, effective_weight, ones, select
from lottery_sparse.pruning.mask_tensor import plain

SPOTS = 16  # kept entries that are looked at, and as many pruned ones
_TRIED = 256  # entries, spread over the weight, among which they are looked for
_GOLDEN = 0.6180339887498949  # multiples of it, without their whole part, spread over [0, 1]


class Own(NamedTuple):
    """The tensors that a masked layer computes its weight from."""

    weight: Tensor | None  # the Parameter
    mask: Tensor  # these are its buffers
    frozen: Tensor | None
    signs: Tensor | None


class Rest(NamedTuple):
    """The state of a layer's tensors when its weight was last at rest.

    csrc/linear/eager_masked.h reads the fields in this order.
    """

    own: Own
    tensors: tuple[Any, ...]  # the same, with mask and signs as plain tensors, which are quicker
    versions: tuple[int, ...] = ()  # of these; empty: never at rest so far
    address: int = 0  # of the weight
    kept: int = -1  # entries that the mask keeps
    spots: Tensor | None = None  # flat indices of some entries, kept and pruned
    values: Tensor | None = None  # of these entries; None: none is looked at
    least_rows: tuple[int, int] = (0, 0)  # of x, for the sparse kernel in float32 and in bfloat16
    node: Callable | None = None  # of `ops.eager`: the forward of a plain eager call

    @classmethod
    def of(cls, own: Own) -> Rest:
        """A start, for tensors of which nothing is known yet."""
        weight, mask, frozen, signs = own
        return cls(own, (weight, plain(mask), frozen, None if signs is None else plain(signs)))

    def reached(self, rank: int) -> Rest:
        """Put the weight to rest, in place; returns the state of the tensors after it."""
        weight, mask, frozen, signs = self.tensors
        versions = versions_of(mask, frozen, signs)
        same = self.versions[1:] == versions
        kept = self.kept if same else int(mask.count_nonzero())
        if kept < mask.numel():
            put_back_(weight, mask, frozen, signs, rank)
        spots = self.spots
        if not same:
            spots = _spots(mask) if mask.is_cpu and kept < mask.numel() else None
        now = self._replace(
            versions=(weight._version, *versions),
            address=weight.data_ptr(),
            spots=spots,
            values=None if spots is None else torch.take(weight.detach(), spots),
        )
        if same:
            return now
        return now._replace(
            kept=kept,
            least_rows=tuple(_least_rows(weight, kept, frozen, dtype) for dtype in _KERNEL_DTYPES),
            node=_node(weight, rank),
        )

    @property
    def mask(self) -> Tensor:
        return self.tensors[1]

    @property
    def prunes(self) -> bool:
        return self.kept < self.tensors[1].numel()

    def is_of(self, parameters: dict[str, Any], buffers: dict[str, Any]) -> bool:
        """Whether a layer, of which these are the dicts, holds these tensors.

        It holds others within a functional call.
        """
        weight, mask, frozen, signs = self.own
        return (
            parameters.get("weight") is weight
            and buffers["weight_mask"] is mask
            and buffers["weight_frozen"] is frozen
            and buffers["weight_signs"] is signs
        )

    def holds(self, looks: bool) -> bool:
        """Whether nobody has written to the tensors since, as far as can be seen.

        looks: whether some entries are looked at, for writes that count no version.
        """
        weight, *buffers = self.tensors
        if self.versions != (weight._version, *versions_of(*buffers)):
            return False
        if self.address != weight.data_ptr():
            return False
        if self.values is None or self.spots is None or not looks:
            return True
        return torch.equal(torch.take(weight.detach(), self.spots), self.values)


def _node(weight: Tensor, rank: int) -> Callable | None:
    """The C++ node for plain eager forwards of one network on the CPU; None: it is not built."""
    module = eager() if weight.is_cpu and weight.dim() == rank else None
    if module is None:
        return None
    return module.masked_linear if rank == 2 else module.kept_weight


_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def _least_rows(weight: Tensor, kept: int, frozen: Tensor | None, dtype: torch.dtype) -> int:
    """The number of rows of x from which on dispatch takes the sparse kernel."""
    if frozen is not None or not dispatch.built("cpu"):  # nothing to skip, or no kernel
        return NEVER
    return dispatch.library_of("cpu").masked_linear_least_rows(dtype, kept, weight.numel())


def versions_of(mask: Tensor, frozen: Tensor | None, signs: Tensor | None) -> tuple[int, ...]:
    """The versions of a layer's buffers; no loop, since each forward asks."""
    if frozen is None:
        return (mask._version,)
    return mask._version, frozen._version, 0 if signs is None else signs._version


def _spots(mask: Tensor) -> Tensor:
    """The flat indices of up to SPOTS kept and SPOTS pruned entries, spread over the weight.

    They are no whole number of rows apart, or all might lie in one column, whose kept weights never
    move where that feature of x is always 0.
    """
    tried = torch.arange(min(_TRIED, mask.numel()))
    if len(tried) < mask.numel():
        tried = (tried * _GOLDEN % 1 * mask.numel()).long()
    kept = torch.take(mask, tried)
    return torch.cat([tried[kept][:SPOTS], tried[~kept][:SPOTS]])


def put_back_(
    weight: Tensor, mask: Tensor, frozen: Tensor | None, signs: Tensor | None, rank: int
) -> None:
    """Write the frozen values into the pruned entries of a weight, in place."""
    weight = weight.detach()  # which counts versions with the Parameter, and has no gradient
    by_kernel = signs is None and weight.is_cpu and dispatch.built("cpu")
    if by_kernel and (flat := _flat(weight, mask, frozen)) is not None:
        if dispatch.function("put_back_", "cpu")(*flat):
            torch.autograd.graph.increment_version(weight)
    elif frozen is None:
        weight.view(INTEGERS[weight.element_size()]).bitwise_and_(ones(mask, weight))
    else:
        weight.copy_(effective_weight(weight, mask, frozen, signs, rank))


def _flat(weight: Tensor, *others: Tensor | None) -> list[Tensor | None] | None:
    """The tensors as vectors in memory order; None: their memory orders differ."""
    dense = weight.is_contiguous() or (
        weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )
    if not dense or any(t is not None and t.stride() != weight.stride() for t in others):
        return None
    return [None if t is None else t.as_strided((t.numel(),), (1,)) for t in (weight, *others)]


# ---- the gradient --------------------------------------------------------------------------------


class KeptGradient(EagerFunction):
    """The weight itself, with a gradient that is exactly zero at pruned entries."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (mask,) = ctx.saved_tensors
        gradient = grads[0]
        if torch.is_grad_enabled() or type(gradient) is not Tensor:  # gradients of gradients
            return torch.where(mask, gradient, 0.0), None
        if gradient.is_cpu and gradient.is_contiguous() and dispatch.built("cpu"):
            return dispatch.function("select_kept", "cpu")(gradient, mask, None), None
        return select(mask, gradient, None), None
