"""Other libraries' sparse layers, called alike: build one from a weight and a mask, then call it.

    sparseprop   CSR kernels, forward and one backward pass for dX and dW; builds from source
    sparselab    padded CSR with SIMD kernels; linear only

`make bench-peers` installs them. A peer that is missing, refuses a shape, raises or computes
something wrong is reported as that: see `checked`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("sparseprop", "sparselab", "torchao")
WRONG = 1e-4  # relative error, in norm, of a result that is not the layer's


class Unusable(Exception):
    """Why a peer gives no time here."""


def versions() -> dict[str, str]:
    """Installed peers, and "missing" for the others."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def module(name: str) -> Any:
    """A peer's module; Unusable if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unusable(f"{name.split('.')[0]} cannot be imported ({error})") from None


class SparsepropLinear:
    def __init__(self, weight: Tensor, mask: Tensor):
        layers = module("sparseprop.modules")
        self.layer = layers.SparseLinear(weight * mask)
        self.values = self.layer.W_val

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def kept_gradient(self) -> Tensor:
        return self.values.grad


class SparselabLinear:
    # Rows without room to grow. Its cache of transposed layers is keyed by id(): a layer made at
    # the address of an older one gets that one's transpose, and raises IndexError or is wrong
    # (first seen at 2% kept). We empty the cache before we make a layer.
    def __init__(self, weight: Tensor, mask: Tensor):
        ops = module("sparselab.ops")
        ops._clear_transpose_cache()
        self.csr = module("sparselab.layout").from_dense(weight * mask, padding_ratio=0.0)
        self.values = torch.nn.Parameter(torch.from_numpy(self.csr.values))
        self.apply = ops._SpMMFunction.apply

    def __call__(self, x: Tensor) -> Tensor:  # as sparselab.SparseLinear.forward
        return self.apply(self.values, self.csr, x.t().contiguous(), "simd").t()

    def kept_gradient(self) -> Tensor:
        rows = zip(self.csr.row_start, self.csr.row_nnz, strict=True)
        return torch.cat([self.values.grad[start : start + n] for start, n in rows])


class SparsepropConv2d:
    """over_width: vectorised over the output's width; otherwise over the batch."""

    def __init__(self, weight: Tensor, mask: Tensor, padding: int, stride: int, over_width: bool):
        layers = module("sparseprop.modules")
        self.layer = layers.SparseConv2d(
            weight * mask, None, padding, stride, vectorizing_over_on=over_width
        )
        self.values = self.layer.W_val

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def kept_gradient(self) -> Tensor:
        return self.values.grad


def checked(
    make: Callable[..., Any], weight: Tensor, mask: Tensor, x: Tensor, dy: Tensor, dense: Callable
) -> Any:
    """A peer whose outputs and gradients were compared with those of dense(x, weight * mask).

    Raises:
        Unusable: it is not there, raised an exception, or computed something else.
    """
    try:
        peer = make(weight, mask)
        ours, reference = x.detach().requires_grad_(), x.detach().requires_grad_()
        y = peer(ours)
        y.backward(dy)
        kept = peer.kept_gradient()
    except Unusable:
        raise
    except Exception as error:
        raise Unusable(f"raises {type(error).__name__}: {error}") from error
    masked = (weight.detach() * mask).requires_grad_()
    expected = dense(reference, masked)
    expected.backward(dy)
    peer.values.grad = None
    for name, got, wanted in (
        ("y", y, expected),
        ("dx", ours.grad, reference.grad),
        ("dw", kept, masked.grad[mask]),
    ):
        got, wanted = got.detach(), wanted.detach()
        error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not error <= WRONG:
            raise Unusable(f"wrong: relative error of {name} is {error:.2g}")
    return peer


def main() -> None:
    logging.disable(logging.WARNING)  # torchao tells at length which GPU kernels it lacks
    for name, version in versions().items():
        try:
            module(name)
            print(f"{name} {version}")
        except Unusable as error:
            print(f"{name}: {error}; its rows will say so")


if __name__ == "__main__":
    main()
