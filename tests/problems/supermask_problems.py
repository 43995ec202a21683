"""Random problems for learned masks, and their answers from the straight-through expression.

m = p + (bernoulli − p).detach(), w m r, F.linear or F.conv2d of it, differentiated by torch in
float64, one network after the other. The draws come from NumPy's words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from problems import products, stored
from tolerances import of_sum, unit
from torch import Tensor

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops.random import reference

WEIGHTS = ("tensor", "sign x constant")


@dataclass(frozen=True)
class Problem:
    x: Tensor
    score: Tensor
    weight: Tensor | ops.SignConstant
    key: Tensor
    bias: Tensor
    dy: Tensor
    rescale: bool
    options: dict[str, Any]  # of a convolution; {} = linear

    @property
    def rank(self) -> int:
        return 4 if self.options else 2

    def to(self, device: str) -> Problem:
        names = ("x", "score", "key", "bias", "dy")
        moved = {name: getattr(self, name).to(device) for name in names}
        weight = self.weight
        if isinstance(weight, ops.SignConstant):
            weight = ops.SignConstant(weight.signs.to(device), weight.constant.to(device))
        else:
            weight = weight.to(device)
        return replace(self, weight=weight, **moved)

    def run(self, mask: Tensor | None = None) -> list[Tensor]:
        """[y, dx, dscore, db, dw] of the op under test; no dw of signs."""
        inputs = [t.detach().requires_grad_() for t in (self.x, self.score, self.bias)]
        x, score, bias = inputs
        weight = self.weight
        if isinstance(weight, Tensor):
            weight = weight.detach().requires_grad_()
            inputs.append(weight)
        op = ops.supermask_conv2d if self.options else ops.supermask_linear
        key = self.key if mask is None else None
        y = op(x, score, weight, key, bias, mask=mask, rescale=self.rescale, **self.options)
        return [y.detach(), *torch.autograd.grad(y, inputs, self.dy)]


def supermask_problem(
    shape: tuple[int, ...],
    x_shape: tuple[int, ...],
    weight: str = "tensor",
    rescale: bool = True,
    networks: int | None = None,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
    score_dtype: torch.dtype = torch.float32,
    level: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Shapes are those of one network; level: the mean of the scores."""
    g = np.random.default_rng((*shape, *x_shape, networks or 0, seed))
    lead = () if networks is None else (networks,)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(g.normal(size=shape)).to(dtype)

    if options:
        options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | options
        like = torch.empty(x_shape, device="meta"), torch.empty(shape, device="meta")
        y_shape = tuple(F.conv2d(*like, None, **options).shape)
    else:
        y_shape = (x_shape[0], shape[0])
    w: Tensor | ops.SignConstant = normal(*lead, *shape)
    if weight != "tensor":
        w = ops.SignConstant.of(w, normal(*lead), rank=len(shape))
    keys = torch.stack([ls.random.key(2**64 - 1 - seed, 5, 7 + e) for e in range(networks or 1)])
    return Problem(
        x=normal(*(() if shared else lead), *x_shape),
        score=(torch.from_numpy(g.normal(size=lead + shape)) + level).to(score_dtype),
        weight=w,
        key=keys[0] if networks is None else keys,
        bias=normal(*lead, shape[0]),
        dy=normal(*lead, *y_shape),
        rescale=rescale,
        options=options,
    )


def drawn(score: Tensor, key: Tensor) -> Tensor:
    """The mask of one network in float64: 24 bits of NumPy's words below floor(p 2^24)."""
    words = reference.random_words(score.numel(), *key.tolist()).numpy().view(np.uint32)
    p = 1 / (1 + np.exp(-score.float().double().numpy().reshape(-1)))
    return torch.from_numpy((words >> 8) < np.floor(p * 2.0**24)).view(score.shape).double()


def exact(p: Problem, masks: list[Tensor] | None = None) -> list[Tensor]:
    """[y, dx, dscore, db, dw] in float64."""
    return _answers(p, masks, absolute=False)


def scales(p: Problem, masks: list[Tensor] | None = None) -> list[Tensor]:
    """The sums of absolute products that belong to `exact`."""
    return _answers(p, masks, absolute=True)


def _answers(p: Problem, masks: list[Tensor] | None, absolute: bool) -> list[Tensor]:
    single = p.score.dim() == p.rank
    scores = [p.score] if single else list(p.score)
    keys = [p.key] if single else list(p.key)
    masks = masks or [drawn(s, k) for s, k in zip(scores, keys, strict=True)]
    size = (lambda t: t.double().abs()) if absolute else (lambda t: t.double())
    x = size(p.x).clone().requires_grad_()
    score, bias = p.score.double().clone().requires_grad_(), size(p.bias).clone().requires_grad_()
    weight = size(_dense(p)).clone().requires_grad_()
    outputs = []
    for e, m in enumerate(masks):
        at = () if single else (e,)
        probability = torch.sigmoid(score[at])
        m = probability + (m - probability).detach()
        factor = m.numel() / m.sum().clamp(min=1) if p.rescale else 1.0
        if absolute and p.rescale:  # its gradient is negative, and must not cancel
            factor = 2 * factor.detach() - factor
        each = x[at] if x.dim() > p.dy.dim() - len(at) else x
        product = F.conv2d if p.options else F.linear
        outputs.append(product(each, weight[at] * m * factor, bias[at], **p.options))
    y = outputs[0] if single else torch.stack(outputs)
    inputs = [x, score, bias, weight]
    gradients = torch.autograd.grad(y, inputs, size(p.dy))
    if absolute:  # 1 - p is rounded where p is near 1
        q = 1 - torch.sigmoid(score)
        gradients = (gradients[0], gradients[1] / q.clamp(1e-9), *gradients[2:])
    keep_dw = isinstance(p.weight, Tensor)
    return [y.detach(), *(gradients if keep_dw else gradients[:3])]


def _dense(p: Problem) -> Tensor:
    if isinstance(p.weight, Tensor):
        return p.weight
    columns = p.score.shape[1 - p.rank :].numel()
    bits = p.weight.signs.numpy().view(np.uint8)  # little endian: bit j of byte b is 8 b + j
    plus = np.unpackbits(bits, axis=-1, bitorder="little")[..., :columns].reshape(p.score.shape)
    constant = p.weight.constant.double()
    constant = constant.view(constant.shape + (1,) * p.rank)
    return (2.0 * torch.from_numpy(plus) - 1) * constant


NAMES = ("y", "dx", "dscore", "db", "dw")


def check(p: Problem, got: list[Tensor], note: str = "", masks: list[Tensor] | None = None) -> None:
    """The results of `Problem.run` are those of float64."""
    p, got = p.to("cpu"), [t.cpu() for t in got]
    shape = p.score.shape
    terms, times = products(shape, p.x, p.dy, p.options), stored(shape, p.dy, p.options)
    # r, which sums over a network, and p (1 − p); w m r and r dy are stored before they are summed
    terms["dscore"] = terms["dw"] + math.prod(shape[-p.rank :]) + 10
    times["dscore"] = times["dw"]
    wanted, sizes = exact(p, masks), scales(p, masks)
    for name, value, expected, scale in zip(NAMES, got, wanted, sizes, strict=False):
        where = f"{name} {note} of score {tuple(p.score.shape)}, x {tuple(p.x.shape)}"
        assert value.shape == expected.shape, where
        assert value.dtype == (p.score.dtype if name == "dscore" else p.x.dtype), where
        dtype = max(value.dtype, p.x.dtype, key=unit)
        allowed = of_sum(expected, scale, terms[name] + 2, dtype, times[name] + 2)
        error = (value.double() - expected).abs() - allowed
        assert (error <= 0).all(), f"{where}: {float(error.max())} too far"
