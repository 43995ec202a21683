"""masked_linear: y = x where(m, w, f)ᵀ + b."""

from __future__ import annotations

import torch
from torch import Tensor

from lottery_sparse.ops import product
from lottery_sparse.ops.checks import Frozen, check_masked, split_frozen


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    frozen: Frozen = None,
) -> Tensor:
    """Linear layer on the kept weights and frozen values: y = x where(m, w, f)ᵀ + b.

    With one weight, [N, K], this is F.linear on the effective weight. A leading dimension E on
    the weight (and mask, bias, frozen) computes E networks side by side.

    Args:
        x: [..., K], any floating dtype; for E networks [B, K], shared by all, or [E, B, K].
        weight: [N, K] or [E, N, K], dtype and device of `x` (any floating dtype under autocast).
        mask: bool like `weight`, True = kept; or packed int32, see `pack_mask`.
        bias: [N] or [E, N], or None. Never masked.
        frozen: what pruned weights hold: None = zero, a tensor like `weight`, a `SignConstant`
            or a `Drawn`. Constants: no gradient flows to them.

    Returns:
        [..., N], or [E, B, N]; dtype of `x`.

    Gradients: dx = dy where(m, w, f), dw = where(m, dyᵀ x, 0): exactly zero at pruned entries.
    Selection, not multiplication: a NaN or Inf in a pruned entry reaches neither y nor dx.
    Differentiable any number of times.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.

    Source: Zhou et al. 2019, "Deconstructing Lottery Tickets", mask-0 actions.
    """
    constant, signs = split_frozen(frozen, weight, rank=2)
    check_masked(x, weight, mask, bias, constant, signs, rank=2)
    if x.dim() == 0 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but weight {tuple(weight.shape)} "
            f"needs [..., {weight.shape[-1]}]."
        )
    if weight.dim() == 3:
        if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] != weight.shape[0]):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but {weight.shape[0]} networks side by side need "
                f"[B, K], shared, or [{weight.shape[0]}, B, K]."
            )
        return _forward(x, weight, mask, bias, constant, signs)
    rows = x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0) if x.dim() == 1 else x
    y = _forward(rows, weight, mask, bias, constant, signs)
    return y.view(x.shape[:-1] + (weight.shape[0],))


torch.library.define(
    "lottery_sparse::masked_linear",
    "(Tensor x, Tensor weight, Tensor mask, Tensor? bias, Tensor? frozen, Tensor? signs) -> Tensor",
)
torch.library.define(
    "lottery_sparse::masked_linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor mask, Tensor? frozen, Tensor? signs, "
    "bool need_dx, bool need_dw) -> (Tensor, Tensor)",
)
_forward = product.register("masked_linear", rank=2, bias_dims=(-2,))
