"""compact_linear and compact_conv2d: products whose weight is a vector of kept values.

Both compute y = product(x, W) + b, where W holds `values` at the entries that `kept` lists and is
`effective` elsewhere. `effective` must hold the values too: implementations read whichever of the
two is the faster one. The registered ops:

    forward   (x, values, bias, effective, *kept, zero, *rest) -> y
    backward  (dy, x, values, effective, *kept, zero, *rest, need_dx, need_dv) -> (dx, dvalues)

`kept` is five tensors (`compact.KeptLists`); `zero` says that effective is 0 wherever no kept entry
is. Under autocast `effective` stays in its dtype: kernels do not read it, others convert it. A
kernel of the forward has one more result, the packed x or nothing, which autograd carries to the
kernel of the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.autograd import cast_all_of
from lottery_sparse.ops.common.checks import (
    autocasts,
    check_devices,
    check_like_x,
    check_x_of_linear,
)
from lottery_sparse.ops.common.eager import eager
from lottery_sparse.ops.common.product import Product, ProductBackward
from lottery_sparse.ops.compact import arguments, reference
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.compact.lists import check_kept, once, readable
from lottery_sparse.ops.limits import CompactLimits
from lottery_sparse.ops.masked.arguments import GEOMETRY
from lottery_sparse.ops.masked.conv2d import Pair, as_pair


def compact_linear(
    x: Tensor,
    values: Tensor,
    kept: KeptLists,
    effective: Tensor,
    bias: Tensor | None = None,
    zero: bool = False,
) -> Tensor:
    """Linear layer whose parameter is the vector of its kept weights: y = x Wᵀ + b.

    >>> layer = ls.compact_(model)[0]
    >>> y = ls.ops.compact_linear(x, layer.weight, layer.kept, layer.weight_effective, zero=True)
    >>> y.shape
    torch.Size([8, 10])

    Args:
        x: [..., K], any floating dtype; for E networks [B, K], shared by all, or [E, B, K].
        values: [C] or [E, C], dtype of `x`; row-major kept weights, spare slots are ignored.
        kept: where they are, see `KeptLists.of`.
        effective: [N, K] or [E, N, K], holding the values at kept entries and frozen ones
            elsewhere. A constant: gradients flow to `values` only.
        bias: [N] or [E, N], or None.
        zero: the frozen values are all zero, so that kernels may skip them.

    Returns:
        [..., N], or [E, B, N]. A NaN or Inf in x, and in dy, goes where F.linear on W lets it:
        where it meets a weight of zero, the result is NaN.

    Gradients: dx = dy W, dvalues = (dyᵀ x) at kept entries, 0 in spare slots. Differentiable any
    number of times.

    Raises:
        ValueError: a shape, dtype, device or list does not fit; the message names the argument.
        RuntimeError: in a backward, a list that does not fit.
    """
    _check(x, values, kept, effective, bias, rank=2)
    check_x_of_linear("effective", effective, x)
    return _checked(linear, 2, x, values, kept, effective, bias, zero)


def linear(
    x: Tensor,
    values: Tensor,
    kept: KeptLists,
    effective: Tensor,
    bias: Tensor | None,
    zero: bool,
    products: str = "auto",
) -> Tensor:
    """`compact_linear` without checks, for layers that hold what fits together."""
    args = (values, bias, effective, *kept, zero)
    if not is_dynamo_compiling() and not dispatch.overrides:
        node = eager()
        if node is not None:
            y = node.compact_linear(x, *args, *LIMITS[products])
            if y is not None:  # [B, K] or [E, B, K], float32 on the CPU, and nobody watches ops
                return y
    if values.device != x.device:
        raise ValueError(f"values is on {values.device}, but x is on {x.device}; move one.")
    if values.dtype != x.dtype and not autocasts(x.device.type):
        raise ValueError(
            f"weight is {values.dtype}, but x is {x.dtype}; convert one, or use torch.autocast."
        )
    if effective.dim() == 3 or x.dim() == 2:
        return _linear(x, *args)
    rows = x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)
    y = linear(rows, values, kept, effective, bias, zero, products)
    return y.view(x.shape[:-1] + (effective.shape[0],))


# by `layer.products`
LIMITS = {
    "auto": CompactLimits(),
    "sparse": CompactLimits(product=1.0, quick=1.0, sampled=1.0),
    "dense": CompactLimits(product=-1.0, quick=-1.0, sampled=-1.0),
}


def compact_conv2d(
    x: Tensor,
    values: Tensor,
    kept: KeptLists,
    effective: Tensor,
    bias: Tensor | None = None,
    zero: bool = False,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution whose parameter is the vector of its kept weights.

    >>> layer = ls.compact_(nn.Conv2d(3, 16, 3))
    >>> ls.ops.compact_conv2d(images, layer.weight, layer.kept, layer.weight_effective).shape
    torch.Size([4, 16, 6, 6])

    Args:
        x: [B, C, H, W] or [C, H, W]; for E networks [B, C, H, W], shared, or [E, B, C, H, W].
        values, bias, zero: as in `compact_linear`.
        kept: of the mask as a matrix [O, C / groups · kh · kw].
        effective: [O, C / groups, kh, kw] or [E, O, C / groups, kh, kw].
        stride, padding, dilation, groups: as in F.conv2d, padding as numbers.

    Returns:
        [B, O, H', W'], [O, H', W'] or [E, B, O, H', W']. A NaN or Inf in x, and in dy, goes where
        F.conv2d on W lets it.
    """
    _check(x, values, kept, effective, bias, rank=4)
    single = effective.dim() == 4
    channels = effective.shape[-3] * groups
    if x.dim() not in ((3, 4) if single else (4, 5)) or x.shape[-3] != channels:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but effective {tuple(effective.shape)} with "
            f"groups={groups} needs [B, C, H, W] (or [E, B, C, H, W]) with C = {channels}."
        )
    geometry = (
        as_pair("stride", stride, 1),
        as_pair("padding", padding, 0),
        as_pair("dilation", dilation, 1),
    )
    _check_size(x, effective, *geometry)
    return _checked(conv2d, 4, x, values, kept, effective, bias, zero, *geometry, groups)


def conv2d(
    x: Tensor,
    values: Tensor,
    kept: KeptLists,
    effective: Tensor,
    bias: Tensor | None,
    zero: bool,
    *geometry: Any,
) -> Tensor:
    """`compact_conv2d` without checks."""
    batched = x.unsqueeze(0) if x.dim() == 3 else x
    y = _conv2d(batched, values, bias, effective, *kept, zero, *geometry)
    return y.squeeze(0) if x.dim() == 3 else y


def _check_size(
    x: Tensor, effective: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> None:
    for size, kernel, around, apart in zip(
        x.shape[-2:], effective.shape[-2:], padding, dilation, strict=True
    ):
        if size + 2 * around < apart * (kernel - 1) + 1:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, whose images are smaller than the kernel "
                f"{tuple(effective.shape[-2:])} with padding {tuple(padding)} and dilation "
                f"{tuple(dilation)}; take larger images, or more padding."
            )


_NUMBERS = torch.int16, torch.int32
_LISTED = {
    "starts": (torch.int64,),
    "columns": _NUMBERS,
    "column_starts": (torch.int64,),
    "rows": _NUMBERS,
    "positions": (torch.int32,),
}


def _check(
    x: Tensor, values: Tensor, kept: KeptLists, effective: Tensor, bias: Tensor | None, rank: int
) -> None:
    if effective.dim() not in (rank, rank + 1):
        raise ValueError(
            f"effective must have {rank} dimensions, or one more for networks side by side, got "
            f"shape {tuple(effective.shape)}."
        )
    networks = tuple(effective.shape[:-rank])
    rows = effective.shape[-rank]
    if values.dim() != 1 + len(networks) or tuple(values.shape[:-1]) != networks:
        raise ValueError(
            f"values has shape {tuple(values.shape)}, but effective {tuple(effective.shape)} needs "
            f"{(*networks, 'C')}: the kept weights as a vector."
        )
    columns = effective.shape[1 - rank :].numel()
    wanted = (rows + 1, values.shape[-1], columns + 1, values.shape[-1], values.shape[-1])
    for name, numbers, length in zip(KeptLists._fields, kept, wanted, strict=True):
        if tuple(numbers.shape) != (*networks, length):
            raise ValueError(
                f"kept.{name} has shape {tuple(numbers.shape)}, but values {tuple(values.shape)} "
                f"and effective {tuple(effective.shape)} need {(*networks, length)}."
            )
    if bias is not None and tuple(bias.shape) != (*networks, rows):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, but effective {tuple(effective.shape)} needs "
            f"{(*networks, rows)}."
        )
    if effective.requires_grad:
        raise ValueError("effective is a constant, got one that requires grad; detach it.")
    for name, value in (("values", values), ("effective", effective), ("bias", bias)):
        if value is not None and (value.dtype, value.device) != (x.dtype, x.device):
            check_like_x(name, value, x)
    for name, numbers in zip(KeptLists._fields, kept, strict=True):
        if numbers.device != x.device:
            check_devices(x, **{f"kept.{name}": numbers})
        if numbers.dtype not in _LISTED[name]:
            raise ValueError(
                f"kept.{name} is {numbers.dtype}, not {_LISTED[name][0]}; use KeptLists.of."
            )


def _checked(op: Callable, rank: int, x: Tensor, values: Tensor, kept: KeptLists, *args: Any):
    """The op, whose lists are known to fit, or are checked by the CPU's kernels as they read them.

    Layers, whose lists are made from masks, call it without this.
    """
    rows, columns = args[0].shape[-rank], args[0].shape[1 - rank :].numel()
    if x.device.type != "cpu":
        once(_check_lists, *kept, rows, columns)
    try:
        return op(x, values, kept, *args)
    except (RuntimeError, IndexError):
        if readable(*kept):
            check_kept(kept, rows, columns)
        raise


def _check_lists(*args: Any) -> None:
    *lists, rows, columns = args
    check_kept(KeptLists(*lists), rows, columns)


_KEPT = "Tensor starts, Tensor columns, Tensor column_starts, Tensor rows, Tensor positions"


def _define(stem: str, rank: int, geometry: str = "") -> CompactProduct:
    """Define an op and its backward; returns what calls it."""
    common = f"Tensor values, {{}}Tensor effective, {_KEPT}, bool zero{geometry}"
    torch.library.define(
        f"lottery_sparse::{stem}", f"(Tensor x, {common.format('Tensor? bias, ')}) -> Tensor"
    )
    torch.library.define(
        f"lottery_sparse::{stem}_backward",
        f"(Tensor dy, Tensor x, {common.format('')}, bool need_dx, bool need_dv) "
        "-> (Tensor, Tensor)",
    )
    return CompactProduct(stem, rank, CompactBackward)


class CompactProduct(Product):
    def run(self, *args: Any) -> Tensor:
        y, _ = super().run(*args)
        return y

    def fake(self, *args: Any) -> Tensor:
        y, _ = super().fake(*args)
        return y

    def forward(self, ctx: Any, *args: Any) -> Tensor:
        own = arguments.compact_linear(*args)
        y, carried = dispatch.kernel(self.stem, args[0].device, own)(*own)
        self.save(ctx, args, y, carried)
        return y

    def save(self, ctx: Any, inputs: tuple, output: Tensor, carried: Tensor | None = None) -> None:
        x, values, _, effective, starts, columns, column_starts, rows, positions, *ctx.rest = inputs
        lists = starts, columns, column_starts, rows, positions
        ctx.save_for_backward(x, values, effective, *lists, carried)

    def gradients(self, ctx: Any, dy: Tensor) -> tuple:
        need_dx, need_dv, need_db, *_ = ctx.needs_input_grad
        *tensors, carried = ctx.saved_tensors
        dx = dv = None
        if need_dx or need_dv:
            args = (dy, *tensors, *ctx.rest, need_dx, need_dv)
            if carried is None or torch.is_grad_enabled():  # to be differentiated again
                dx, dv = self.backward(*args)
            else:
                own = arguments.compact_linear_backward(*args)
                run = dispatch.kernel(f"{self.stem}_backward", dy.device, own)
                dx, dv = run(*own, carried)
        return (
            dx if need_dx else None,
            dv if need_dv else None,
            dy.sum(self.bias_dims) if need_db else None,
            *(None,) * (6 + len(ctx.rest)),  # effective and the lists
        )

    def cast(self, args: tuple, device: str) -> tuple:
        """All but `effective`, which most kernels do not read: those that do convert it."""
        x, values, bias, *rest = args
        return *cast_all_of((x, values, bias), device), *rest

    def vmap(self, info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _one_by_one(self, info.batch_size, in_dims, args)


class CompactBackward(ProductBackward):
    def save(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.asked_dx, ctx.asked_dv = inputs
        dy, x, values, effective, starts, columns, column_starts, rows, positions, *rest = tensors
        ctx.zero, *ctx.geometry = rest
        lists = starts, columns, column_starts, rows, positions
        ctx.save_for_backward(dy, x, values, effective, *lists)

    def gradients(self, ctx: Any, ddx: Tensor, ddv: Tensor) -> tuple:
        dy, x, values, effective, *lists = ctx.saved_tensors
        zero, geometry = ctx.zero, ctx.geometry
        need_dy, need_x, need_v, *_ = ctx.needs_input_grad
        g_dy = g_x = g_v = None
        if ctx.asked_dv and (need_dy or need_x):  # the product is bilinear: the same ops, with ddv
            blank, kept = torch.zeros_like(effective), KeptLists(*lists)
            change = reference.kept_weight(ddv.detach(), blank, kept.starts, kept.columns)
        if need_dy and ctx.asked_dx:
            g_dy = self.product(ddx, values, None, effective, *lists, zero, *geometry)
        if need_dy and ctx.asked_dv:
            through_dv = self.product(x, ddv, None, change, *lists, True, *geometry)
            g_dy = through_dv if g_dy is None else g_dy + through_dv
        if need_x and ctx.asked_dv:
            g_x, _ = self(dy, x, ddv, change, *lists, True, *geometry, True, False)
        if need_v and ctx.asked_dx:
            _, g_v = self(dy, ddx, values, effective, *lists, zero, *geometry, False, True)
        # effective, the lists, zero, need_dx, need_dv
        return (g_dy, g_x, g_v, *(None,) * (9 + len(geometry)))

    def vmap(self, info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _one_by_one(self, info.batch_size, in_dims, args)


def _one_by_one(call: Callable, size: int, in_dims: tuple, args: tuple) -> tuple:
    """vmap as a loop: networks side by side have a dimension of their own."""
    pairs = list(zip(args, in_dims, strict=True))
    each = [
        # of a list (stride, ...), in_dims has a list of None
        call(*(a.select(d, i) if type(d) is int else a for a, d in pairs))
        for i in range(size)
    ]
    if isinstance(each[0], tuple):
        return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])
    return torch.stack(each), 0


_linear = _define("compact_linear", 2)
_conv2d = _define("compact_conv2d", 4, GEOMETRY)
