"""Random problems for the masked products, and their answers from dense float64 products.

The answers share nothing with the reference: NumPy selects the effective weight, a
loop runs over the networks, and torch differentiates F.linear and F.conv2d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tolerances import of_sum
from torch import Tensor

from lottery_sparse import ops
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.masked import reference
from lottery_sparse.ops.masked.arguments import Geometry

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DENSITIES = (0.0, 0.03, 0.5, 1.0)
FROZEN = ("zero", "tensor", "sign x constant")
# one network, networks with an x each, networks that share x: (E, shared)
NETWORKS = {"single": (None, False), "networks": (3, False), "shared x": (3, True)}


@dataclass(frozen=True)
class Problem:
    """Arguments of one call. Pruned entries of the weight, and kept ones of frozen, hold NaN."""

    x: Tensor
    weight: Tensor
    mask: Tensor  # bool, like the weight
    bias: Tensor | None
    frozen: Tensor | ops.SignConstant | None
    dy: Tensor
    options: dict[str, Any]  # stride, padding, ... of a convolution; {} = linear

    @property
    def rank(self) -> int:
        return 4 if self.options else 2

    @property
    def packed(self) -> Tensor:
        """The mask as bits."""
        return ops.pack_mask(self.mask.flatten(1 - self.rank))

    def to(self, device: str) -> Problem:
        names = ("x", "weight", "mask", "bias", "dy")
        moved = {n: t.to(device) for n in names if (t := getattr(self, n)) is not None}
        held = self.frozen
        if isinstance(held, ops.SignConstant):
            held = ops.SignConstant(held.signs.to(device), held.constant.to(device))
        elif held is not None:
            held = held.to(device)
        return replace(self, frozen=held, **moved)

    def run(self, mask: Tensor | None = None) -> list[Tensor]:
        """[y, dx, dw, db] of the op under test, on whatever backend is chosen outside."""
        inputs = [t for t in (self.x, self.weight, self.bias) if t is not None]
        inputs = [t.detach().requires_grad_() for t in inputs]
        x, weight, *bias = inputs
        op = ops.masked_conv2d if self.options else ops.masked_linear
        mask = self.mask if mask is None else mask
        y = op(x, weight, mask, *(bias or [None]), self.frozen, **self.options)
        return [y.detach(), *torch.autograd.grad(y, inputs, self.dy)]


def random_problem(
    weight_shape: tuple[int, ...],
    x_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    density: float,
    frozen: str,
    networks: int | None,
    shared: bool,
    dtype: torch.dtype,
    options: dict[str, Any],
    seed: int,
) -> Problem:
    """Shapes are those of one network."""
    g = np.random.default_rng((*weight_shape, *x_shape, int(100 * density), networks or 0, seed))
    lead = () if networks is None else (networks,)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(g.normal(size=shape)).to(dtype)

    mask = torch.from_numpy(g.random(lead + weight_shape) < density)
    weight = normal(*lead, *weight_shape)
    held: Tensor | ops.SignConstant | None = None
    if frozen == "tensor":
        held = normal(*mask.shape).masked_fill(mask, torch.nan)
    elif frozen == "sign x constant":
        held = ops.SignConstant.of(weight, normal(*lead), rank=len(weight_shape))
    return Problem(
        x=normal(*(() if shared else lead), *x_shape),
        weight=weight.masked_fill(~mask, torch.nan),
        mask=mask,
        bias=normal(*lead, weight_shape[0]),
        frozen=held,
        dy=normal(*lead, *y_shape),
        options=options,
    )


def linear_problem(
    rows: int,
    columns: int,
    batch: int,
    density: float = 0.5,
    frozen: str = "zero",
    networks: int | None = None,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    shapes = (rows, columns), (batch, columns), (batch, rows)
    return random_problem(*shapes, density, frozen, networks, shared, dtype, {}, seed)


def conv_problem(
    channels: tuple[int, int],
    kernel: tuple[int, int],
    image: tuple[int, int],
    batch: int = 2,
    density: float = 0.5,
    frozen: str = "zero",
    networks: int | None = None,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    groups: int = 1,
    **options: Any,
) -> Problem:
    """channels: in and out."""
    weight, x = (channels[1], channels[0] // groups, *kernel), (batch, channels[0], *image)
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": groups} | options
    y = F.conv2d(torch.empty(x, device="meta"), torch.empty(weight, device="meta"), None, **options)
    shapes = weight, x, tuple(y.shape)
    return random_problem(*shapes, density, frozen, networks, shared, dtype, options, seed)


# (channels in and out, kernel, image) and options
SMALL = ((2, 2), (2, 3), (3, 4))
GROUPED = {"groups": 2, "padding": 1, "stride": 2}


def conv_case(shapes, options, density=0.5, frozen="zero", networks="single", dtype=torch.float32):
    count, shared = NETWORKS[networks]
    batch = options.get("batch", 2)
    options = {k: v for k, v in options.items() if k != "batch"}
    return conv_problem(*shapes, batch, density, frozen, count, shared, dtype, **options)


def numbers(p: Problem) -> Problem:
    """Without NaN at pruned entries, for comparisons that look at the weight itself."""
    held = p.frozen.nan_to_num(5.0) if isinstance(p.frozen, torch.Tensor) else p.frozen
    return replace(p, weight=p.weight.nan_to_num(7.0), frozen=held)


def takes(backend: str, op: str, frozen: str, dtype: torch.dtype) -> bool:
    """What the backends offer; tests/ops/test_backends.py holds them to refusing the rest."""
    if backend == "cpu":
        linear = dtype in (torch.float32, torch.bfloat16)
        return op == "masked_linear" and frozen == "zero" and linear
    return True


def combinations(op: str) -> list[tuple[str, str, torch.dtype]]:
    """(backend, frozen, dtype) of all backends that this machine has."""
    return [
        (backend, frozen, dtype)
        for backend in dispatch.available(op, "cpu")
        for frozen in FROZEN
        for dtype in DTYPES
        if takes(backend, op, frozen, dtype)
    ]


# ---- the answers -------------------------------------------------------------------------------


def effective_weight(p: Problem) -> Tensor:
    """where(m, w, f) in float64, selected by NumPy."""
    weight, mask = p.weight.double().numpy(), p.mask.numpy()
    if isinstance(p.frozen, ops.SignConstant):
        words = p.frozen.signs.numpy().view(np.uint8)  # little endian: bit j of byte b is 8 b + j
        rows = mask.reshape(words.shape[:-1] + (-1,))
        plus = np.unpackbits(words, axis=-1, bitorder="little")[..., : rows.shape[-1]]
        constant = p.frozen.constant.double().numpy()
        constant = constant.reshape(constant.shape + (1,) * p.rank)
        held = (plus.reshape(mask.shape) * 2.0 - 1.0) * constant
    else:
        held = np.zeros(mask.shape) if p.frozen is None else p.frozen.double().numpy()
    return torch.from_numpy(np.where(mask, weight, held))


def exact(p: Problem) -> list[Tensor]:
    """[y, dx, dw, db] in float64."""
    return _dense(replace(p, x=p.x.double(), dy=p.dy.double()), effective_weight(p), p.bias)


def scales(p: Problem) -> list[Tensor]:
    """The sums of absolute products that belong to `exact`."""
    p = replace(p, x=p.x.double().abs(), dy=p.dy.double().abs())
    return _dense(p, effective_weight(p).abs(), None if p.bias is None else p.bias.abs())


def _dense(p: Problem, w: Tensor, bias: Tensor | None) -> list[Tensor]:
    x, w = p.x.clone().requires_grad_(), w.requires_grad_()
    bias = None if bias is None else bias.double().requires_grad_()
    product = F.conv2d if p.options else F.linear
    if w.dim() == p.rank:
        y = product(x, w, bias, **p.options)
    else:
        inputs = x if x.dim() > p.rank else [x] * len(w)
        biases = [None] * len(w) if bias is None else bias
        each = [product(*args, **p.options) for args in zip(inputs, w, biases, strict=True)]
        y = torch.stack(each)
    inputs = [t for t in (x, w, bias) if t is not None]
    dx, dw, *db = torch.autograd.grad(y, inputs, p.dy)
    return [y.detach(), dx, dw * p.mask, *db]


def products(
    shape: tuple[int, ...], x: Tensor, dy: Tensor, options: dict[str, Any]
) -> dict[str, int]:
    """How many are summed in an entry of each result, and one more for a bias; shape: the weight's.

    For options of a convolution, or {}.
    """
    rank = 4 if options else 2
    networks = shape[0] if len(shape) > rank else 1
    summed = networks if x.dim() == rank else 1
    outputs, taps = shape[-rank], math.prod(shape[-2:]) if options else 1
    rows = dy.numel() // max(outputs * networks, 1)  # of a batch, and pixels
    return {
        "y": math.prod(shape[1 - rank :]) + 1,
        "dx": outputs * taps // options.get("groups", 1) * summed,
        "dw": rows,
        "db": rows,
    }


@cache
def rounds_once(dtype: torch.dtype) -> bool:
    """Whether torch's own convolution sums in float32 what it returns in this dtype.

    Where the dense library has no kernel for the dtype, torch adds up taps and images in it: 4096
    then swallows 1, in either order.
    """
    w = torch.tensor([4096.0, 1.0, -4096.0]).to(dtype).view(1, 1, 1, 3)
    dx, _ = reference.conv2d_backward(
        torch.ones(1, 1, 1, 3, dtype=dtype), torch.ones(1, 1, 1, 5, dtype=dtype), w,
        Geometry([1, 1], [0, 0], [1, 1], 1), True, False,
    )  # fmt: skip
    return dx[0, 0, 0, 2].item() == 1


def stored(shape: tuple[int, ...], dy: Tensor, options: dict[str, Any]) -> dict[str, int]:
    """How often a narrow dtype holds each result or a part of it, by torch's convolutions."""
    once = {"y": 1, "dx": 1, "dw": 1, "db": 1}
    if not options or rounds_once(dy.dtype):
        return once
    return once | {"dx": math.prod(shape[-2:]) + 1, "dw": dy.shape[-4] + 1}


def check(p: Problem, got: list[Tensor], note: str = "") -> None:
    """The results of `Problem.run` are those of float64, and gradients of pruned entries are 0."""
    p, got = p.to("cpu"), [t.cpu() for t in got]
    terms = products(p.mask.shape, p.x, p.dy, p.options)
    times = stored(p.mask.shape, p.dy, p.options)
    for name, value, expected, scale in zip(
        ("y", "dx", "dw", "db"), got, exact(p), scales(p), strict=True
    ):
        where = f"{name} {note} of weight {tuple(p.weight.shape)}, x {tuple(p.x.shape)}"
        assert value.shape == expected.shape, where
        assert value.dtype == p.x.dtype, where
        allowed = of_sum(expected, scale, terms[name], value.dtype, times[name])
        error = (value.double() - expected).abs() - allowed
        assert (error <= 0).all(), f"{where}: {float(error.max())} too far"
    assert (got[2][~p.mask] == 0).all()
