"""masked_linear under torch.func, autocast and torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from problems import (
    FROZEN,
    NETWORKS,
    effective_weight,
    linear_problem,
)
from tolerances import close, of_sum
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map

import lottery_sparse as ls
from lottery_sparse.ops import SignConstant, masked_linear, pack_mask

pytestmark = pytest.mark.numeric

networks = pytest.mark.parametrize("networks", NETWORKS)
frozen = pytest.mark.parametrize("frozen", FROZEN)


# ---- torch.func ----------------------------------------------------------------------------

# Which of (x, weight, mask, bias, frozen values, signs) carry the mapped dimension, and where.
IN_DIMS = {
    "x": (0, None, None, None, None),
    "x last": (-1, None, None, None, None),
    "weight": (None, 0, None, None, None),
    "mask": (None, None, 1, None, None),
    "bias": (None, None, None, 0, None),
    "frozen": (None, None, None, None, 0),
    "networks": (None, 1, 0, 0, 0),
    "all": (0, 0, 0, 0, 0),
}
SIZE = 2


def mapped_arguments(networks: str, frozen: str, in_dims: tuple) -> list:
    """Arguments with one more dimension of size SIZE where in_dims says so."""
    problems = [
        linear_problem(4, 5, 3, 0.5, frozen, *NETWORKS[networks], torch.float64, seed=i)
        for i in range(SIZE)
    ]
    each = []
    for p in problems:
        held = p.frozen.nan_to_num(5.0) if isinstance(p.frozen, torch.Tensor) else p.frozen
        each.append((p.x, p.weight.nan_to_num(7.0), p.mask, p.bias, held))
    arguments = zip(*each, strict=True)
    return [stacked(values, dim) for values, dim in zip(arguments, in_dims, strict=True)]


def stacked(values: tuple, dim: int | None):
    if dim is None or values[0] is None:
        return values[0]
    if isinstance(values[0], SignConstant):
        return SignConstant(*(torch.stack(parts, 0) for parts in zip(*values, strict=True)))
    return torch.stack(values, dim)


def element(value, dim: int | None, i: int):
    if dim is None or value is None:
        return value
    if isinstance(value, SignConstant):
        return SignConstant(*(part.select(dim, i) for part in value))
    return value.select(dim, i)


def by_loop(f, in_dims: tuple, arguments: list) -> torch.Tensor:
    each = [
        f(*(element(a, d, i) for a, d in zip(arguments, in_dims, strict=True))) for i in range(SIZE)
    ]
    return tree_map(lambda *parts: torch.stack(parts), *each)


def summed(x, weight, mask, bias, held):
    return masked_linear(x, weight, mask, bias, held).square().sum()


@networks
@frozen
@pytest.mark.parametrize("mapped", IN_DIMS)
def test_vmap_equals_a_loop(mapped, frozen, networks):
    if mapped == "frozen" and frozen == "zero":
        return  # zero is no tensor
    in_dims = tuple(
        None if i == 4 and frozen == "zero" else d for i, d in enumerate(IN_DIMS[mapped])
    )
    arguments = mapped_arguments(networks, frozen, in_dims)
    for f in (masked_linear, torch.func.grad(summed, argnums=(0, 1, 3))):
        got = torch.vmap(f, in_dims)(*arguments)
        close(got, by_loop(f, in_dims, arguments))


@networks
def test_gradient_of_a_vmap(networks):
    in_dims = (None, 0, 0, 0, None)
    x, weight, mask, bias, _ = mapped_arguments(networks, "zero", in_dims)

    def loss(x, weight, bias):
        return torch.vmap(summed, in_dims)(x, weight, mask, bias, None).sum()

    def loss_by_loop(x, weight, bias):
        return by_loop(summed, in_dims, [x, weight, mask, bias, None]).sum()

    expected = torch.func.grad(loss_by_loop, (0, 1, 2))(x, weight, bias)
    close(torch.func.grad(loss, (0, 1, 2))(x, weight, bias), expected)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    close(torch.autograd.grad(loss(*inputs), inputs), expected)


@networks
def test_nested_vmap(networks):
    x, weight, mask, bias, _ = mapped_arguments(networks, "zero", (0, 0, 0, 0, None))

    def over_x(weight, mask, bias):
        return torch.vmap(lambda x: masked_linear(x, weight, mask, bias))(x)

    got = torch.vmap(over_x)(weight, mask, bias)
    for i in range(SIZE):
        for j in range(SIZE):
            close(got[i, j], masked_linear(x[j], weight[i], mask[i], bias[i]))


@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_vmapped_networks_that_share_x_round_dx_once(backend):
    """Networks side by side, vmapped: each sum over them runs in float32."""
    ps = [linear_problem(7, 33, 4, 0.6, "zero", 5, True, torch.bfloat16, seed=s) for s in range(2)]
    x, mask = ps[0].x, ps[0].mask
    weights = torch.stack([p.weight.nan_to_num(7.0) for p in ps])
    dys = torch.stack([p.dy for p in ps])

    def dx(weight, dy):
        return torch.func.vjp(lambda x: masked_linear(x, weight, mask), x)[1](dy)[0]

    with ls.use_backend(backend):
        got = torch.vmap(dx)(weights, dys)
    for value, weight, dy in zip(got, weights.double() * mask, dys.double(), strict=True):
        expected, size = (dy @ weight).sum(0), (dy.abs() @ weight.abs()).sum(0)
        allowed = of_sum(expected, size, 5 * 7, torch.bfloat16)
        assert ((value - expected).abs() <= allowed).all()


def test_vmap_of_packed_masks_and_of_no_batch():
    p = linear_problem(4, 33, 3)
    masks = torch.stack([p.mask, ~p.mask])
    weight = p.weight.nan_to_num(7.0)
    expected = torch.stack([masked_linear(p.x, weight, m) for m in masks])
    got = torch.vmap(lambda bits: masked_linear(p.x, weight, bits))(pack_mask(masks))
    close(got, expected)
    empty = torch.vmap(lambda x: masked_linear(x, weight, p.mask))(torch.zeros(2, 0, 33))
    assert empty.shape == (2, 0, 4)


def test_per_sample_gradients_and_jacobians():
    p = linear_problem(4, 5, 3, 0.5, dtype=torch.float64)
    weight = p.weight.nan_to_num(7.0)

    def loss(weight, x):
        return masked_linear(x, weight, p.mask, p.bias).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(weight, p.x)
    expected = torch.stack([torch.func.grad(loss)(weight, x) for x in p.x])
    close(per_sample, expected)
    assert (per_sample[:, ~p.mask] == 0).all()

    jacobian = torch.func.jacrev(lambda x: masked_linear(x, weight, p.mask))(p.x[0])
    close(jacobian, effective_weight(p))
    dense = effective_weight(p)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda x: loss(weight, x)))(p.x[0])
    close(hessian, 2 * dense.mT @ dense)


# ---- autocast --------------------------------------------------------------------------------


@frozen
def test_autocast_casts_like_linear(frozen):
    p = linear_problem(5, 7, 3, 0.5, frozen)
    x, weight, bias = (t.requires_grad_() for t in (p.x, p.weight, p.bias))
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(x, weight, p.mask, bias, p.frozen)
        half = masked_linear(x.bfloat16(), weight, p.mask, bias, p.frozen)
    assert y.dtype == torch.bfloat16 == F.linear(x.bfloat16(), weight.bfloat16()).dtype
    held = p.frozen
    if isinstance(held, SignConstant):
        held = SignConstant(held.signs, held.constant.bfloat16())
    elif held is not None:
        held = held.bfloat16()
    low = replace(p, frozen=held, **{
        n: getattr(p, n).detach().bfloat16() for n in ("x", "weight", "bias", "dy")
    })  # fmt: skip
    expected = low.run()
    gradients = torch.autograd.grad(y, (x, weight, bias), p.dy.bfloat16())
    for a, b in zip((y, *gradients), expected, strict=True):
        assert torch.equal(a.bfloat16(), b)
    assert torch.equal(half, y)
    assert {g.dtype for g in gradients} == {torch.float32}


def test_autocast_leaves_float64_alone_and_can_be_off():
    p = linear_problem(5, 7, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_linear(p.x, p.weight, p.mask).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert masked_linear(p.x.float(), p.weight.float(), p.mask).dtype == torch.float32


def test_autocast_under_torch_func():
    p = linear_problem(5, 7, 3)

    def loss(weight):
        return masked_linear(p.x, weight, p.mask, p.bias).float().sum()

    with torch.autocast("cpu", torch.bfloat16):
        gradient = torch.func.grad(loss)(p.weight)
        mapped = torch.vmap(lambda x: masked_linear(x, p.weight, p.mask, p.bias))(p.x)
    assert gradient.dtype == torch.float32
    assert (gradient[~p.mask] == 0).all()
    assert mapped.dtype == torch.bfloat16


# ---- torch.compile ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("networks", "frozen"), [("single", "zero"), ("shared x", "sign x constant")]
)
def test_compiled_equals_eager(networks, frozen):
    p = linear_problem(5, 33, 3, 0.5, frozen, *NETWORKS[networks])

    def step(x, weight, bias):
        return masked_linear(x, weight, p.mask, bias, p.frozen).square().sum()

    inputs = [t.requires_grad_() for t in (p.x, p.weight, p.bias)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(*inputs), inputs)
    got = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_one_graph_for_ten_masks():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(masked_linear, fullgraph=True, backend=counter)
    p = linear_problem(5, 33, 3)
    weight = p.weight.nan_to_num(7.0)
    for i in range(10):
        mask = p.mask.roll(i, -1)
        assert torch.equal(compiled(p.x, weight, mask), masked_linear(p.x, weight, mask))
    assert counter.frame_count == 1


def test_meta_tensors():
    args = [t.to("meta") for t in (torch.zeros(2, 3), torch.zeros(4, 3), torch.ones(4, 3).bool())]
    assert masked_linear(*args).shape == (2, 4)
    with pytest.raises(ValueError, match=r"weight is torch\.float64, but x is torch\.float32"):
        masked_linear(args[0], args[1].double(), args[2])
