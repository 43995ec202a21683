"""The fused masked_linear of Triton against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DENSITIES, DTYPES, FROZEN, NETWORKS, check, linear_problem

import lottery_sparse as ls
from lottery_sparse.ops.triton import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (N, K, B): one row, one column, no batch, around a word of 32, a chunk of 128, a tile
SHAPES = [(1, 1, 1), (1, 130, 3), (40, 1, 2), (7, 9, 0), (66, 33, 65)]


def verify(p, note=""):
    p = p.to(DEVICE)
    packed = p.packed
    with ls.use_backend("triton"):
        check(p, p.run(), note)
        check(p, p.run(packed), f"{note}, packed mask")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("networks", NETWORKS)
def test_matches_float64(networks, frozen, dtype):
    verify(linear_problem(33, 65, 17, 0.5, frozen, *NETWORKS[networks], dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_odd_shapes_and_densities(shape, density):
    verify(linear_problem(*shape, density, "tensor"))


# (E, shared, N, K, B): depth in several parts, in the forward, in dx over networks, in dw
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((None, False, 3, 290, 4), torch.float32),
        ((None, False, 2, 1030, 3), torch.bfloat16),
        ((3, True, 96, 20, 4), torch.float32),
        ((2, True, 5, 7, 300), torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", FROZEN)
def test_parts_of_the_depth(shape, dtype, frozen):
    networks, shared, *sizes = shape
    verify(linear_problem(*sizes, 0.5, frozen, networks, shared, dtype))


@pytest.mark.parametrize("batch", [16, 17, 65, 129])
def test_tiles_of_every_size(batch, monkeypatch):
    monkeypatch.setattr(tiles, "MULTIPROCESSORS", 1)  # or dw would take small ones for small grids
    verify(linear_problem(34, 140, batch, 0.5, "tensor", dtype=torch.float16))


def test_the_same_bits_for_a_packed_mask():
    p = linear_problem(40, 300, 20, 0.3, "zero", 3, False)
    p, packed = p.to(DEVICE), p.packed.to(DEVICE)
    with ls.use_backend("triton"):
        first, again = p.run(), p.run(packed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@settings(max_examples=5)
@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 140),
    batch=st.integers(0, 70),
    density=st.floats(0, 1),
    frozen=st.sampled_from(FROZEN),
)
def test_any_shape(rows, columns, batch, density, frozen):
    verify(linear_problem(rows, columns, batch, density, frozen))
