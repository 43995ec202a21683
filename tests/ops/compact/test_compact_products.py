"""compact_linear and compact_conv2d: dense float64 products on every backend, and torch's asks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compact_problems import Arguments
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    DENSITIES,
    DTYPES,
    FROZEN,
    NETWORKS,
    check,
    conv_case,
    linear_problem,
)
from tolerances import close

import lottery_sparse as ls
from lottery_sparse.ops import compact_conv2d, compact_linear, dispatch
from lottery_sparse.ops.compact.kept import KeptLists

pytestmark = pytest.mark.numeric

LINEAR_BACKENDS = dispatch.available("compact_linear", "cpu")
CONV_BACKENDS = dispatch.available("compact_conv2d", "cpu")

# (N, K, B): one row, one column, no batch, around tiles of 32
SHAPES = [(1, 1, 1), (1, 130, 3), (40, 1, 2), (7, 9, 0), (5, 31, 4), (17, 33, 65), (3, 257, 32)]
FEW_SHAPES = [(1, 1, 1), (17, 33, 5)]
CONVOLUTIONS = {
    "one of everything": (((1, 1), (1, 1), (1, 1)), {}),
    "1x1": (((33, 3), (1, 1), (4, 5)), {}),
    "uneven kernel, stride and padding": (
        ((3, 4), (3, 2), (7, 6)),
        {"stride": (2, 1), "padding": (0, 2)},
    ),
    "dilation": (((2, 3), (2, 3), (7, 8)), {"dilation": (3, 2), "padding": 1}),
    "two groups": (((4, 6), (3, 3), (5, 4)), {"groups": 2, "padding": 1}),
    "depthwise": (((3, 6), (2, 2), (4, 4)), {"groups": 3, "stride": 2}),
    "no batch": (((2, 3), (2, 2), (3, 3)), {"batch": 0}),
}

networks = pytest.mark.parametrize("networks", NETWORKS)
frozen = pytest.mark.parametrize("frozen", FROZEN)


def takes(backend: str, dtype: torch.dtype, conv: bool = False) -> bool:
    if backend != "cpu":
        return True
    return dtype == torch.float32 or (dtype == torch.bfloat16 and not conv)


# ---- values and gradients ------------------------------------------------------------------


@networks
@frozen
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", [*LINEAR_BACKENDS, None])
def test_linear_matches_float64(backend, dtype, frozen, networks, monkeypatch):
    monkeypatch.setenv("LS_BACKEND", backend or "")
    if backend and not takes(backend, dtype):
        a = Arguments.of(linear_problem(5, 7, 3, dtype=dtype))
        with pytest.raises(RuntimeError, match=r"kernels run float32 or bfloat16, got torch"):
            a.run()
        return
    for shape in SHAPES if dtype == torch.float32 else FEW_SHAPES:
        for density in DENSITIES:
            p = linear_problem(*shape, density, frozen, *NETWORKS[networks], dtype)
            check(p, Arguments.of(p).run(), f"at density {density}")


@settings(max_examples=40)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    batch=st.integers(0, 70),
    density=st.floats(0, 1),
    spare=st.integers(0, 40),
    networks=st.sampled_from([(None, False), (1, False), (2, True), (5, False)]),
)
def test_any_shape(rows, columns, batch, density, spare, networks):
    p = linear_problem(rows, columns, batch, density, "zero", *networks)
    for backend in LINEAR_BACKENDS:
        with ls.use_backend(backend):
            check(p, Arguments.of(p, spare).run(), f"on {backend}")


@networks
@pytest.mark.parametrize("backend", CONV_BACKENDS)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d_matches_float64(case, backend, networks):
    dtypes = (*DTYPES, torch.float64) if case == "two groups" else (torch.float32,)
    for dtype in (d for d in dtypes if takes(backend, d, conv=True)):
        for held in FROZEN:
            for density in (0.0, 0.3, 1.0):
                p = conv_case(*CONVOLUTIONS[case], density, held, networks, dtype)
                with ls.use_backend(backend):
                    check(p, Arguments.of(p).run(), f"at density {density}")


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_empty_and_full_rows_and_columns(backend):
    p = linear_problem(9, 40, 5, 0.5)
    mask = p.mask.clone()
    mask[0], mask[3], mask[-1] = False, True, False
    mask[:, 0], mask[:, 7], mask[:, -1] = False, True, False
    p = replace(p, mask=mask, weight=torch.randn(9, 40).masked_fill(~mask, torch.nan))
    with ls.use_backend(backend):
        check(p, Arguments.of(p).run())


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_more_columns_than_sixteen_bits(backend):
    p = linear_problem(2, 2**16 + 3, 3, 0.01)
    a = Arguments.of(p)
    assert a.kept.columns.dtype == torch.int32
    with ls.use_backend(backend):
        check(p, a.run())


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_leading_dimensions_of_x_are_flattened(backend):
    a = Arguments.of(linear_problem(5, 7, 24))
    p = a.problem
    with ls.use_backend(backend):
        y, dx, dw, db = a.run()
        for shape in [(2, 3, 4), (24,), (1, 24, 1), (2, 0, 3)]:
            size = torch.Size(shape).numel()
            q = replace(p, x=p.x[:size].view(*shape, 7), dy=p.dy[:size].view(*shape, 5))
            y2, dx2, dw2, db2 = replace(a, problem=q).run()
            assert y2.shape == (*shape, 5)
            assert dx2.shape == (*shape, 7)
            if size == 24:
                assert torch.equal(y2.view(24, 5), y)
                assert torch.equal(dx2.view(24, 7), dx)
                assert torch.equal(dw2, dw)
                close(db2, db)
            else:
                assert not dw2.any()
        vector = a.call(p.x[0], a.values, p.bias)
        close(vector, y[0])


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_only_some_inputs_want_gradients(backend, wanted):
    a = Arguments.of(linear_problem(5, 7, 3), spare=0)
    p = a.problem
    inputs = [t.requires_grad_() for t in (p.x, a.values, p.bias)]
    with ls.use_backend(backend):
        every = torch.autograd.grad(a.call(*inputs), inputs, p.dy)
        inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        got = torch.autograd.grad(a.call(*inputs), [inputs[i] for i in wanted], p.dy)
        assert not a.call(*(t.detach() for t in inputs)).requires_grad
        without = a.call(p.x, a.values, None)
    assert all(torch.equal(g, every[i]) for g, i in zip(got, wanted, strict=True))
    close(without + p.bias, a.call(p.x, a.values, p.bias))


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@networks
def test_any_strides(backend, networks):
    a = Arguments.of(linear_problem(6, 33, 4, 0.3, "zero", *NETWORKS[networks]))
    p = a.problem
    with ls.use_backend(backend):
        for strided in (
            lambda t: t.mT.contiguous().mT,
            lambda t: t.repeat_interleave(2, -1)[..., ::2],
            lambda t: torch.cat([t, t], -2)[..., : t.shape[-2], :],
        ):
            q = replace(p, x=strided(p.x), dy=strided(p.dy))
            check(p, replace(a, problem=q).run())
        doubled = a.values.repeat_interleave(2, -1)[..., ::2]
        bias = p.bias.repeat_interleave(2, -1)[..., ::2]
        q = replace(p, bias=bias)
        check(p, replace(a, problem=q, values=doubled, effective=a.effective.mT.clone().mT).run())
        x, dy = p.x[..., :1, :].expand_as(p.x), p.dy[..., :1].expand_as(p.dy)
        q = replace(p, x=x, dy=dy)
        check(q, replace(a, problem=q).run())


def test_conv2d_channels_last_and_without_a_batch():
    p = conv_case(((4, 6), (3, 3), (5, 4)), {"padding": 1})
    a = Arguments.of(p)
    last = p.x.contiguous(memory_format=torch.channels_last)
    check(p, replace(a, problem=replace(p, x=last)).run())
    alone = a.call(p.x[0], a.values, p.bias)
    close(alone, a.call(p.x, a.values, p.bias)[0])
    y = compact_conv2d(p.x, a.values, a.kept, a.effective, p.bias, a.zero, (1, 2), (0, 1), [2, 1])
    expected = F.conv2d(p.x, a.effective, p.bias, (1, 2), (0, 1), (2, 1))
    close(y, expected)


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_nan_stays_where_it_is(backend):
    a = Arguments.of(linear_problem(5, 40, 3, 0.3), spare=0)
    p = a.problem
    row, column = (int(i) for i in p.mask.nonzero()[4])
    a.values[4] = a.effective[row, column] = torch.nan
    with ls.use_backend(backend):
        y, dx, dw, _ = a.run()
    assert y.isnan().any(0).nonzero().flatten().tolist() == [row]
    assert dx.isnan().any(0).nonzero().flatten().tolist() == [column]
    assert not dw.isnan().any()


# ---- derivatives of derivatives --------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["zero", "tensor"])
@pytest.mark.parametrize(
    ("convolution", "networks"),
    [*((False, n) for n in NETWORKS), (True, "single"), (True, "shared x")],
)
def test_gradcheck_and_gradgradcheck(convolution, networks, frozen):
    if convolution:
        p = conv_case(((2, 2), (2, 1), (2, 2)), {}, 0.5, frozen, networks, torch.float64)
    else:
        p = linear_problem(2, 3, 2, 0.5, frozen, *NETWORKS[networks], torch.float64)
    a = Arguments.of(p)
    values = a.values.nan_to_num(7.0)  # a numeric derivative moves spare slots too
    inputs = [t.requires_grad_() for t in (p.x, values, p.bias)]

    def f(x, values, bias):
        # the effective weight holds the values, also those that a numeric derivative moves
        w = ls.ops.compact.reference.kept_weight(values.detach(), a.effective, *a.kept[:2])
        return replace(a, effective=w).call(x, values, bias)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_second_derivatives(backend):
    a = Arguments.of(linear_problem(5, 33, 3, 0.3))
    p = a.problem
    dense = a.effective.clone().requires_grad_()
    x, values = p.x.requires_grad_(), a.values.requires_grad_()

    def penalty(y, weight):
        dx, dw = torch.autograd.grad(y.sin().sum(), (x, weight), create_graph=True)
        if weight is dense:
            dw = dw * p.mask
        return torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, weight))

    with ls.use_backend(backend):
        gx, gv = penalty(a.call(x, values, None), values)
    ex, ew = penalty(F.linear(x, dense), dense)
    close(gx, ex)
    close(a.dense(gv), ew * p.mask)


# ---- bad input -------------------------------------------------------------------------------

LISTS = KeptLists.of(torch.ones(4, 3, dtype=torch.bool))
BAD = {
    "x of other columns": ({"x": torch.zeros(2, 5)}, r"x has shape \(2, 5\).*needs \[\.\.\., 3\]"),
    "x a number": ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
    "effective 1-d": ({"effective": torch.zeros(3)}, r"effective must have 2.*got shape \(3,\)"),
    "effective 4-d": ({"effective": torch.zeros(1, 1, 4, 3)}, r"got shape \(1, 1, 4, 3\)"),
    "effective with gradients": (
        {"effective": torch.zeros(4, 3, requires_grad=True)},
        "effective is a constant, got one that requires grad; detach it",
    ),
    "values 2-d": ({"values": torch.zeros(4, 3)}, r"values has shape \(4, 3\).*needs \('C',\)"),
    "another capacity": ({"values": torch.zeros(11)}, r"kept\.columns has shape \(12,\).*\(11,\)"),
    "lists of another mask": (
        {"kept": KeptLists.of(torch.ones(3, 4, dtype=torch.bool))},
        r"kept\.starts has shape \(4,\).*need \(5,\)",
    ),
    "bias": ({"bias": torch.zeros(3)}, r"bias has shape \(3,\).*needs \(4,\)"),
    "values dtype": ({"values": torch.zeros(12).double()}, r"values is torch\.float64, but x is"),
    "effective dtype": ({"effective": torch.zeros(4, 3).half()}, r"effective is torch\.float16"),
    "bias dtype": ({"bias": torch.zeros(4).half()}, r"bias is torch\.float16.*torch\.autocast"),
    "values device": (
        {"values": torch.zeros(12, device="meta")},
        r"values is on meta, but x is on cpu; move one",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(wrong, message):
    arguments = {
        "x": torch.zeros(2, 3),
        "values": torch.zeros(12),
        "kept": LISTS,
        "effective": torch.zeros(4, 3),
    }
    with pytest.raises(ValueError, match=message):
        compact_linear(**arguments | wrong)


@pytest.mark.parametrize("shape", [(2, 5, 3), (5, 3, 3, 3), (3,)], ids=str)
def test_bad_x_for_networks(shape):
    kept = KeptLists.of(torch.ones(3, 4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"3 networks side by side need \[B, K\].*\[3, B, K\]"):
        compact_linear(torch.zeros(shape), torch.zeros(3, 12), kept, torch.zeros(3, 4, 3))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 4), (2, 2, 4, 4, 4)], ids=str)
def test_bad_x_of_a_convolution(shape):
    kept, effective = KeptLists.of(torch.ones(6, 18).bool()), torch.zeros(6, 2, 3, 3)
    with pytest.raises(ValueError, match=r"groups=2 needs \[B, C, H, W\].*with C = 4"):
        compact_conv2d(torch.zeros(shape), torch.zeros(108), kept, effective, groups=2)
