"""The vmap rules of products of x and a weight, and what their classes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops.common.autograd import Differentiable
from lottery_sparse.ops.limits import rounds


class Product(Differentiable):
    """y = product(x, weight under a mask) + b.

    Args:
        stem: name of the op, defined with its backward, `stem`_backward.
        rank: dimensions of one weight and of one x.
        backward: the class of the backward.
        tensors: how many tensors come first, for `vmap`: x, and all that a network has of its own.
    """

    casts = True

    def __init__(self, stem: str, rank: int, backward: type[ProductBackward], tensors: int = 0):
        super().__init__(stem)
        self.rank, self.tensors = rank, tensors
        self.backward = backward(stem, self)
        self.bias_dims = (-2,) if rank == 2 else (-4, -2, -1)  # of y, that the bias does not have

    def vmap(self, info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        """Of (x, *network, *rest) -> y; the first of a network is like its weight."""
        size, rank, tensors = info.batch_size, self.rank, self.tensors
        dims = in_dims[:tensors]
        x, *network = (_front(a, d) for a, d in zip(args[:tensors], dims, strict=True))
        rest = args[tensors:]
        if all(d is None for d in dims[1:]):  # one network, more inputs: a larger batch
            batch_dim = x.dim() - rank  # x: [V, B, …] or [V, E, B, …]
            x = x.movedim(0, batch_dim - 1)
            y = self(x.flatten(batch_dim - 1, batch_dim), *network, *rest)
            return y.unflatten(y.dim() - rank, (size, -1)), y.dim() - rank
        network = [_batched(a, d, size) for a, d in zip(network, dims[1:], strict=True)]
        inner = network[0].dim() - rank - 1  # 1 if each vmapped weight is replicated already
        if dims[0] is None and (x.dim() == rank):
            y = self(x, *(_fold(a, inner) for a in network), *rest)
        else:
            x = _expanded(x, dims[0], size, network[0], rank, inner)
            y = self(_fold(x, inner), *(_fold(a, inner) for a in network), *rest)
        return (y.unflatten(0, (size, -1)) if inner else y), 0


class ProductBackward(Differentiable):
    """The backward of a product. An output that is not needed is empty, [0]."""

    def __init__(self, stem: str, forward: Product):
        super().__init__(f"{stem}_backward")
        self.product = forward

    def vmap(self, info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple]:
        """Of (dy, x, *network without its bias, *rest) -> (dx, ...).

        Everything is expanded to one network per vmapped element: each wants its own gradients.
        """
        size, rank, tensors = info.batch_size, self.product.rank, self.product.tensors
        dims = in_dims[:tensors]
        dy, x, *network = (_front(a, d) for a, d in zip(args[:tensors], dims, strict=True))
        rest = args[tensors:]
        network = [_batched(a, d, size) for a, d in zip(network, dims[2:], strict=True)]
        inner = network[0].dim() - rank - 1
        shared = inner and x.dim() == rank + (dims[1] is not None)
        dy = _expanded(dy, dims[0], size, network[0], rank, inner)
        x = _expanded(x, dims[1], size, network[0], rank, inner)
        if shared and rounds(dy):  # the op sums dx over its networks, then rounds
            each = [
                self(
                    dy[i], x[i, 0], *(None if a is None else a[i] for a in network), *args[tensors:]
                )
                for i in range(size)
            ]
            return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])
        grads = self(*(_fold(a, inner) for a in (dy, x, *network)), *rest)
        dx, *others = (g.unflatten(0, (size, -1)) if inner and g.dim() > 1 else g for g in grads)
        if shared and dx.dim() > 1:
            dx = dx.sum(1)
        # an output that was not asked for is empty and has no vmapped dimension
        return (dx, *others), tuple(0 if g.dim() > 1 else None for g in (dx, *others))


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
