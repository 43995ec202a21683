"""masked_conv2d: F.conv2d in float64 on every backend, and what torch asks of an op."""

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
    GROUPED,
    NETWORKS,
    SMALL,
    check,
    combinations,
    conv_case,
    numbers,
)
from tolerances import close
from torch.library import opcheck

import lottery_sparse as ls
from lottery_sparse.ops import SignConstant, dispatch, masked_conv2d, pack_mask

OP = torch.ops.lottery_sparse.masked_conv2d.default
OP_BACKWARD = torch.ops.lottery_sparse.masked_conv2d_backward.default
# said once per process by F.conv2d, which gives the answers here
pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

AVAILABLE = dispatch.available("masked_conv2d", "cpu")

# (channels in and out, kernel, image) and options
CASES = {
    "one of everything": (((1, 1), (1, 1), (1, 1)), {}),
    "1x1, more than a word of columns": (((33, 3), (1, 1), (4, 5)), {}),
    "uneven kernel, stride and padding": (
        ((3, 4), (3, 2), (7, 6)),
        {"stride": (2, 1), "padding": (0, 2)},
    ),
    "dilation": (((2, 3), (2, 3), (7, 8)), {"dilation": (3, 2), "padding": 1}),
    "two groups": (((4, 6), (3, 3), (5, 4)), {"groups": 2, "padding": 1}),
    "depthwise": (((3, 6), (2, 2), (4, 4)), {"groups": 3, "stride": 2}),
    "same, even kernel": (((2, 3), (2, 4), (5, 6)), {"padding": "same"}),
    "same, dilated": (((2, 3), (3, 2), (6, 5)), {"padding": "same", "dilation": (2, 3)}),
    "valid": (((2, 3), (3, 3), (5, 4)), {"padding": "valid", "stride": 2}),
    "kernel as large as the image": (((3, 2), (4, 5), (4, 5)), {}),
}
MINIMAL = ((2, 2), (2, 1), (2, 2))  # for numeric derivatives

networks = pytest.mark.parametrize("networks", NETWORKS)
frozen = pytest.mark.parametrize("frozen", FROZEN)
backend = pytest.mark.parametrize("backend", AVAILABLE)


# ---- values and gradients ------------------------------------------------------------------


@networks
@pytest.mark.parametrize(("backend", "frozen", "dtype"), combinations("masked_conv2d"), ids=str)
def test_matches_float64(backend, frozen, dtype, networks):
    cases = CASES.values() if dtype == torch.float32 else [(SMALL, {}), (SMALL, GROUPED)]
    for shapes, options in cases:
        for density in DENSITIES:
            p = conv_case(shapes, options, density, frozen, networks, dtype)
            packed = p.packed
            with ls.use_backend(backend):
                check(p, p.run(), f"at density {density}, {options}")
                check(p, p.run(packed), f"at density {density}, {options}, packed mask")


@settings(max_examples=30)
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    beyond=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    batch=st.integers(0, 3),
    networks=st.sampled_from(list(NETWORKS)),
)
def test_any_geometry(channels, groups, kernel, beyond, stride, padding, dilation, batch, networks):
    image = [d * (k - 1) + 1 + b for d, k, b in zip(dilation, kernel, beyond, strict=True)]
    shapes = tuple(groups * c for c in channels), kernel, tuple(image)
    options = {"groups": groups, "stride": stride, "padding": padding, "dilation": dilation}
    p = conv_case(shapes, options | {"batch": batch}, 0.5, "zero", networks)
    for name in AVAILABLE:
        with ls.use_backend(name):
            check(p, p.run(), f"on {name}, {options}")


@networks
@backend
def test_no_batch(backend, networks):
    p = conv_case(SMALL, {"batch": 0}, 0.5, "zero", networks)
    with ls.use_backend(backend):
        check(p, p.run())


@backend
def test_one_image_without_a_batch(backend):
    p = conv_case(SMALL, {"batch": 1})
    for padding in (0, 1, "same"):
        with ls.use_backend(backend):
            one = masked_conv2d(p.x[0], p.weight, p.mask, p.bias, padding=padding)
            batch = masked_conv2d(p.x, p.weight, p.mask, p.bias, padding=padding)
        assert torch.equal(one, batch[0])


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding_is_that_of_torch(padding):
    for kernel in [(1, 1), (2, 2), (3, 4), (4, 3), (1, 6)]:
        for dilation in (1, 2, (1, 3)):
            x, weight = torch.randn(2, 3, 14, 17), torch.randn(4, 3, *kernel)
            expected = F.conv2d(x, weight, None, 1, padding, dilation)
            every = torch.ones_like(weight).bool()
            got = masked_conv2d(x, weight, every, padding=padding, dilation=dilation)
            close(got, expected)


@backend
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_some_inputs_want_gradients(backend, wanted):
    p = conv_case(SMALL, GROUPED)
    with ls.use_backend(backend):
        every = p.run()[1:]
        tensors = (p.x, p.weight, p.bias)
        inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        y = masked_conv2d(inputs[0], inputs[1], p.mask, inputs[2], **p.options)
        got = torch.autograd.grad(y, [inputs[i] for i in wanted], p.dy)
    for a, i in zip(got, wanted, strict=True):
        close(a, every[i])


# ---- pruned entries ------------------------------------------------------------------------


@networks
@pytest.mark.parametrize(("backend", "frozen", "dtype"), combinations("masked_conv2d"), ids=str)
def test_nothing_a_pruned_entry_holds_matters(backend, frozen, dtype, networks):
    p = conv_case(SMALL, GROUPED, 0.5, frozen, networks, dtype)
    with ls.use_backend(backend):
        expected = p.run()
        for value in (0.0, torch.inf, -torch.inf, torch.nan):
            got = replace(p, weight=p.weight.masked_fill(~p.mask, value)).run()
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            assert not got[2][~p.mask].signbit().any()


@backend
def test_nan_in_a_kept_entry_is_seen(backend):
    p = conv_case(((2, 3), (1, 1), (2, 2)), {}, 1.0)
    p.weight[1, 0] = torch.nan
    with ls.use_backend(backend):
        y, dx, dw, _ = p.run()
    assert y.isnan().any(3).any(2).any(0).tolist() == [False, True, False]
    assert dx.isnan().any(3).any(2).any(0).tolist() == [True, False]
    assert not dw.isnan().any()


@frozen
def test_backends_agree_bit_for_bit(frozen):
    for shapes, options in CASES.values():
        p = conv_case(shapes, options, 0.5, frozen, "networks")
        with ls.use_backend("reference"):
            expected = p.run()
        with ls.use_backend("dense"):
            assert all(torch.equal(a, b) for a, b in zip(p.run(), expected, strict=True))


# ---- memory layouts ------------------------------------------------------------------------

CHANNELS_LAST = [("x",), ("weight",), ("x", "weight"), ("mask",), ("x", "weight", "mask", "dy")]


@backend
@pytest.mark.parametrize("which", CHANNELS_LAST, ids="-".join)
def test_channels_last(backend, which):
    p = conv_case(((3, 4), (3, 2), (5, 6)), {"padding": 1})
    q = replace(p, **{n: getattr(p, n).to(memory_format=torch.channels_last) for n in which})
    with ls.use_backend(backend):
        check(q, q.run(), f"with {which} channels last")
        y = masked_conv2d(q.x, q.weight, q.mask, q.bias, **q.options)
    if "x" in which:  # as F.conv2d
        assert y.is_contiguous(memory_format=torch.channels_last)


@networks
@backend
def test_any_strides(backend, networks):
    p = conv_case(SMALL, {"padding": 1}, 0.5, "zero", networks)
    with ls.use_backend(backend):
        for strided in (
            lambda t: t.mT.contiguous().mT,
            lambda t: t.repeat_interleave(2, -1)[..., ::2],
        ):
            q = replace(p, **{n: strided(getattr(p, n)) for n in ("x", "weight", "mask", "dy")})
            check(q, q.run())
        q = replace(p, dy=p.dy[..., :1, :1].expand_as(p.dy))
        check(q, q.run())


# ---- derivatives of derivatives --------------------------------------------------------------


@networks
@pytest.mark.parametrize(("frozen", "options"), [("tensor", {}), ("zero", GROUPED)])
def test_gradcheck_and_gradgradcheck(networks, frozen, options):
    p = conv_case(MINIMAL, options | {"batch": 1}, 0.5, frozen, networks, torch.float64)
    inputs = [t.requires_grad_() for t in (p.x, p.weight.nan_to_num(7.0), p.bias)]

    def f(x, weight, bias):
        return masked_conv2d(x, weight, p.mask, bias, p.frozen, **p.options)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


# ---- torch.library.opcheck, all four utilities -----------------------------------------------

OPCHECK = [
    ("single", "zero", (), False),
    ("single", "tensor", ("x",), True),
    ("single", "zero", ("weight",), False),
    ("networks", "sign x constant", (), True),
    ("shared x", "zero", (), False),
]


@pytest.mark.parametrize(("networks", "frozen", "channels_last", "packed"), OPCHECK, ids=str)
def test_opcheck(networks, frozen, channels_last, packed):
    p = numbers(conv_case(SMALL, {}, 0.5, frozen, networks))
    for name in channels_last:
        tensor = getattr(p, name).to(memory_format=torch.channels_last)
        p = replace(p, **{name: tensor})
    held, signs = p.frozen, None
    if isinstance(held, SignConstant):
        signs, held = held
    mask = p.packed if packed else p.mask
    geometry = [1, 1], [0, 0], [1, 1], 1
    x, weight, bias = (t.requires_grad_() for t in (p.x, p.weight, p.bias))
    opcheck(OP, (x, weight, mask, bias, held, signs, *geometry))
    dy = p.dy.requires_grad_()
    opcheck(OP_BACKWARD, (dy, x, weight, mask, held, signs, *geometry, True, True))


# ---- bad input -------------------------------------------------------------------------------

SIGNS = pack_mask(torch.ones(4, 18).bool())
BAD = {
    "x channels": (
        {"x": torch.zeros(1, 3, 5, 5)},
        r"x has shape \(1, 3, 5, 5\).*with groups=1 needs \[B, C, H, W\] with C = 2",
    ),
    "x 2-d": ({"x": torch.zeros(5, 5)}, r"x has shape \(5, 5\)"),
    "x 5-d": ({"x": torch.zeros(1, 1, 2, 5, 5)}, r"x has shape \(1, 1, 2, 5, 5\)"),
    "weight 3-d": ({"weight": torch.zeros(4, 2, 3)}, r"weight must be \[O, I, kh, kw\]"),
    "mask": (
        {"mask": torch.ones(4, 2, 3, 2).bool()},
        r"mask has shape \(4, 2, 3, 2\), but weight has \(4, 2, 3, 3\)",
    ),
    "mask float": ({"mask": torch.ones(4, 2, 3, 3)}, "mask must be bool or packed int32"),
    "packed mask": (
        {"mask": torch.zeros(4, 2, dtype=torch.int32)},
        r"packed mask has shape \(4, 2\).*needs \(4, 4\)",
    ),
    "bias": ({"bias": torch.zeros(2)}, r"bias has shape \(2,\).*needs \(4,\)"),
    "frozen": ({"frozen": torch.zeros(4, 2)}, r"frozen has shape \(4, 2\)"),
    "constant": (
        {"frozen": SignConstant(SIGNS, torch.ones(4))},
        r"constant must be one number.*got shape \(4,\)",
    ),
    "dtype": ({"x": torch.zeros(1, 2, 5, 5).half()}, r"weight is torch\.float32, but x is .*16"),
    "stride": ({"stride": 0}, "stride must be an int >= 1 or two of them, got 0"),
    "strides": ({"stride": (1, 2, 3)}, r"stride must be .*got \(1, 2, 3\)"),
    "dilation": ({"dilation": (1, 0)}, r"dilation must be an int >= 1.*got \(1, 0\)"),
    "padding": ({"padding": -1}, "padding must be an int >= 0.*got -1"),
    "padding name": ({"padding": "full"}, "padding must be numbers, .*got 'full'"),
    "same, strided": ({"padding": "same", "stride": 2}, 'padding="same" needs stride 1, got'),
    "groups 0": ({"groups": 0}, "groups=0 must divide the 4 output channels"),
    "groups 3": ({"groups": 3}, "groups=3 must divide the 4 output channels"),
    "groups 2": ({"groups": 2}, "with groups=2 needs .*with C = 4"),
}


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(wrong, message):
    arguments = {
        "x": torch.zeros(1, 2, 5, 5),
        "weight": torch.zeros(4, 2, 3, 3),
        "mask": torch.ones(4, 2, 3, 3).bool(),
    }
    with pytest.raises(ValueError, match=message):
        masked_conv2d(**arguments | wrong)


def test_x_of_other_networks():
    weight = torch.zeros(3, 4, 2, 3, 3)
    with pytest.raises(ValueError, match="x holds 2 networks, but weight 3"):
        masked_conv2d(torch.zeros(2, 1, 2, 5, 5), weight, weight.bool())


def test_image_smaller_than_the_kernel():
    weight = torch.zeros(4, 2, 3, 3)
    with pytest.raises(RuntimeError, match=r"\(2 x 2\).*Kernel size: \(3 x 3\)"):
        masked_conv2d(torch.zeros(1, 2, 2, 2), weight, weight.bool())
