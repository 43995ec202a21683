"""More than 2^31 elements, on GPUs that hold them; interpreted, the arithmetic at smaller sizes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops.bits import reference
from lottery_sparse.ops.triton.tiles import finish

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def needs_gigabytes(number):
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return pytest.mark.skipif(free < number << 30, reason=f"needs {number} GB of a GPU")


def only_on_a_gpu(test):
    """Not a skipped test: in the interpreter none may be skipped."""
    return test if torch.cuda.is_available() else None


@only_on_a_gpu
@needs_gigabytes(20)
def test_masks_of_more_than_32_bits_of_elements():
    mask = torch.zeros(2**16 + 1, 2**15 + 3, dtype=torch.bool, device="cuda")
    mask[-1, ::3] = True
    mask[0, 1::2] = True
    with ls.use_backend("triton"):
        bits = ops.pack_mask(mask)
        assert torch.equal(ops.unpack_mask(bits, mask.shape[1]), mask)
    assert torch.equal(bits[[0, -1]], reference.pack_mask(mask[[0, -1]]))
    assert not bits[1:-1].any()


@only_on_a_gpu
@needs_gigabytes(30)
def test_a_product_of_more_than_32_bits_of_elements():
    x = torch.zeros(2**21 + 5, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1], x[0] = 1.0, 0.5
    weight = torch.randn(1024, 1024, dtype=torch.bfloat16, device="cuda")
    mask = weight > 0
    with ls.use_backend("triton"):
        y = ops.masked_linear(x, weight, mask)
    expected = torch.where(mask, weight, 0).double().sum(1)
    torch.testing.assert_close(y[-1].double(), expected, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(y[0].double(), expected / 2, rtol=2**-7, atol=1e-2)
    assert not y[1:-1].any()


@triton.jit
def _first(out, total, BLOCK: tl.constexpr):
    tl.store(out, (tl.program_id(0) + 7000000 + 0 * total) * BLOCK)


@pytest.mark.parametrize("total", [2**33, 2**32 + 1])
def test_a_number_takes_the_width_of_what_it_counts_to(total):
    """As `tiles.finish` counts: 32 bits hold neither."""
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _first[(1,)](out, total, BLOCK=1024)
    assert out.item() == 7000000 * 1024


def test_parts_are_added_whatever_their_size():
    parts = torch.randn(3, 1, 1, device=DEVICE)  # a total of 1, which Triton compiles in
    out = torch.empty(1, 1, device=DEVICE)
    finish(parts, None, out)
    torch.testing.assert_close(out, parts.sum(0), rtol=1e-6, atol=1e-6)
