"""Masks as values: algebra, counts, the table, bits and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lottery_sparse as ls

NAMES = ("0.weight", "fc.weight")


def some_masks(seed: int = 0, shapes=((3, 5), (2, 1, 3, 3))) -> ls.Masks:
    rng = np.random.default_rng(seed)
    return ls.Masks(
        {n: torch.as_tensor(rng.random(s) < 0.5) for n, s in zip(NAMES, shapes, strict=True)}
    )


@pytest.mark.parametrize(
    ("operation", "boolean"),
    [
        (lambda a, b: a & b, np.logical_and),
        (lambda a, b: a | b, np.logical_or),
        (lambda a, b: a ^ b, np.logical_xor),
        (lambda a, b: ~a, lambda a, b: ~a),
    ],
    ids=["and", "or", "xor", "not"],
)
def test_algebra(operation, boolean):
    a, b = some_masks(1), some_masks(2)
    result = operation(a, b)
    assert isinstance(result, ls.Masks)
    assert list(result) == list(NAMES)
    for name in NAMES:
        assert result[name].dtype == torch.bool
        assert (result[name].numpy() == boolean(a[name].numpy(), b[name].numpy())).all()
    assert a == some_masks(1), "operands stay what they were"


def test_counts_density_and_overlap():
    a = ls.Masks({"w": torch.tensor([[1, 1, 0, 0]]), "v": torch.tensor([1, 0])})
    b = ls.Masks({"w": torch.tensor([[1, 0, 1, 0]]), "v": torch.tensor([1, 1])})
    assert (a.kept, a.total, a.density) == (3, 6, 0.5)
    assert a.overlap(b) == 2 / 5
    assert a.overlap(a) == 1.0
    assert a.overlap(~a) == 0.0
    assert (~a & a).overlap(~a & a) == 1.0, "neither keeps any: the same"
    assert ls.Masks({}).density == 1.0
    assert repr(a) == "Masks(2 tensors, 3 of 6 kept)"


def test_equality():
    a = some_masks(1)
    assert a == some_masks(1)
    assert a != some_masks(2)
    assert a != ls.Masks({"0.weight": a["0.weight"]})
    assert a != ls.Masks({n: m.flatten() for n, m in a.items()})
    assert (a == 3) is False
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


def test_table_names_every_tensor_and_the_total():
    masks = ls.Masks({"fc.weight": torch.eye(4), "conv.weight": torch.ones(2, 1, 3, 3)})
    lines = masks.table().splitlines()
    assert [line.split() for line in lines] == [
        ["fc.weight", "4x4", "4", "of", "16", "0.2500"],
        ["conv.weight", "2x1x3x3", "18", "of", "18", "1.0000"],
        ["total", "22", "of", "34", "0.6471"],
    ]
    assert len({len(line) for line in lines}) == 1, "columns line up"
    assert ls.Masks({}).table().split() == ["total", "0", "of", "0", "1.0000"]


def test_bits_by_their_definition():
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 1]])
    bits = ls.Masks({"w": mask}).to_bits()["w"]
    assert bits.dtype == torch.uint8
    assert bits.tolist() == [0b10001001, 0b10]  # entry 8 b + j is bit j of byte b


@given(
    shapes=st.tuples(
        st.lists(st.integers(0, 9), min_size=0, max_size=3), st.lists(st.integers(0, 9), max_size=3)
    ),
    seed=st.integers(0, 99),
)
def test_bits_round_trip(shapes, seed):
    masks = some_masks(seed, shapes)
    assert ls.Masks.from_bits(masks.to_bits(), dict(zip(NAMES, shapes, strict=True))) == masks


def test_bits_of_a_strided_mask():
    mask = torch.rand(6, 4) > 0.5
    there = ls.Masks({"w": mask.T}).to_bits()
    assert torch.equal(ls.Masks.from_bits(there, {"w": (4, 6)})["w"], mask.T)


@pytest.mark.parametrize(
    ("bits", "shapes", "message"),
    [
        ({"w": torch.tensor([1], dtype=torch.uint8)}, {"v": (3,)}, "shapes has no w; it has v"),
        ({"w": torch.tensor([1, 0], dtype=torch.uint8)}, {"w": (3,)}, r"uint8 \[1\] for shape"),
        ({"w": torch.tensor([1])}, {"w": (3,)}, "got torch.int64"),
        ({"w": torch.tensor([8], dtype=torch.uint8)}, {"w": (3,)}, "spare bit set after entry 3"),
    ],
)
def test_bits_that_do_not_fit(bits, shapes, message):
    with pytest.raises(ValueError, match=message):
        ls.Masks.from_bits(bits, shapes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float64])
def test_numbers_that_are_zero_or_one(dtype):
    masks = ls.Masks({"w": torch.eye(3, dtype=dtype)})
    assert masks["w"].dtype == torch.bool
    assert torch.equal(masks["w"], torch.eye(3).bool())


@pytest.mark.parametrize("wrong", [0.5, 2.0, -1.0, float("nan")])
def test_other_numbers_are_refused(wrong):
    mask = torch.ones(2, 2)
    mask[1, 0] = wrong
    with pytest.raises(ValueError, match=f"mask of w must hold only 0 and 1.*got {wrong}"):
        ls.Masks({"w": mask})


@pytest.mark.parametrize(
    ("masks", "message"),
    [([torch.ones(2)], "got list"), ({"w": np.ones(2)}, "mask of w must be a tensor, got ndarray")],
)
def test_other_types_are_refused(masks, message):
    with pytest.raises(TypeError, match=message):
        ls.Masks(masks)


def test_masks_that_do_not_belong_together():
    a = some_masks()
    with pytest.raises(ValueError, match=r"only one of them has: fc\.weight"):
        a & ls.Masks({"0.weight": a["0.weight"]})
    with pytest.raises(ValueError, match=r"masks of 0.weight must have one shape.*\(1, 5\)"):
        a | some_masks(shapes=((1, 5), (2, 1, 3, 3)))  # would broadcast
    with pytest.raises(TypeError, match=r"must be ls\.Masks, got dict"):
        a ^ dict(a)


def test_device():
    assert some_masks().to("meta")["0.weight"].is_meta
