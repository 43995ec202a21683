"""masked_linear: y = x where(m, w, f)ᵀ + b."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.autograd import EagerFunction, cast_all_of
from lottery_sparse.ops.common.checks import Frozen, check_masked, check_x_of_linear, split_frozen
from lottery_sparse.ops.masked.arguments import MaskedArgs
from lottery_sparse.ops.masked.product import masked_product


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

    >>> ls.ops.masked_linear(x, weight, mask).shape
    torch.Size([8, 10])

    Args:
        x: [..., K], any floating dtype; for E networks [B, K], shared by all, or [E, B, K].
        weight: [N, K] or [E, N, K], dtype and device of `x` (any floating dtype under autocast).
        mask: bool like `weight`, True = kept; or packed int32, see `pack_mask`.
        bias: [N] or [E, N], or None. Never masked.
        frozen: what pruned weights hold: None = zero, a tensor like `weight` or a
            `SignConstant`. Constants: no gradient flows to them.

    Returns:
        [..., N], or [E, B, N]; dtype of `x`.

    Gradients: dx = dy where(m, w, f), dw = where(m, dyᵀ x, 0): exactly zero at pruned entries.
    Selection, not multiplication: a NaN or Inf in a pruned entry reaches neither y nor dx. One in x
    or dy goes where F.linear lets it: with a weight of zero it makes NaN.
    Differentiable any number of times.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.

    Source: Zhou et al. 2019, "Deconstructing Lottery Tickets", mask-0 actions.
    """
    constant, signs = split_frozen(frozen, weight, rank=2)
    check_masked(x, weight, mask, bias, constant, signs, rank=2)
    check_x_of_linear("weight", weight, x)
    if weight.dim() == 3:
        return _forward(x, weight, mask, bias, constant, signs)
    rows = x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0) if x.dim() == 1 else x
    y = _forward(rows, weight, mask, bias, constant, signs)
    return y.view(x.shape[:-1] + (weight.shape[0],))


def way_of(x: Tensor, weight: Tensor, least_rows: tuple[int, int]) -> str:
    """The shortest way to what `masked_linear` computes, for plain eager tensors at rest.

    Args:
        x, weight: as of `masked_linear`, one network; what does not fit is for the op to name.
        least_rows: from so many rows of x on the CPU kernel is the faster way, in float32 and in
            bfloat16.

    Returns:
        "dense": dispatch takes the dense library, so F.linear does it; "kernel": it takes the CPU
        kernel, so `by_kernel` does it; "op": anything else.
    """
    kind, dtype = weight.device.type, x.dtype
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[-1]
    if not fits or x.device != weight.device or dispatch.forced() is not None:
        return "op"
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif dtype != weight.dtype:
        return "op"
    if kind != "cpu":
        return "dense" if dispatch.prefers_dense("masked_linear", kind) else "op"
    if dtype not in _KERNEL_DTYPES:
        return "dense"
    rows = x.numel() // max(x.shape[-1], 1)
    return "kernel" if rows >= least_rows[_KERNEL_DTYPES.index(dtype)] else "dense"


_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def by_kernel(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """`masked_linear` with zeros by the CPU kernel, past checks and dispatch: see `way_of`.

    Dispatch would count what the mask keeps, in the forward and in the backward.
    """
    rows = x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0) if x.dim() == 1 else x
    if torch.is_autocast_enabled("cpu"):
        rows, weight, _, bias = cast_all_of((rows, weight, mask, bias), "cpu")
    asks = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if asks and torch.is_grad_enabled():
        y: Tensor = _ByKernel.apply(rows, weight, mask, bias)  # pyright: ignore
    else:
        y = dispatch.function("masked_linear", "cpu")(MaskedArgs(rows, weight, mask, bias))
    return y if x.dim() == 2 else y.view(x.shape[:-1] + (weight.shape[0],))


class _ByKernel(EagerFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        return dispatch.function("masked_linear", "cpu")(MaskedArgs(x, weight, mask, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,), (x, weight, mask) = grads, ctx.saved_tensors
        need_dx, need_dw, _, need_db = ctx.needs_input_grad
        dx = dw = None
        if need_dx or need_dw:
            if torch.is_grad_enabled() or type(dy) is not Tensor:  # gradients of gradients
                dx, dw = _forward.backward(dy, x, weight, mask, None, None, need_dx, need_dw)
            else:
                run = dispatch.function("masked_linear_backward", "cpu")
                dx, dw = run(MaskedArgs(x, weight, mask), dy, need_dx, need_dw)
        return (
            dx if need_dx else None,
            dw if need_dw else None,
            None,
            dy.sum(0) if need_db else None,
        )


_forward = masked_product("masked_linear", rank=2)
