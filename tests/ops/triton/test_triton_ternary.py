"""Products with ternary codes against float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from problems import DTYPES
from tolerances import of_sum

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops.packed.formats import pack_ternary

kernel = importlib.import_module("lottery_sparse.ops.packed.triton_ternary")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (N, K, B): one of each, around a block of 16 and a tile, no batch, no rows, no columns
SHAPES = [
    (1, 1, 1), (15, 17, 2), (16, 16, 16), (33, 65, 17), (130, 130, 3), (5, 300, 33), (7, 9, 0),
    (0, 5, 3), (3, 0, 2),
]  # fmt: skip


def verify(shape, dtype, by_row=False, bias=True, scale_dtype=torch.float32):
    n, k, batch = shape
    generator = torch.Generator().manual_seed(n + 1000 * k + batch)
    signs = torch.randint(-1, 2, (n, k), generator=generator)
    x = torch.randn(batch, k, generator=generator).to(dtype)
    scale = (torch.rand(n if by_row else 1, generator=generator) + 0.1).to(scale_dtype)
    b = torch.randn(n, generator=generator).to(dtype) if bias else None
    moved = [None if t is None else t.to(DEVICE) for t in (x, pack_ternary(signs), scale, b)]
    with ls.use_backend("triton"):
        y = ops.ternary_linear(*moved[:3], n, moved[3])
    w, add = scale.double().unsqueeze(1) * signs.double(), 0.0 if b is None else b.double()
    expected = x.double() @ w.t() + add
    absolute = x.double().abs() @ w.abs().t() + (add if b is None else add.abs())
    assert (y.shape, y.dtype) == ((batch, n), dtype)
    error = (y.cpu().double() - expected).abs() - of_sum(expected, absolute, k + 1, dtype)
    assert (error <= 0).all(), f"{float(error.max())} too far"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype):
    verify(shape, dtype)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_and_bias(by_row, bias, dtype):
    verify((35, 50, 5), dtype, by_row, bias)


@pytest.mark.parametrize("batch", [32, 64, 65, 129])
def test_tiles_of_every_size(batch):
    verify((40, 200, batch), torch.float16, by_row=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_the_depth(dtype):
    verify((20, 1200, 5), dtype, by_row=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_batch_goes_to_the_library(dtype, bias, monkeypatch):
    """In panels of 128 rows, the last one of 3."""
    monkeypatch.setattr(kernel, "LIBRARY_FROM", 20)
    monkeypatch.setattr(kernel, "PANEL", 1)
    monkeypatch.setattr(kernel, "_fused", lambda *args: pytest.fail("fused"))
    for by_row in (False, True):
        verify((131, 50, 21), dtype, by_row, bias, scale_dtype=dtype)


def test_what_is_behind_the_end_counts_for_nothing():
    """Also where x, the memory behind it, or padding of the last block could hold anything."""
    held = torch.full((3, 40), torch.nan)
    held[:, :21] = 1.0
    codes = pack_ternary(torch.ones(5, 21)).to(DEVICE)
    x = held[:, :21].to(DEVICE)
    with ls.use_backend("triton"):
        y = ops.ternary_linear(x, codes, torch.tensor([0.5], device=DEVICE), 5)
    assert (y.cpu() == 10.5).all()


def test_int8_activations_are_refused():
    codes = pack_ternary(torch.ones(3, 4)).to(DEVICE)
    x, scale = torch.ones(2, 4, device=DEVICE), torch.ones(1, device=DEVICE)
    with ls.use_backend("triton"), pytest.raises(RuntimeError, match="exact activations"):
        ops.ternary_linear(x, codes, scale, 3, activations="int8")
