"""binary_linear and seeded_linear against float64, and layers that hold such weights."""

from __future__ import annotations

import pytest
import torch
from tolerances import close, of_sum

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.nn.packed import FORMATS
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits import reference

pytestmark = pytest.mark.numeric

KINDS = ("binary", "seeded")
SHAPES = [(0, 5, 2), (5, 0, 2), (1, 1, 1), (33, 31, 3), (40, 1, 2), (7, 9, 0), (70, 257, 5)]
SEED, STREAM, STEP = 2**64 - 3, 11, 2


def problem(kind, n, k, by_row=True):
    """(the op with its weight bound: (x, bias) -> y, the weight in float64)."""
    bits = torch.rand(n, k) < 0.5
    scale = torch.rand(n if by_row else 1) + 0.5
    packed = reference.pack_mask(bits)
    if kind == "binary":
        weight = scale.double().unsqueeze(1) * (2.0 * bits - 1)
        return (lambda x, b: ops.binary_linear(x, packed, scale, b)), weight
    key = ls.random.key(SEED, STREAM, STEP)
    signs = ls.random.signs((n, k), SEED, STREAM, STEP)
    weight = scale.double().unsqueeze(1) * signs * bits
    return (lambda x, b: ops.seeded_linear(x, packed, key, scale, b)), weight


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(kind, shape, by_row):
    n, k, batch = shape
    op, weight = problem(kind, n, k, by_row)
    x, bias = torch.randn(batch, k), torch.randn(n)
    for backend in dispatch.available(f"{kind}_linear", "cpu"):
        with ls.use_backend(backend):
            y = op(x, bias)
        expected = x.double() @ weight.mT + bias.double()
        scale = x.double().abs() @ weight.abs().mT + bias.double().abs()
        assert y.dtype == x.dtype
        allowed = of_sum(expected, scale, k + 2, y.dtype)  # a bias and a scale
        assert ((y.double() - expected).abs() <= allowed).all()
    assert op(x.unsqueeze(0), None).shape == (1, batch, n)


@pytest.mark.parametrize("kind", KINDS)
def test_operator_registration(kind):
    weight, _ = problem(kind, 9, 40)
    del weight
    bits, scale = reference.pack_mask(torch.rand(9, 40) < 0.5), torch.rand(1)
    key = (ls.random.key(1, 2, 3),) if kind == "seeded" else ()
    op = getattr(torch.ops.lottery_sparse, f"{kind}_linear").default
    for bias in (None, torch.randn(9)):
        torch.library.opcheck(op, (torch.randn(4, 40), bits, *key, scale, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind):
    op, weight = problem(kind, 9, 40)
    x, bias = torch.randn(3, 4, 40), torch.randn(9)
    close(torch.vmap(lambda a: op(a, bias))(x), op(x, bias))
    with torch.autocast("cpu", torch.bfloat16):
        y = op(x, None)
    assert y.dtype == torch.bfloat16
    close(y.double(), x.double() @ weight.mT, dtype=torch.bfloat16)


BAD = {
    "bits": (lambda: call(bits=torch.zeros(4, 3, dtype=torch.int32)), r"bits must be int32 \[N, 4"),
    "rank": (lambda: call(bits=torch.zeros(4, dtype=torch.int32)), r"bits must be int32 \[N, 4"),
    "key": (lambda: call(key=torch.zeros(2, dtype=torch.int64)), r"key must be int64 \[3\], got"),
    "scale": (lambda: call(scale=torch.ones(3)), "scale must be one floating number"),
    "bias": (lambda: call(bias=torch.ones(3)), r"bias must be floating \[4\]"),
}


def call(**change):
    arguments = {"x": torch.ones(2, 3), "bits": torch.zeros(4, 4, dtype=torch.int32)}
    arguments |= {"key": ls.random.key(0), "scale": torch.ones(1)}
    return ops.seeded_linear(**{**arguments, **change})


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    run, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        run()


# ---- layers ------------------------------------------------------------------------------------


def weight_of(kind, by_row=False):
    signs = ls.random.signs((20, 30), SEED, STREAM, STEP)
    if kind == "seeded":
        signs = signs * (torch.rand(20, 30) < 0.3)
    return signs * (torch.rand(20, 1) + 0.5 if by_row else 0.25)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_holds_its_weight(kind, by_row):
    weight, bias = weight_of(kind, by_row), torch.randn(20)
    key = ls.random.key(SEED, STREAM, STEP) if kind == "seeded" else None
    layer = ls.nn.PackedLinear(weight, bias, format=kind, key=key)
    assert torch.equal(layer.effective_weight, weight)
    x = torch.randn(2, 5, 30)
    close(layer(x), torch.nn.functional.linear(x, weight, bias))
    assert set(layer.state_dict()) == {*FORMATS[kind].names, "bias"}
    other = ls.nn.PackedLinear(torch.randn(20, 30), torch.zeros(20))
    other.load_state_dict(layer.state_dict())
    assert other.format == kind
    assert torch.equal(other(x), layer(x))
    scale, bits = 20 if by_row else 1, 20 * 128  # rows are padded to 128 bits
    assert layer.bytes == bits // 8 + scale * 4 + (24 if kind == "seeded" else 0)


def test_weights_that_a_format_cannot_hold():
    key = ls.random.key(SEED, STREAM, STEP)
    with pytest.raises(ValueError, match='"binary" holds no zeros between weights'):
        ls.nn.PackedLinear(weight_of("seeded"), format="binary")
    with pytest.raises(ValueError, match='"seeded" holds weights of one magnitude'):
        ls.nn.PackedLinear(torch.randn(3, 4), format="seeded", key=key)
    with pytest.raises(ValueError, match=r'"seeded" needs key=ls.random.key.*got None'):
        ls.nn.PackedLinear(weight_of("seeded"), format="seeded")
    with pytest.raises(ValueError, match="key draws other signs than 600 of the weights have"):
        ls.nn.PackedLinear(-weight_of("binary"), format="seeded", key=key)
    state = ls.nn.PackedLinear(weight_of("seeded"), format="seeded", key=key).state_dict()
    state["key"] = state["key"][:2]
    with pytest.raises(RuntimeError, match="mask is no seeded weight of 20 x 30"):
        ls.nn.PackedLinear(torch.randn(20, 30)).load_state_dict(state)
