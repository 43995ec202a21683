"""Masks as bits on the GPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops.bits import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(0,), (1,), (31,), (3, 33), (2, 5, 128), (4, 129), (0, 7), (3, 0), (2, 9000), (300, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_bits_of_the_reference(shape, density):
    mask = torch.rand(shape) < density
    expected = reference.pack_mask(mask)
    with ls.use_backend("triton"):
        bits = ops.pack_mask(mask.to(DEVICE))
        back = ops.unpack_mask(expected.to(DEVICE), shape[-1])
    assert torch.equal(bits.cpu(), expected)
    assert bits.dtype == torch.int32
    assert torch.equal(back.cpu(), mask)
    assert back.dtype == torch.bool


def test_views_and_bytes_that_are_not_one():
    mask = torch.rand(50, 7) < 0.5
    turned = mask.to(DEVICE).t()
    odd = (mask.to(torch.uint8) * 128).view(torch.bool).to(DEVICE)
    with ls.use_backend("triton"):
        assert torch.equal(ops.pack_mask(turned).cpu(), reference.pack_mask(mask.t()))
        assert torch.equal(ops.pack_mask(odd).cpu(), reference.pack_mask(mask))
        bits = reference.pack_mask(torch.rand(8, 130) < 0.5).to(DEVICE)
        spread = ops.unpack_mask(bits[::2], 130)
    assert torch.equal(spread.cpu(), reference.unpack_mask(bits[::2].cpu(), 130))
