"""masked_conv2d under torch.func, autocast and torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from problems import (
    FROZEN,
    GROUPED,
    NETWORKS,
    SMALL,
    conv_case,
    conv_problem,
    effective_weight,
    numbers,
)
from tolerances import close
from torch.utils._pytree import tree_map

from lottery_sparse.ops import masked_conv2d

# said once per process by F.conv2d, which gives the answers here
pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

networks = pytest.mark.parametrize("networks", NETWORKS)
frozen = pytest.mark.parametrize("frozen", FROZEN)


# ---- torch.func ----------------------------------------------------------------------------

# Which of (x, weight, mask, bias) carry the mapped dimension, and where.
IN_DIMS = {
    "x": (0, None, None, None),
    "x last": (-1, None, None, None),
    "weight": (None, 0, None, None),
    "mask": (None, None, 1, None),
    "networks": (None, 1, 0, 0),
    "all": (0, 0, 0, 0),
}
SIZE = 2


def convolve(x, weight, mask, bias):
    return masked_conv2d(x, weight, mask, bias, **GROUPED)


def squares(*arguments):
    return convolve(*arguments).square().sum()


def mapped_arguments(networks, in_dims):
    count, shared = NETWORKS[networks]
    each = [
        numbers(
            conv_problem(
                (2, 4), (2, 2), (3, 3), 2, 0.5, "zero", count, shared, torch.float64, i, **GROUPED
            )
        )
        for i in range(SIZE)
    ]
    lists = zip(*((p.x, p.weight, p.mask, p.bias) for p in each), strict=True)
    return [
        values[0] if dim is None else torch.stack(values, dim)
        for values, dim in zip(lists, in_dims, strict=True)
    ]


def by_loop(f, in_dims, arguments):
    each = [
        f(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
        for i in range(SIZE)
    ]
    return tree_map(lambda *parts: torch.stack(parts), *each)


@networks
@pytest.mark.parametrize("mapped", IN_DIMS)
def test_vmap_equals_a_loop(mapped, networks):
    in_dims = IN_DIMS[mapped]
    arguments = mapped_arguments(networks, in_dims)
    for f in (convolve, torch.func.grad(squares, argnums=(0, 1, 3))):
        got = torch.vmap(f, in_dims)(*arguments)
        close(got, by_loop(f, in_dims, arguments))


@networks
def test_nested_vmap_and_its_gradient(networks):
    x, weight, mask, bias = mapped_arguments(networks, (0, 0, 0, 0))

    def over_x(weight, mask, bias):
        return torch.vmap(lambda x: convolve(x, weight, mask, bias))(x)

    got = torch.vmap(over_x)(weight, mask, bias)
    for i in range(SIZE):
        for j in range(SIZE):
            expected = convolve(x[j], weight[i], mask[i], bias[i])
            close(got[i, j], expected)
    gradient = torch.func.grad(lambda w: torch.vmap(over_x)(w, mask, bias).square().sum())(weight)
    each = [
        sum(torch.func.grad(squares, 1)(x[j], weight[i], mask[i], bias[i]) for j in range(SIZE))
        for i in range(SIZE)
    ]
    close(gradient, torch.stack(each))


def test_jacobian():
    p = numbers(conv_case(SMALL, {"batch": 1}, dtype=torch.float64))
    dense = effective_weight(p)
    got = torch.func.jacrev(lambda x: masked_conv2d(x, p.weight, p.mask))(p.x)
    expected = torch.func.jacrev(lambda x: F.conv2d(x, dense))(p.x)
    close(got, expected)


# ---- autocast and torch.compile --------------------------------------------------------------


def test_autocast_casts_like_conv2d():
    p = conv_case(SMALL, {})
    x, weight, bias = (t.requires_grad_() for t in (p.x, p.weight, p.bias))
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_conv2d(x, weight, p.mask, bias)
    fields = ("x", "weight", "bias", "dy")
    low = replace(p, **{n: getattr(p, n).detach().bfloat16() for n in fields})
    gradients = torch.autograd.grad(y, (x, weight, bias), low.dy)
    for a, b in zip((y, *gradients), low.run(), strict=True):
        assert torch.equal(a.bfloat16(), b)
    assert {g.dtype for g in gradients} == {torch.float32}

    def loss(weight):
        return masked_conv2d(p.x, weight, p.mask).float().sum()

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.func.grad(loss)(p.weight.detach()).dtype == torch.float32


@pytest.mark.parametrize(
    ("networks", "frozen", "padding"),
    [("single", "zero", "same"), ("shared x", "sign x constant", 1)],
)
def test_compiled_equals_eager(networks, frozen, padding):
    p = conv_case(SMALL, {"padding": padding}, 0.5, frozen, networks)

    def step(x, weight, bias):
        return masked_conv2d(x, weight, p.mask, bias, p.frozen, **p.options).square().sum()

    inputs = [t.requires_grad_() for t in (p.x, p.weight, p.bias)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(*inputs), inputs)
    got = torch.autograd.grad(compiled(*inputs), inputs)
    for a, b in zip(got, expected, strict=True):
        close(a, b)
