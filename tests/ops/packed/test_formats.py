"""Packed layouts: round trips, and known words."""

from __future__ import annotations

import pytest
import torch

from lottery_sparse.ops.bits import reference
from lottery_sparse.ops.packed import formats

SHAPES = [(0, 5), (5, 0), (1, 1), (1, 17), (16, 16), (17, 1), (31, 33), (33, 31), (40, 130)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ternary_round_trip(shape):
    signs = torch.randint(-1, 2, shape)
    codes = formats.pack_ternary(signs)
    assert codes.shape == (-(-shape[0] // 16), -(-shape[1] // 16), 16)
    assert torch.equal(formats.unpack_ternary(codes, *shape).long(), signs)


def test_ternary_words_bit_by_bit():
    """Column 16 w + 4 j + b of row r of a block is at bits 8 b + 2 j of word [w, r]."""
    signs = torch.randint(-1, 2, (35, 50))
    codes = formats.pack_ternary(signs).tolist()
    for row in range(48):
        for column in range(64):
            j, b = column % 16 // 4, column % 4
            code = codes[row // 16][column // 16][row % 16] >> (8 * b + 2 * j) & 3
            inside = row < 35 and column < 50
            assert code == (int(signs[row, column]) + 1 if inside else 1)


def test_ternary_weight_has_its_scale_by_row():
    signs, scale = torch.randint(-1, 2, (5, 7)), torch.rand(5)
    codes = formats.pack_ternary(signs)
    assert torch.equal(formats.ternary_weight(codes, scale, 5, 7), scale[:, None] * signs)
    assert torch.equal(formats.ternary_weight(codes, scale[:1], 5, 7), scale[0] * signs)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kept_weights_round_trip(shape, density):
    kept = torch.rand(shape) < density
    weight = torch.where(kept, torch.randn(shape), 0.0)
    values, starts, columns = formats.pack_csr(weight, kept)
    assert columns.dtype == torch.int16
    assert torch.equal(starts.diff(), kept.sum(1))
    assert torch.equal(formats.unpack_csr(values, starts, columns, shape[1]), weight)
    bits = reference.pack_mask(kept)
    assert torch.equal(formats.row_starts(kept), starts)
    mask = reference.unpack_mask(bits, shape[1])
    assert torch.equal(formats.unpack_bitmap(values, mask), weight)


@pytest.mark.parametrize(("columns", "dtype"), [(2**16, torch.int16), (2**16 + 1, torch.int32)])
def test_columns_of_sixteen_bits_where_they_fit(columns, dtype):
    kept = torch.zeros(2, columns, dtype=torch.bool)
    kept[1, -1] = kept[1, 40000] = True
    weight = torch.randn(2, columns)
    packed = formats.pack_csr(weight, kept)
    assert packed[2].dtype == dtype
    assert torch.equal(formats.unpack_csr(*packed, columns), torch.where(kept, weight, 0.0))
