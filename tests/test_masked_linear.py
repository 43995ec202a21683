"""masked_linear: dense float64 products on every backend, and what torch asks of an op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    DENSITIES,
    FROZEN,
    NETWORKS,
    Problem,
    check,
    combinations,
    effective_weight,
    linear_problem,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._pytree import tree_map

import lottery_sparse as ls
from lottery_sparse import backends
from lottery_sparse.ops import SignConstant, masked_linear, pack_mask

OP = torch.ops.lottery_sparse.masked_linear.default
OP_BACKWARD = torch.ops.lottery_sparse.masked_linear_backward.default
AVAILABLE = backends.available("masked_linear", "cpu")

# (N, K, B): one row, one column, no batch, around the 32 bits of a word, the 128 of a chunk, and
# 16 and 64 lanes
SHAPES = [(1, 1, 1), (1, 130, 3), (40, 1, 2), (7, 9, 0), (5, 31, 4), (17, 33, 65), (3, 257, 16)]
FEW_SHAPES = [(1, 1, 1), (17, 33, 5)]

networks = pytest.mark.parametrize("networks", NETWORKS)
frozen = pytest.mark.parametrize("frozen", FROZEN)


# ---- values and gradients ------------------------------------------------------------------


@networks
@pytest.mark.parametrize(("backend", "frozen", "dtype"), combinations("masked_linear"), ids=str)
def test_matches_float64(backend, frozen, dtype, networks):
    for shape in SHAPES if dtype == torch.float32 else FEW_SHAPES:
        for density in DENSITIES:
            p = linear_problem(*shape, density, frozen, *NETWORKS[networks], dtype)
            packed = p.packed
            with ls.use_backend(backend):
                check(p, p.run(), f"at density {density}")
                check(p, p.run(packed), f"at density {density}, packed mask")


@networks
@frozen
def test_float64_and_the_backend_chosen_by_itself(frozen, networks):
    for dtype in (torch.float32, torch.float64):
        for density in DENSITIES:
            p = linear_problem(17, 33, 5, density, frozen, *NETWORKS[networks], dtype)
            check(p, p.run())


@settings(max_examples=40)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    batch=st.integers(0, 70),
    density=st.floats(0, 1),
    networks=st.sampled_from([(None, False), (1, False), (2, True), (5, False)]),
)
def test_any_shape(rows, columns, batch, density, networks):
    p = linear_problem(rows, columns, batch, density, "zero", *networks)
    for backend in AVAILABLE:
        with ls.use_backend(backend):
            check(p, p.run(), f"on {backend}")


@pytest.mark.parametrize("backend", AVAILABLE)
def test_leading_dimensions_of_x_are_flattened(backend):
    p = linear_problem(5, 7, 24)
    with ls.use_backend(backend):
        y, dx, dw, db = p.run()
        for shape in [(2, 3, 4), (24,), (1, 24, 1)]:
            q = replace(p, x=p.x.view(*shape, 7), dy=p.dy.view(*shape, 5))
            y2, dx2, dw2, db2 = q.run()
            assert torch.equal(y2.view(24, 5), y)
            assert torch.equal(dx2.view(24, 7), dx)
            assert torch.equal(dw2, dw)
            torch.testing.assert_close(db2, db)
        vector = masked_linear(p.x[0], p.weight, p.mask, p.bias)
        torch.testing.assert_close(vector, y[0])


@pytest.mark.parametrize(
    ("x", "weight", "y"),
    [((2, 0), (4, 0), (2, 4)), ((2, 3), (0, 3), (2, 0)), ((2, 3), (0, 4, 3), (0, 2, 4))],
    ids=["no columns", "no rows", "no networks"],
)
def test_nothing_to_multiply(x, weight, y):
    for backend in AVAILABLE:
        with ls.use_backend(backend):
            got = masked_linear(torch.ones(x), torch.ones(weight), torch.ones(weight).bool())
        assert got.shape == y
        assert not got.any()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_only_some_inputs_want_gradients(backend, wanted):
    p = linear_problem(5, 7, 3)
    names = ("x", "weight", "bias")
    with ls.use_backend(backend):
        every = p.run()[1:]
        inputs = [getattr(p, n).detach().requires_grad_(i in wanted) for i, n in enumerate(names)]
        y = masked_linear(inputs[0], inputs[1], p.mask, inputs[2])
        got = torch.autograd.grad(y, [inputs[i] for i in wanted], p.dy)
    assert all(torch.equal(a, every[i]) for a, i in zip(got, wanted, strict=True))
    assert not masked_linear(p.x, p.weight, p.mask, p.bias).requires_grad


# ---- pruned entries ------------------------------------------------------------------------


@networks
@pytest.mark.parametrize(("backend", "frozen", "dtype"), combinations("masked_linear"), ids=str)
def test_nothing_a_pruned_entry_holds_matters(backend, frozen, dtype, networks):
    p = linear_problem(17, 33, 5, 0.5, frozen, *NETWORKS[networks], dtype)
    with ls.use_backend(backend):
        expected = p.run()
        for value in (0.0, torch.inf, -torch.inf, 1e4, torch.nan):
            got = replace(p, weight=p.weight.masked_fill(~p.mask, value)).run()
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            # not even the sign of a zero
            assert not got[2][~p.mask].signbit().any()


@pytest.mark.parametrize("backend", AVAILABLE)
def test_nan_in_a_kept_entry_is_seen(backend):
    p = linear_problem(5, 7, 3, 1.0)
    p.weight[2, 4] = torch.nan
    with ls.use_backend(backend):
        y, dx, dw, _ = p.run()
    assert y.isnan().sum(0).tolist() == [0, 0, 3, 0, 0]
    assert dx.isnan().sum(0).tolist() == [0, 0, 0, 0, 3, 0, 0]
    assert not dw.isnan().any()


@pytest.mark.parametrize("backend", AVAILABLE)
def test_all_pruned_is_the_bias(backend):
    p = linear_problem(5, 7, 3, 0.0)
    with ls.use_backend(backend):
        y, dx, dw, _ = p.run()
    assert torch.equal(y, p.bias.expand(3, 5))
    assert not dx.any()
    assert not dw.any()


def test_no_gradient_flows_to_frozen_values():
    p = linear_problem(5, 7, 3, frozen="tensor")
    with pytest.raises(ValueError, match=r"frozen values are constants.*detach it"):
        masked_linear(p.x, p.weight, p.mask, None, p.frozen.requires_grad_())


@frozen
def test_backends_agree_bit_for_bit(frozen):
    # dense selects by integer AND, reference by torch.where; the products are the same
    for shape in SHAPES:
        p = linear_problem(*shape, 0.5, frozen, *NETWORKS["networks"])
        with ls.use_backend("reference"):
            expected = p.run()
        with ls.use_backend("dense"):
            assert all(torch.equal(a, b) for a, b in zip(p.run(), expected, strict=True))


# ---- memory layouts ------------------------------------------------------------------------


@networks
@pytest.mark.parametrize("backend", AVAILABLE)
def test_any_strides(backend, networks):
    p = linear_problem(6, 33, 4, 0.5, "zero", *NETWORKS[networks])
    with ls.use_backend(backend):
        expected = p.run()
        for strided in (
            lambda t: t.mT.contiguous().mT,
            lambda t: t.repeat_interleave(2, -1)[..., ::2],
            lambda t: torch.cat([t, t], -2)[..., : t.shape[-2], :],
        ):
            q = replace(p, **{n: strided(getattr(p, n)) for n in ("x", "weight", "mask", "dy")})
            for a, b in zip(q.run(), expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_expanded_x_and_dy(backend):
    p = linear_problem(6, 33, 4)
    p = replace(p, x=p.x[:1].expand(4, -1), dy=p.dy[:1, :1].expand(4, 6))
    with ls.use_backend(backend):
        check(p, p.run())


# ---- derivatives of derivatives --------------------------------------------------------------


@frozen
@networks
def test_gradcheck_and_gradgradcheck(networks, frozen):
    p = linear_problem(2, 3, 2, 0.5, frozen, *NETWORKS[networks], torch.float64)
    # a numeric derivative moves pruned entries too, so they must be numbers
    weight = p.weight.nan_to_num(7.0)
    inputs = [t.requires_grad_() for t in (p.x, weight, p.bias)]

    def f(x, weight, bias):
        return masked_linear(x, weight, p.mask, bias, p.frozen)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_second_derivatives_at_pruned_entries_are_exactly_zero():
    p = linear_problem(5, 7, 3)  # pruned entries hold NaN
    x, weight = p.x.requires_grad_(), p.weight.requires_grad_()
    y = masked_linear(x, weight, p.mask)
    dx, dw = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
    penalty = dx.square().sum() + dw.square().sum()
    ddx, ddw = torch.autograd.grad(penalty, (x, weight))
    assert ddx.isfinite().all()
    assert ddw.isfinite().all()
    assert (ddw[~p.mask] == 0).all()
    assert (ddw[p.mask] != 0).any()


# ---- torch.library.opcheck, all four utilities -----------------------------------------------

OPCHECK = [
    ("single", "zero", torch.float32, False),
    ("single", "tensor", torch.float16, True),
    ("networks", "sign x constant", torch.float32, True),
    ("shared x", "zero", torch.float32, False),
    ("shared x", "zero", torch.float64, False),
]


def op_arguments(p: Problem, packed: bool) -> tuple:
    """(x, weight, mask, bias, frozen, signs) as the schema has them."""
    held, signs = p.frozen, None
    if isinstance(held, SignConstant):
        signs, held = held
    return p.x, p.weight, p.packed if packed else p.mask, p.bias, held, signs


@pytest.mark.parametrize(("networks", "frozen", "dtype", "packed"), OPCHECK, ids=str)
def test_opcheck(networks, frozen, dtype, packed):
    p = linear_problem(2, 3, 2, 0.5, frozen, *NETWORKS[networks], dtype)
    p = replace(p, weight=p.weight.nan_to_num(7.0))
    x, weight, mask, bias, held, signs = op_arguments(p, packed)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    opcheck(OP, (x, weight, mask, bias, held, signs))
    needs = (False, True) if networks == "single" else (True, False)
    opcheck(OP_BACKWARD, (p.dy.requires_grad_(), *inputs[:2], mask, held, signs, True, True))
    opcheck(OP_BACKWARD, (p.dy, *inputs[:2], mask, held, signs, *needs))


def test_opcheck_of_a_transposed_mask():
    p = linear_problem(2, 3, 2)
    weight = p.weight.nan_to_num(7.0).requires_grad_()
    opcheck(OP, (p.x, weight, p.mask.mT.contiguous().mT, None, None, None))


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
        torch.testing.assert_close(got, by_loop(f, in_dims, arguments))


@networks
def test_gradient_of_a_vmap(networks):
    in_dims = (None, 0, 0, 0, None)
    x, weight, mask, bias, _ = mapped_arguments(networks, "zero", in_dims)

    def loss(x, weight, bias):
        return torch.vmap(summed, in_dims)(x, weight, mask, bias, None).sum()

    def loss_by_loop(x, weight, bias):
        return by_loop(summed, in_dims, [x, weight, mask, bias, None]).sum()

    expected = torch.func.grad(loss_by_loop, (0, 1, 2))(x, weight, bias)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2))(x, weight, bias), expected)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    torch.testing.assert_close(torch.autograd.grad(loss(*inputs), inputs), expected)


@networks
def test_nested_vmap(networks):
    x, weight, mask, bias, _ = mapped_arguments(networks, "zero", (0, 0, 0, 0, None))

    def over_x(weight, mask, bias):
        return torch.vmap(lambda x: masked_linear(x, weight, mask, bias))(x)

    got = torch.vmap(over_x)(weight, mask, bias)
    for i in range(SIZE):
        for j in range(SIZE):
            torch.testing.assert_close(got[i, j], masked_linear(x[j], weight[i], mask[i], bias[i]))


def test_vmap_of_packed_masks_and_of_no_batch():
    p = linear_problem(4, 33, 3)
    masks = torch.stack([p.mask, ~p.mask])
    weight = p.weight.nan_to_num(7.0)
    expected = torch.stack([masked_linear(p.x, weight, m) for m in masks])
    got = torch.vmap(lambda bits: masked_linear(p.x, weight, bits))(pack_mask(masks))
    torch.testing.assert_close(got, expected)
    empty = torch.vmap(lambda x: masked_linear(x, weight, p.mask))(torch.zeros(2, 0, 33))
    assert empty.shape == (2, 0, 4)


def test_per_sample_gradients_and_jacobians():
    p = linear_problem(4, 5, 3, 0.5, dtype=torch.float64)
    weight = p.weight.nan_to_num(7.0)

    def loss(weight, x):
        return masked_linear(x, weight, p.mask, p.bias).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(weight, p.x)
    expected = torch.stack([torch.func.grad(loss)(weight, x) for x in p.x])
    torch.testing.assert_close(per_sample, expected)
    assert (per_sample[:, ~p.mask] == 0).all()

    jacobian = torch.func.jacrev(lambda x: masked_linear(x, weight, p.mask))(p.x[0])
    torch.testing.assert_close(jacobian, effective_weight(p))
    dense = effective_weight(p)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda x: loss(weight, x)))(p.x[0])
    torch.testing.assert_close(hessian, 2 * dense.mT @ dense)


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


# ---- bad input -------------------------------------------------------------------------------

SIGNS = pack_mask(torch.ones(4, 3).bool())
BAD = {
    "x of other columns": ({"x": torch.zeros(2, 5)}, r"x has shape \(2, 5\).*needs \[\.\.\., 3\]"),
    "x a number": ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
    "weight 1-d": ({"weight": torch.zeros(3)}, r"weight must be \[N, K\].*got shape \(3,\)"),
    "weight 4-d": ({"weight": torch.zeros(1, 1, 4, 3)}, r"got shape \(1, 1, 4, 3\)"),
    "mask shape": (
        {"mask": torch.ones(3, 4).bool()},
        r"mask has shape \(3, 4\), but weight has \(4, 3\)",
    ),
    "mask float": (
        {"mask": torch.ones(4, 3)},
        r"mask must be bool or packed int32.*got torch\.float32.*\.bool\(\)",
    ),
    "mask uint8": ({"mask": torch.ones(4, 3).byte()}, r"got torch\.uint8"),
    "mask int32 not packed": (
        {"mask": torch.ones(4, 3).int()},
        r"packed mask has shape \(4, 3\).*needs \(4, 4\); use ops\.pack_mask",
    ),
    "bias": ({"bias": torch.zeros(3)}, r"bias has shape \(3,\).*needs \(4,\)"),
    "frozen shape": (
        {"frozen": torch.zeros(3)},
        r"frozen has shape \(3,\).*weight has \(4, 3\).*ops\.SignConstant",
    ),
    "signs bool": (
        {"frozen": SignConstant(torch.ones(4, 3).bool(), torch.tensor(1.0))},
        r"signs must be packed int32 \(1 = plus\), got torch\.bool",
    ),
    "constant per row": (
        {"frozen": SignConstant(SIGNS, torch.ones(4))},
        r"constant must be one number, or one per network.*got shape \(4,\)",
    ),
    "weight dtype": (
        {"weight": torch.zeros(4, 3).double()},
        r"weight is torch\.float64, but x is torch\.float32; convert one, or use torch\.autocast",
    ),
    "bias dtype": ({"bias": torch.zeros(4).half()}, r"bias is torch\.float16"),
    "frozen dtype": ({"frozen": torch.zeros(4, 3).half()}, r"frozen is torch\.float16"),
    "integers": (
        {"x": torch.zeros(2, 3).long(), "weight": torch.zeros(4, 3).long()},
        r"weight must be of a floating dtype, got torch\.int64",
    ),
    "weight device": (
        {"weight": torch.zeros(4, 3, device="meta")},
        r"weight is on meta, but x is on cpu; move one",
    ),
    "mask device": (
        {"mask": torch.ones(4, 3, dtype=torch.bool, device="meta")},
        r"mask is on meta, but x is on cpu",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(wrong, message):
    arguments = {
        "x": torch.zeros(2, 3),
        "weight": torch.zeros(4, 3),
        "mask": torch.ones(4, 3).bool(),
    }
    with pytest.raises(ValueError, match=message):
        masked_linear(**arguments | wrong)


def test_frozen_of_an_unknown_kind():
    with pytest.raises(TypeError, match=r"frozen must be a tensor, a Sign.*got str"):
        masked_linear(torch.zeros(2, 3), torch.zeros(4, 3), torch.ones(4, 3).bool(), frozen="zero")


@pytest.mark.parametrize("shape", [(2, 5, 3), (5, 3, 3, 3), (3,)], ids=str)
def test_bad_x_for_networks(shape):
    weight = torch.zeros(3, 4, 3)
    with pytest.raises(ValueError, match=r"3 networks side by side need \[B, K\].*\[3, B, K\]"):
        masked_linear(torch.zeros(shape), weight, weight.bool())


def test_one_constant_serves_all_networks():
    p = linear_problem(4, 5, 3, 0.5, "sign x constant", *NETWORKS["networks"])
    one = torch.tensor(0.5)
    got = replace(p, frozen=SignConstant(p.frozen.signs, one)).run()
    each = replace(p, frozen=SignConstant(p.frozen.signs, one.expand(3))).run()
    assert all(torch.equal(a, b) for a, b in zip(got, each, strict=True))
