"""Mask-1 actions, which restart kept weights, and mask-0 actions, which give pruned ones a value.

Names: Zhou et al. 2019, sections 4 and 5, and the authors' code where the paper has none.
generator: an int seed or an `ls.random.Stream`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lottery_sparse.ops.random.op import as_stream

# (w_start, mask, std, generator) -> start: w_start is the layer's init (or rewind) weights, std
# the population standard deviation of its init. Only kept entries of the result matter.
Mask1 = Callable[[Tensor, Tensor, float, Any], Tensor]


def rewind(w_start: Tensor, mask: Tensor, std: float, generator: Any = None) -> Tensor:
    """The start itself: w_i."""
    return w_start.clone()


def reinit(w_start: Tensor, mask: Tensor, std: float, generator: Any = None) -> Tensor:
    """New draws from the init law, a truncated normal of the layer's std."""
    drawn = as_stream(generator).truncated_normal(w_start.shape, std)
    return drawn.to(w_start.device, w_start.dtype)


def signed_reinit(w_start: Tensor, mask: Tensor, std: float, generator: Any = None) -> Tensor:
    """New draws from the init law, each with the sign that its weight had."""
    return _with_sign_of(w_start, reinit(w_start, mask, std, generator))


def reinit_permute(w_start: Tensor, mask: Tensor, std: float, generator: Any = None) -> Tensor:
    """The layer's init values, pruned ones too, in a random order (the authors' "reinit")."""
    order = as_stream(generator).permutation(w_start.numel()).to(w_start.device)
    return w_start.flatten()[order].view_as(w_start)


def signed_reinit_permute(
    w_start: Tensor, mask: Tensor, std: float, generator: Any = None
) -> Tensor:
    """The layer's init magnitudes in a random order, each place with the sign it had."""
    return _with_sign_of(w_start, reinit_permute(w_start, mask, std, generator))


def reshuffle(w_start: Tensor, mask: Tensor, std: float, generator: Any = None) -> Tensor:
    """The kept init values in a random order among the kept places."""
    kept = w_start[mask]
    order = as_stream(generator).permutation(kept.numel()).to(kept.device)
    return w_start.masked_scatter(mask, kept[order])


def signed_reshuffle(w_start: Tensor, mask: Tensor, std: float, generator: Any = None) -> Tensor:
    """The kept init magnitudes in a random order, each place with the sign it had."""
    return _with_sign_of(w_start, reshuffle(w_start, mask, std, generator))


def constant(w_start: Tensor, mask: Tensor, std: float, generator: Any = None) -> Tensor:
    """±std, the layer's init signs in a random order ("rand_signed_constant")."""
    return reinit_permute(signed_constant(w_start, mask, std), mask, std, generator)


def signed_constant(w_start: Tensor, mask: Tensor, std: float, generator: Any = None) -> Tensor:
    """sign(w_i) std"""
    return w_start.sign() * std


def mask_init(w_start: Tensor, mask: Tensor, std: float, generator: Any = None) -> Tensor:
    """w_i where kept, 0 where pruned; with mask-0 "original" these zeros train, too."""
    return torch.where(mask, w_start, 0.0)


def _with_sign_of(w_start: Tensor, magnitudes: Tensor) -> Tensor:
    return w_start.sign() * magnitudes.abs()


def _rescaled(action: Mask1) -> Mask1:
    """The action, then times size / kept, so that the summed scale of the layer stays."""

    def rescaled(w_start: Tensor, mask: Tensor, std: float, generator: Any = None) -> Tensor:
        scale = mask.numel() / max(int(mask.count_nonzero()), 1)
        return action(w_start, mask, std, generator) * scale

    rescaled.__doc__ = f"{(action.__doc__ or '').rstrip('.')}, then times 1 / density."
    return rescaled


MASK1_ACTIONS: dict[str, Mask1] = {
    "rewind": rewind,
    "reinit": reinit,
    "signed_reinit": signed_reinit,
    "reinit_permute": reinit_permute,
    "signed_reinit_permute": signed_reinit_permute,
    "reshuffle": reshuffle,
    "signed_reshuffle": signed_reshuffle,
    "constant": constant,
    "signed_constant": signed_constant,
    "reinit_rescaling": _rescaled(reinit),
    "signed_reinit_rescaling": _rescaled(signed_reinit),
    "constant_rescaling": _rescaled(constant),
    "signed_constant_rescaling": _rescaled(signed_constant),
    "mask_init": mask_init,
}


class Mask0(NamedTuple):
    """The decision of a mask-0 action for one layer."""

    frozen: Tensor | None  # values that pruned weights hold; None = zero
    start_at_zero: Tensor | None = None  # weights that train on from 0; None = none
    released: bool = False  # True: nothing is frozen, every weight trains


# (w_init, w_final, mask, previous_mask, previous_frozen, generator) -> Mask0: w_init and w_final
# are the effective weights at the start and the end of the round that chose `mask`;
# previous_frozen is None before anything was frozen to a value. A weight is decided on in the
# round that prunes it, and holds that value from then on.
Mask0Action = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", Any], Mask0]


def zero(w_init, w_final, mask, previous_mask, previous_frozen, generator=None) -> Mask0:
    """Zero, as in every pruning paper."""
    return Mask0(None)


def freeze_init(w_init, w_final, mask, previous_mask, previous_frozen, generator=None) -> Mask0:
    """The value that the round started from."""
    return Mask0(_freeze(w_init, mask, previous_mask, previous_frozen))


def freeze_init_zero_mask(
    w_init, w_final, mask, previous_mask, previous_frozen, generator=None
) -> Mask0:
    """Variant 1: 0 if the weight moved towards 0, |w_f| < |w_i|, else its init."""
    value = torch.where(_towards_zero(w_init, w_final), 0.0, w_init)
    return Mask0(_freeze(value, mask, previous_mask, previous_frozen))


def freeze_init_zero_all(
    w_init, w_final, mask, previous_mask, previous_frozen, generator=None
) -> Mask0:
    """Variant 2: Variant 1, and kept weights that moved towards 0 restart from 0."""
    frozen = freeze_init_zero_mask(w_init, w_final, mask, previous_mask, previous_frozen).frozen
    # a weight that started this round from 0 can only have grown: it stays one that starts at 0
    return Mask0(frozen, start_at_zero=mask & (_towards_zero(w_init, w_final) | (w_init == 0)))


def freeze_init_zero_reshuffle(
    w_init, w_final, mask, previous_mask, previous_frozen, generator=None
) -> Mask0:
    """Control: as many zeros as Variant 1 sets, at random places among the pruned weights."""
    pruned = previous_mask & ~mask
    towards_zero = _towards_zero(w_init, w_final)[pruned]
    order = as_stream(generator).permutation(towards_zero.numel()).to(w_init.device)
    zeros = torch.zeros_like(mask).masked_scatter(pruned, towards_zero[order])
    value = torch.where(zeros, 0.0, w_init)
    return Mask0(_freeze(value, mask, previous_mask, previous_frozen))


def freeze_init_zero_rev(
    w_init, w_final, mask, previous_mask, previous_frozen, generator=None
) -> Mask0:
    """Inverse control: 0 if the weight moved away from 0, |w_f| > |w_i|, else its init."""
    value = torch.where(w_final.abs() > w_init.abs(), 0.0, w_init)
    return Mask0(_freeze(value, mask, previous_mask, previous_frozen))


def freeze_reinit(w_init, w_final, mask, previous_mask, previous_frozen, generator=None) -> Mask0:
    """A value drawn anew: truncated normal with the standard deviation of w_init."""
    std = float(w_init.std(correction=0))
    value = reinit(w_init, mask, std, generator)
    return Mask0(_freeze(value, mask, previous_mask, previous_frozen))


def original(w_init, w_final, mask, previous_mask, previous_frozen, generator=None) -> Mask0:
    """Nothing is frozen: a dense network, whatever the mask. Use it with mask-1 "mask_init"."""
    return Mask0(None, released=True)


def _towards_zero(w_init: Tensor, w_final: Tensor) -> Tensor:
    return w_final.abs() < w_init.abs()


def _freeze(
    value: Tensor, mask: Tensor, previous_mask: Tensor, previous_frozen: Tensor | None
) -> Tensor:
    """`value` where this round pruned, the earlier value where another did, 0 where kept."""
    earlier = torch.zeros_like(value) if previous_frozen is None else previous_frozen
    frozen = torch.where(previous_mask, value, earlier)
    return torch.where(mask, 0.0, frozen)


MASK0_ACTIONS: dict[str, Mask0Action] = {
    "zero": zero,
    "freeze_init": freeze_init,
    "freeze_init_zero_mask": freeze_init_zero_mask,
    "freeze_init_zero_all": freeze_init_zero_all,
    "freeze_init_zero_reshuffle": freeze_init_zero_reshuffle,
    "freeze_init_zero_rev": freeze_init_zero_rev,
    "freeze_reinit": freeze_reinit,
    "original": original,
}
