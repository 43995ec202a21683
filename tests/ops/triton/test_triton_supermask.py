"""The Triton kernels of learned masks: the bits of the reference, and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPES, NETWORKS
from supermask_problems import WEIGHTS, check, supermask_problem

import lottery_sparse as ls
from lottery_sparse.ops.bits import reference as bits_reference
from lottery_sparse.ops.random import reference as random_reference
from lottery_sparse.ops.supermask import reference as supermask_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (N, K): one row, one column, around a word of 32, a chunk of 128, and a program's 128 words;
# rows that are whole blocks of four, and not
MASKS = [(1, 1), (3, 4), (40, 1), (7, 33), (2, 132), (3, 257), (65, 64), (0, 5), (4, 0)]
# (N, K), B: no batch, one, around a tile
SHAPES = [((1, 1), 1), ((1, 130), 3), ((40, 1), 2), ((7, 9), 0), ((129, 65), 33), ((3, 257), 65)]


def sampled(score, key):
    with ls.use_backend("triton"):
        bits, kept = ls.ops.sample_bits(score.to(DEVICE), key.to(DEVICE))
    return bits.cpu(), kept.cpu()


def verify(p, note=""):
    p = p.to(DEVICE)
    with ls.use_backend("triton"):
        got = p.run()
    check(p, got, note)


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_bits_are_those_of_the_reference(shape):
    for dtype in DTYPES if shape == (3, 257) else DTYPES[:1]:
        score = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
        for seed, stream, step in [(2**64 - 1, 2**32 - 1, 2**32 - 1), (5, 6, 7)]:
            key = ls.random.key(seed, stream, step)
            bits, kept = sampled(score, key)
            expected = supermask_reference.sample_bits(score, key)
            assert torch.equal(bits, expected[0])
            assert torch.equal(kept, expected[1])


def test_a_key_for_each_network():
    score = torch.randn(3, 5, 36)
    keys = torch.stack([ls.random.key(-e, e, 1 - e % 2) for e in range(3)])
    bits, kept = sampled(score, keys)
    expected = supermask_reference.sample_bits(score, keys)
    assert torch.equal(bits, expected[0])
    assert torch.equal(kept, expected[1])


@pytest.mark.parametrize("columns", [40, 39])
def test_the_boundary_is_exact(columns):
    shape, key = (50, columns), ls.random.key(5, 6, 7)
    draws = (random_reference.random_words(50 * columns, 5, 6, 7).to(torch.int64) >> 8) & 0xFFFFFF
    low = (draws < 2**20).view(shape)  # there a float32 score resolves halves of 2^-24
    for beyond, expected in [(-0.5, False), (0.5, False), (1.5, True)]:  # floor(p 2^24) - draw
        score = torch.logit((draws.double() + beyond) * 2.0**-24).float().view(shape)
        bits, _ = sampled(score, key)
        mask = bits_reference.unpack_mask(bits, columns)
        assert torch.equal(mask, supermask_reference.sample_mask(score, key) != 0)
        assert (mask[low] == expected).all()
    assert low.sum() > 50


@pytest.mark.parametrize("columns", [4, 5])
def test_extreme_scores(columns):
    inf = float("inf")
    score = torch.tensor([inf, -inf, float("nan"), 110.0, -110.0])[:columns].repeat(20, 1)
    bits, _ = sampled(score, ls.random.key(1))
    mask = bits_reference.unpack_mask(bits, columns)
    assert mask.unique(dim=0).tolist() == [[True, False, False, True, False][:columns]]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("networks", NETWORKS)
def test_matches_float64(networks, weight):
    for dtype in DTYPES:
        for rescale in (False, True) if dtype == torch.float32 else (True,):
            args = weight, rescale, *NETWORKS[networks], dtype
            verify(supermask_problem((33, 68), (17, 68), *args), f"in {dtype}")


CONV = (4, 3, 3, 2), (2, 6, 7, 5)
GEOMETRY = {"stride": (3, 2), "padding": (1, 0), "groups": 2}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("networks", NETWORKS)
def test_convolutions_match_float64(networks, weight):
    for dtype in DTYPES:
        for rescale in (False, True):
            args = weight, rescale, *NETWORKS[networks], dtype
            verify(supermask_problem(*CONV, *args, **GEOMETRY), f"in {dtype}")


def test_more_weights_than_a_program_sums():
    verify(supermask_problem((90, 90, 3, 3), (1, 90, 2, 2), padding=1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", [-40.0, -3.0, 40.0])
def test_odd_shapes_and_densities(shape, level):
    (rows, columns), batch = shape
    verify(supermask_problem((rows, columns), (batch, columns), level=level))


@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (0, 3)], ids=str)
def test_only_some_inputs_want_gradients(wanted):
    for p in supermask_problem((9, 37), (5, 37)), supermask_problem(*CONV, **GEOMETRY):
        p, op = p.to(DEVICE), ls.ops.supermask_conv2d if p.options else ls.ops.supermask_linear
        with ls.use_backend("triton"):
            every = p.run()[1:]
            tensors = (p.x, p.score, p.bias, p.weight)
            inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
            y = op(inputs[0], inputs[1], inputs[3], p.key, rescale=True, **p.options)
            got = torch.autograd.grad(y, [inputs[i] for i in wanted], p.dy)
        for a, i in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, every[i])


@settings(max_examples=6)
@given(
    rows=st.integers(0, 140),
    columns=st.integers(0, 140),
    batch=st.integers(0, 70),
    weight=st.sampled_from(WEIGHTS),
    rescale=st.booleans(),
)
def test_any_shape(rows, columns, batch, weight, rescale):
    verify(supermask_problem((rows, columns), (batch, columns), weight, rescale))
