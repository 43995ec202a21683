"""Masks as bits by the CUDA kernels, emulated, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import thread_order  # noqa: F401  # a fixture
from cuda_training import Rim

from lottery_sparse.ops.bits import cuda as kernels
from lottery_sparse.ops.bits import reference

SHAPES = [
    (0,), (1,), (31,), (16,), (3, 33), (2, 5, 128), (4, 129), (0, 7), (3, 0), (2, 9000), (300, 1),
    (9, 48), (3, 1040),
]  # fmt: skip


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(kernels, "_ops", Rim())


@pytest.mark.usefixtures("thread_order")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_bits_of_the_reference(shape, density):
    mask = torch.rand(shape) < density
    expected = reference.pack_mask(mask)
    assert torch.equal(kernels.pack_mask(mask), expected)
    assert torch.equal(kernels.unpack_mask(expected, shape[-1]), mask)


@pytest.mark.parametrize("byte", [1, 2, 128, 255])
@pytest.mark.parametrize("columns", [7, 64])
def test_views_and_bytes_that_are_not_one(byte, columns):
    mask = torch.rand(50, columns) < 0.5
    odd = (mask.to(torch.uint8) * byte).view(torch.bool)
    assert torch.equal(kernels.pack_mask(odd), reference.pack_mask(mask))
    assert torch.equal(kernels.pack_mask(mask.t()), reference.pack_mask(mask.t()))
    bits = reference.pack_mask(mask)
    assert torch.equal(kernels.unpack_mask(bits[::2], columns), mask[::2])


def test_a_mask_that_begins_between_sixteen_bytes():
    mask = (torch.rand(5 * 64 + 3) < 0.5)[3:].view(5, 64)
    assert torch.equal(kernels.pack_mask(mask), reference.pack_mask(mask))
