"""What masked_linear and masked_conv2d share: kernel, gradients, vmap and autocast.

Both compute y = product(x, where(m, w, f)) + b with the arguments

    forward   (x, weight, mask, bias, frozen, signs, *rest) -> y
    backward  (dy, x, weight, mask, frozen, signs, *rest, need_dx, need_dw) -> (dx, dw)

where an output that is not needed is empty, [0]. The product is bilinear in x and the effective
weight, so the gradients of its gradients are these two ops again, to any order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.autograd import differentiable
from lottery_sparse.ops.common.checks import AUTOCAST_KEYS, autocasts
from lottery_sparse.ops.limits import rounds


def register(stem: str, rank: int, bias_dims: tuple[int, ...]) -> Callable:
    """Give the defined ops `stem` and `stem`_backward everything but their schema.

    Args:
        stem: name of the forward op.
        rank: dimensions of one weight and of one x.
        bias_dims: the dimensions of y that the bias does not have.

    Returns:
        the differentiable forward function.
    """
    name, name_backward = f"lottery_sparse::{stem}", f"lottery_sparse::{stem}_backward"
    op = getattr(torch.ops.lottery_sparse, stem).default
    op_backward = getattr(torch.ops.lottery_sparse, f"{stem}_backward").default

    def run(*args: Any) -> Tensor:
        return dispatch.kernel(stem, args[0].device, args)(*args)

    def run_backward(*args: Any) -> tuple[Tensor, Tensor]:
        return dispatch.kernel(f"{stem}_backward", args[0].device, args)(*args)

    torch.library.impl(name, "default", run)
    torch.library.impl(name_backward, "default", run_backward)
    torch.library.register_fake(name, dispatch.function(stem, "reference"))
    torch.library.register_fake(name_backward, dispatch.function(f"{stem}_backward", "reference"))

    def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, mask, _, frozen, signs, *ctx.rest = inputs
        ctx.save_for_backward(x, weight, mask, frozen, signs)

    def gradients(ctx: Any, dy: Tensor) -> tuple:
        need_dx, need_dw, _, need_db, *_ = ctx.needs_input_grad
        dx = dw = None
        if need_dx or need_dw:
            dx, dw = backward(dy, *ctx.saved_tensors, *ctx.rest, need_dx, need_dw)
        return (
            dx if need_dx else None,
            dw if need_dw else None,
            None,
            dy.sum(bias_dims) if need_db else None,
            *(None for _ in ("frozen", "signs", *ctx.rest)),
        )

    def save_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.asked_dx, ctx.asked_dw = inputs
        ctx.save_for_backward(*tensors[:6])
        ctx.rest = tensors[6:]

    def second_gradients(ctx: Any, ddx: Tensor, ddw: Tensor) -> tuple:
        dy, x, weight, mask, frozen, signs = ctx.saved_tensors
        need_dy, need_x, need_w = ctx.needs_input_grad[:3]
        g_dy = g_x = g_w = None
        if need_dy and ctx.asked_dx:
            g_dy = forward(ddx, weight, mask, None, frozen, signs, *ctx.rest)
        if need_dy and ctx.asked_dw:
            through_dw = forward(x, ddw, mask, None, None, None, *ctx.rest)
            g_dy = through_dw if g_dy is None else g_dy + through_dw
        if need_x and ctx.asked_dw:
            g_x, _ = backward(dy, x, ddw, mask, None, None, *ctx.rest, True, False)
        if need_w and ctx.asked_dx:
            _, g_w = backward(dy, ddx, weight, mask, None, None, *ctx.rest, False, True)
        others = ("mask", "frozen", "signs", *ctx.rest, "need_dx", "need_dw")
        return (g_dy, g_x, g_w, *(None for _ in others))

    forward = differentiable(name, op, run, save, gradients, partial(vmap_forward, rank, 6))
    backward = differentiable(
        name_backward,
        op_backward,
        run_backward,
        save_backward,
        second_gradients,
        partial(vmap_backward, rank, 6),
    )
    register_autocast(name, op)

    def forward_autocast(*args: Any) -> Tensor:
        # cast before torch.func saves anything, or dy and x would differ in dtype
        device = args[0].device.type
        return forward(*(cast_all_of(args, device) if autocasts(device) else args))

    return forward_autocast


def register_autocast(name: str, op: Callable, cast_all: Callable | None = None) -> None:
    """Under torch.autocast every floating tensor is cast to the autocast dtype, as F.linear's."""
    cast_all = cast_all or cast_all_of
    for device, key in AUTOCAST_KEYS.items():

        def cast(*args: Any, device: str = device, key: str = key) -> Any:
            below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(below):
                return op(*cast_all(args, device))

        torch.library.impl(name, key, cast)


def cast_all_of(args: tuple, device: str) -> tuple:
    dtype = torch.get_autocast_dtype(device)
    return tuple(cast_one(a, device, dtype) for a in args)


def cast_one(value: Any, device: str, dtype: torch.dtype) -> Any:
    eligible = (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.device.type == device
        and value.dtype != torch.float64
    )
    return value.to(dtype) if eligible else value


def vmap_forward(rank: int, tensors: int, op: Callable) -> Callable:
    """The vmap rule of op(x, weight, mask, bias, frozen, signs, *rest) -> y.

    tensors: x, and after it all that a network has of its own, the first like its weight.
    """

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        size, dims = info.batch_size, in_dims[:tensors]
        x, *network = (_front(a, d) for a, d in zip(args[:tensors], dims, strict=True))
        rest = args[tensors:]
        if all(d is None for d in dims[1:]):  # one network, more inputs: a larger batch
            batch_dim = x.dim() - rank  # x: [V, B, …] or [V, E, B, …]
            x = x.movedim(0, batch_dim - 1)
            y = op(x.flatten(batch_dim - 1, batch_dim), *network, *rest)
            return y.unflatten(y.dim() - rank, (size, -1)), y.dim() - rank
        network = [_batched(a, d, size) for a, d in zip(network, dims[1:], strict=True)]
        inner = network[0].dim() - rank - 1  # 1 if each vmapped weight is replicated already
        if dims[0] is None and (x.dim() == rank):
            y = op(x, *(_fold(a, inner) for a in network), *rest)
        else:
            x = _expanded(x, dims[0], size, network[0], rank, inner)
            y = op(_fold(x, inner), *(_fold(a, inner) for a in network), *rest)
        return (y.unflatten(0, (size, -1)) if inner else y), 0

    return rule


def vmap_backward(rank: int, tensors: int, op: Callable) -> Callable:
    """The vmap rule of op(dy, x, weight, mask, frozen, signs, *rest) -> (dx, dw, ...).

    tensors: dy and x, and after them as above.

    Everything is expanded to one network per vmapped element: each wants its own gradients.
    """

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple]:
        size, dims = info.batch_size, in_dims[:tensors]
        dy, x, *network = (_front(a, d) for a, d in zip(args[:tensors], dims, strict=True))
        network = [_batched(a, d, size) for a, d in zip(network, dims[2:], strict=True)]
        inner = network[0].dim() - rank - 1
        shared = inner and x.dim() == rank + (dims[1] is not None)
        dy = _expanded(dy, dims[0], size, network[0], rank, inner)
        x = _expanded(x, dims[1], size, network[0], rank, inner)
        if shared and rounds(dy):  # the op sums dx over its networks, then rounds
            each = [
                op(dy[i], x[i, 0], *(None if a is None else a[i] for a in network), *args[tensors:])
                for i in range(size)
            ]
            return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])
        grads = op(*(_fold(a, inner) for a in (dy, x, *network)), *args[tensors:])
        dx, *others = (g.unflatten(0, (size, -1)) if inner and g.dim() > 1 else g for g in grads)
        if shared and dx.dim() > 1:
            dx = dx.sum(1)
        # an output that was not asked for is empty and has no vmapped dimension
        return (dx, *others), tuple(0 if g.dim() > 1 else None for g in (dx, *others))

    return rule


def _front(value: Any, dim: int | None) -> Any:
    return value if dim is None else value.movedim(dim, 0)


def _batched(value: Any, dim: int | None, size: int) -> Any:
    """[V, …], expanded where it was not vmapped."""
    if value is None or dim is not None:
        return value
    return value.expand(size, *value.shape)


def _expanded(
    x: Tensor, dim: int | None, size: int, weight: Tensor, rank: int, inner: int
) -> Tensor:
    """x as [V, B, …] or, for replicated weights [V, E, …], as [V, E, B, …]."""
    x = _batched(x, dim, size)
    if inner and x.dim() == rank + 1:
        x = x.unsqueeze(1).expand(size, weight.shape[1], *x.shape[1:])
    return x


def _fold(value: Any, inner: int) -> Any:
    """[V, E, …] -> [V E, …] if the networks are replicated inside the vmap."""
    return value.flatten(0, 1) if inner and value is not None else value
