"""The fused masked_linear of Triton against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DENSITIES, DTYPES, FROZEN, NETWORKS, check, linear_problem

import lottery_sparse as ls

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (N, K, B): one row, one column, no batch, around a word of 32, a chunk of 128, a tile
SHAPES = [(1, 1, 1), (1, 130, 3), (40, 1, 2), (7, 9, 0), (129, 65, 33), (3, 257, 65)]


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


@settings(max_examples=8)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 140),
    batch=st.integers(0, 70),
    density=st.floats(0, 1),
    frozen=st.sampled_from(FROZEN),
)
def test_any_shape(rows, columns, batch, density, frozen):
    verify(linear_problem(rows, columns, batch, density, frozen))
