"""The autograd of masked_linear and masked_conv2d.

    forward   (x, weight, mask, bias, frozen, signs, *geometry) -> y
    backward  (dy, x, weight, mask, frozen, signs, *geometry, need_dx, need_dw) -> (dx, dw)

The product is bilinear in x and the effective weight, so the gradients of its gradients are these
two ops again, to any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops.common.product import Product, ProductBackward


def masked_product(stem: str, rank: int, geometry: str = "") -> MaskedProduct:
    """Define an op and its backward; returns what calls it."""
    common = f"Tensor? frozen, Tensor? signs{geometry}"
    torch.library.define(
        f"lottery_sparse::{stem}",
        f"(Tensor x, Tensor weight, Tensor mask, Tensor? bias, {common}) -> Tensor",
    )
    torch.library.define(
        f"lottery_sparse::{stem}_backward",
        f"(Tensor dy, Tensor x, Tensor weight, Tensor mask, {common}, bool need_dx, bool need_dw) "
        "-> (Tensor, Tensor)",
    )
    return MaskedProduct(stem, rank, MaskedBackward, tensors=6)


class MaskedProduct(Product):
    def save(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, mask, _, frozen, signs, *ctx.geometry = inputs
        ctx.save_for_backward(x, weight, mask, frozen, signs)

    def gradients(self, ctx: Any, dy: Tensor) -> tuple:
        need_dx, need_dw, _, need_db, *_ = ctx.needs_input_grad
        dx = dw = None
        if need_dx or need_dw:
            dx, dw = self.backward(dy, *ctx.saved_tensors, *ctx.geometry, need_dx, need_dw)
        return (
            dx if need_dx else None,
            dw if need_dw else None,
            None,
            dy.sum(self.bias_dims) if need_db else None,
            *(None,) * (2 + len(ctx.geometry)),  # frozen, signs
        )


class MaskedBackward(ProductBackward):
    def save(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.asked_dx, ctx.asked_dw = inputs
        dy, x, weight, mask, frozen, signs, *ctx.geometry = tensors
        ctx.save_for_backward(dy, x, weight, mask, frozen, signs)

    def gradients(self, ctx: Any, ddx: Tensor, ddw: Tensor) -> tuple:
        dy, x, weight, mask, frozen, signs = ctx.saved_tensors
        need_dy, need_x, need_w = ctx.needs_input_grad[:3]
        g_dy = g_x = g_w = None
        if need_dy and ctx.asked_dx:
            g_dy = self.product(ddx, weight, mask, None, frozen, signs, *ctx.geometry)
        if need_dy and ctx.asked_dw:
            through_dw = self.product(x, ddw, mask, None, None, None, *ctx.geometry)
            g_dy = through_dw if g_dy is None else g_dy + through_dw
        if need_x and ctx.asked_dw:
            g_x, _ = self(dy, x, ddw, mask, None, None, *ctx.geometry, True, False)
        if need_w and ctx.asked_dx:
            _, g_w = self(dy, ddx, weight, mask, None, None, *ctx.geometry, False, True)
        # mask, frozen, signs, need_dx, need_dw
        return (g_dy, g_x, g_w, *(None,) * (5 + len(ctx.geometry)))
