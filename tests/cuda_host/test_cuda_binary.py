"""binary_linear and seeded_linear as CUDA kernels on the host, against float64; their index map."""

from __future__ import annotations

import ctypes
import itertools

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator import thread_order  # noqa: F401  # a fixture
from test_cuda_kernels import SHARED_OF, assert_close

import lottery_sparse as ls
from lottery_sparse.ops.bits import reference

# (N, K, B): around words of 32, pieces of 128, steps of 32 x 512, 8 warps, operands of 8 rows
SHAPES = [
    (1, 1, 1),
    (33, 31, 3),
    (7, 0, 2),
    (40, 128, 1),
    (70, 640, 8),
    (37, 5000, 9),
    (35, 4608, 2),
    (64, 208, 16),
]


def test_every_weight_of_a_step_is_one_bit_of_one_lane():
    """The map lane -> load -> word -> pair -> weight is a bijection with rows of bits."""
    weight, pair = emulator.library().ls_binary_weight, emulator.library().ls_binary_pair
    row, column = ctypes.c_int(), ctypes.c_int()
    found = set()
    places = [range(32), range(4), range(4), range(16), range(2)]
    for lane, load, word, i, half in itertools.product(*places):
        weight(lane, load, word, i, half, ctypes.byref(row), ctypes.byref(column))
        found.add((row.value, column.value))
    assert found == set(itertools.product(range(32), range(512)))

    # the 16 pairs of a word: bit 15 - i + 16 h decides half h of pair i, and no other does
    for i, half in itertools.product(range(16), range(2)):
        bit, other = 1 << 15 - i + 16 * half, 1 << 15 - i + 16 * (1 - half)
        for rest in (0, 0xFFFFFFFF & ~bit & ~other):
            numbers = [pair(False, rest | value, 0, i) >> 16 * half & 0xFFFF for value in (0, bit)]
            assert numbers == ([0xBC00, 0x3C00] if i % 2 == 0 else [0, 0x4000])
            kept = [pair(True, rest | bit, rest | value, i) >> 16 * half for value in (0, bit)]
            assert [number & 0xFFFF for number in kept] == [0xC000, 0x4000]
            assert pair(True, rest, rest | bit, i) >> 16 * half & 0x7FFF == 0


def problem(kind, n, k, dtype, seed=2**63 + 5, stream=2**31 + 7):
    """(bits, key, scale, the weight in float64)."""
    plus = torch.rand(n, k) < 0.5
    scale = (torch.rand(n if n % 2 else 1) + 0.5).to(dtype)
    if kind == "binary":
        return reference.pack_mask(plus), None, scale, scale.double()[:, None] * (2.0 * plus - 1)
    key = ls.random.key(seed, stream, 3)
    signs = ls.random.signs((n, k), seed, stream, 3).double()
    return reference.pack_mask(plus), key, scale, scale.double()[:, None] * signs * plus


@pytest.mark.usefixtures("thread_order")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["binary", "seeded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, kind, dtype):
    n, k, batch = shape
    bits, key, scale, weight = problem(kind, n, k, dtype)
    x, bias = torch.randn(batch, k).to(dtype), torch.randn(n).to(dtype)
    shared = SHARED_OF[batch % 3]
    y = emulator.binary_linear(x, bits, key, scale, bias, shared=shared)
    assert_close(y, x, weight, bias)


@pytest.mark.parametrize("kind", ["binary", "seeded"])
def test_splits_add_up_in_a_fixed_order(kind):
    bits, key, scale, weight = problem(kind, 40, 3072, torch.bfloat16)
    x, bias = torch.randn(12, 3072).bfloat16(), torch.randn(40)
    shared = 90 << 10
    assert emulator.library().ls_binary_splits(12, 3072, shared) > 2
    y = emulator.binary_linear(x, bits, key, scale, bias, shared=shared)
    assert_close(y, x, weight, bias)
    again = emulator.binary_linear(x, bits, key, scale, bias, processors=9, shared=shared)
    assert torch.equal(y, again)
