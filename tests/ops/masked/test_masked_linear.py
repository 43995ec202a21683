"""masked_linear: dense float64 products on every backend, and what torch asks of an op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    DENSITIES,
    FROZEN,
    NETWORKS,
    Problem,
    check,
    combinations,
    linear_problem,
)
from tolerances import close
from torch.library import opcheck

import lottery_sparse as ls
from lottery_sparse.ops import SignConstant, dispatch, masked_linear, pack_mask

pytestmark = pytest.mark.numeric

OP = torch.ops.lottery_sparse.masked_linear.default
OP_BACKWARD = torch.ops.lottery_sparse.masked_linear_backward.default
AVAILABLE = dispatch.available("masked_linear", "cpu")

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
            close(db2, db)
        vector = masked_linear(p.x[0], p.weight, p.mask, p.bias)
        close(vector, y[0])


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
                close(a, b)


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


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_any_byte_but_zero_is_kept(backend, density):
    p = linear_problem(7, 9, 5, density, "zero", None, False, torch.float32)
    odd = p.mask.to(torch.uint8).mul(255).view(torch.bool)
    with ls.use_backend(backend):
        expected = masked_linear(p.x, p.weight, p.mask)
        assert torch.equal(masked_linear(p.x, p.weight, odd), expected)
