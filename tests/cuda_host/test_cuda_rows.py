"""float32 x and int8 activations on the CUDA kernels, on the host: rows of x in 16 bits."""

from __future__ import annotations

import ctypes

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator import thread_order  # noqa: F401  # a fixture
from test_cuda_kernels import SHARED_OF, assert_close, ternary, tiles
from tolerances import of_sum

from lottery_sparse.ops.packed import formats, reference
from lottery_sparse.ops.packed.arguments import TernaryArgs


def held(x, int8=False):
    """What a kernel reads instead of x, and its scales."""
    _, _, (made, scale, _) = emulator.linear(x, 1, None, lambda _: 1, int8)
    return made, scale


def test_three_parts_are_the_number():
    x = torch.cat([torch.randn(4, 300) * 10.0**e for e in (-30, -8, 0, 30)])
    x[0, :4] = torch.tensor([torch.finfo(torch.float32).max, -1.0, 0.0, 2.0**-100])
    made, scale = held(x)
    assert scale is None
    parts = made.view(3, *x.shape)
    assert torch.equal(parts.double().sum(0), x.double())
    assert (parts[1:].abs() <= x.abs() * torch.tensor([2.0**-7, 2.0**-15]).view(2, 1, 1)).all()


def test_parts_of_what_is_no_number():
    hidden = ctypes.c_float.from_buffer(ctypes.c_uint32(0x7F800001)).value  # NaN in low bits only
    made, _ = held(torch.tensor([[torch.inf, -torch.inf, torch.nan, hidden]]))
    assert made[0, :2].tolist() == [torch.inf, -torch.inf]
    assert made[0, 2:].isnan().all()
    assert (made[1:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_rows_are_those_of_the_reference(dtype):
    x = torch.randn(5, 700).to(dtype)
    x[1] = 0
    x[2, :3] = torch.tensor([127.0, 2.5, -3.5])  # ties go to even numbers
    x[2, 3:] = 0
    q, scale = held(x, int8=True)
    largest = x.float().abs().amax(1)
    factor = torch.full((5,), 127.0) / largest  # 127 / largest would be 127 times its reciprocal
    expected = (x.float() * torch.where(largest > 1e-36, factor, 0.0).unsqueeze(1)).round()
    assert torch.equal(q.float(), expected)
    assert torch.equal(scale, largest / 127)
    assert q[2, :3].tolist() == [127.0, 2.0, -4.0]
    nan, scale = held(torch.tensor([[1.0, torch.nan], [1.0, torch.inf]]).to(dtype), int8=True)
    assert (nan.float() * scale.unsqueeze(1)).isnan()[[0, 1], [0, 1]].all()


# (N, K, B): 15 rows of parts are two operands, 3 are one; splits; nothing
SHAPES = [(1, 1, 1), (70, 520, 5), (33, 1400, 2), (40, 0, 2), (37, 31, 3)]


@pytest.mark.usefixtures("thread_order")
@pytest.mark.parametrize("kind", ["ternary", "tiles", "bitmap"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_x_is_exact(shape, kind):
    n, k, batch = shape
    x, bias, shared = torch.randn(batch, k), torch.randn(n), SHARED_OF[batch % 3]
    if kind == "ternary":
        codes, scale, weight = ternary(n, k, by_row=batch % 2 == 0)
        y = emulator.ternary_linear(x, codes, scale, bias, n, shared=shared)
    else:
        packed, weight = tiles(n, k, 0.3, torch.bfloat16, kind)
        y = emulator.tiles_linear(kind == "bitmap", x, *packed, bias, n, shared=shared)
    assert y.dtype == torch.float32
    assert_close(y, x, weight.double(), bias)


def test_parts_in_splits():
    codes, scale, weight = ternary(40, 3000)
    x, bias, shared = torch.randn(5, 3000), torch.randn(40), 80 << 10
    assert emulator.library().ls_ternary_splits(15, 3000, shared) > 2
    assert_close(emulator.ternary_linear(x, codes, scale, bias, 40, shared=shared), x, weight, bias)


@pytest.mark.usefixtures("thread_order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 520, 16), (33, 1400, 3), (9, 0, 2)], ids=str)
def test_int8_is_that_of_the_reference(shape, dtype):
    n, k, batch = shape
    codes, scale, _ = ternary(n, k, by_row=True, dtype=torch.float32)
    x, bias = torch.randn(batch, k).to(dtype), torch.randn(n)
    y = emulator.ternary_linear(x, codes, scale, bias, n, True)
    q, row_scale = held(x, int8=True)
    weight = formats.ternary_weight(codes, scale.double(), n, k)
    exact = row_scale.double().unsqueeze(1) * (q.double() @ weight.mT) + bias.double()
    error = (y.double() - exact).abs()
    size = row_scale.double().unsqueeze(1) * (q.double().abs() @ weight.abs().mT) + bias.abs()
    assert (error <= of_sum(exact, size, 3, dtype)).all()  # two scales and a bias
    expected = reference.ternary_linear(TernaryArgs(x, codes, scale, bias, n, int8=True))
    # few x are halfway between whole numbers, and go to either
    assert (y - expected).float().norm() <= 0.01 * expected.float().norm()
