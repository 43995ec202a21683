"""Whole CUDA kernels on the host, thread by thread, against float64; their index maps."""

from __future__ import annotations

import ctypes

import cuda_emulator as emulator
import pytest
import torch

from lottery_sparse import formats

EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_close(y, x, weight, bias):
    """A float32 sum of exact products, rounded once to the dtype of x."""
    expected, scale = x.double() @ weight.mT, x.double().abs() @ weight.abs().mT
    if bias is not None:
        expected, scale = expected + bias.double(), scale + bias.double().abs()
    error = (y.double() - expected).abs() - 1e-6 * scale
    assert (error <= EPSILON[x.dtype] * expected.abs() + 1e-7).all(), float(error.max())


# ---- ternary -----------------------------------------------------------------------------------


def test_every_weight_of_a_tile_is_one_bit_pair_of_one_lane():
    """The map lane -> word -> weight is a bijection with the packed format."""
    signs = torch.arange(32 * 64).reshape(32, 64)
    found = torch.zeros(32, 64, dtype=torch.int64)
    row, column = ctypes.c_int(), ctypes.c_int()
    for lane in range(32):
        for word in range(4):
            for pair in range(8):
                for half in range(2):
                    emulator.library().ls_ternary_weight(
                        lane, word, pair, half, ctypes.byref(row), ctypes.byref(column)
                    )
                    # the bits that ternary_pair moves to the top of this half
                    shift = 14 + 16 * half - 2 * pair
                    n, k = row.value, column.value
                    slot = 4 * (k % 16 // 4 - 0) // 4 * 2 + 8 * (k % 4)
                    assert shift == slot, (lane, word, pair, half)
                    found[n, k] += 1
    assert (found == 1).all()
    assert signs.numel() == found.numel()


# (N, K, B): around words of 16, tiles of 32 x 64, 8 warps, batches of loads, operands of 8 rows
SHAPES = [
    (1, 1, 1),
    (33, 31, 3),
    (16, 1040, 1),
    (7, 0, 2),
    (70, 520, 8),
    (40, 2100, 9),
    (100, 200, 16),
]


def ternary(n, k, density=0.5, by_row=False, dtype=torch.bfloat16):
    signs = torch.where(torch.rand(n, k) < density, torch.randint(0, 2, (n, k)) * 2 - 1, 0)
    scale = (torch.rand(n if by_row else 1) + 0.5).to(dtype)
    return formats.pack_ternary(signs), scale, scale.double().unsqueeze(1) * signs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ternary_linear(shape, dtype):
    n, k, batch = shape
    codes, scale, weight = ternary(n, k, by_row=batch % 2 == 0, dtype=dtype)
    x, bias = torch.randn(batch, k).to(dtype), torch.randn(n).to(dtype)
    assert_close(emulator.ternary_linear(x, codes, scale, bias, n), x, weight, bias)
    y = emulator.ternary_linear(x, codes, scale.float(), None, n, processors=1)
    assert_close(y, x, weight, None)
