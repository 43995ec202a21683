"""Products with kept weights by row against float64."""

from __future__ import annotations

import pytest
import torch
from problems import DENSITIES, DTYPES
from tolerances import of_sum

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops.bits import reference
from lottery_sparse.ops.packed.formats import pack_csr, row_starts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1, 1), (3, 33, 2), (9, 130, 5), (2, 1100, 1), (4, 7, 0), (0, 5, 3), (3, 0, 2)]


def verify(shape, density, dtype, values_dtype=None):
    n, k, batch = shape
    kept = torch.rand(n, k) < density
    x = torch.randn(batch, k).to(dtype)
    w = torch.randn(n, k).to(values_dtype or dtype)
    b = torch.randn(n).to(dtype)
    values, starts, columns = (t.to(DEVICE) for t in pack_csr(w, kept))
    assert torch.equal(starts.cpu(), row_starts(kept))
    bits = reference.pack_mask(kept).to(DEVICE)
    with ls.use_backend("triton"):
        got = (
            ops.csr_linear(x.to(DEVICE), values, starts, columns, b.to(DEVICE)),
            ops.bitmap_linear(x.to(DEVICE), values, starts, bits, b.to(DEVICE)),
        )
    w = torch.where(kept, w.double(), 0.0)
    expected = x.double() @ w.t() + b.double()
    absolute = x.double().abs() @ w.abs().t() + b.double().abs()
    for y in got:
        assert (y.shape, y.dtype) == ((batch, n), dtype)
        error = (y.cpu().double() - expected).abs() - of_sum(expected, absolute, k + 1, dtype)
        assert (error <= 0).all(), f"{float(error.max())} too far"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_matches_float64(shape, density):
    verify(shape, density, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values_dtype", DTYPES, ids=str)
def test_dtypes(dtype, values_dtype):
    verify((9, 70, 4), 0.3, dtype, values_dtype)
