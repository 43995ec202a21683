"""Counter-based draws on the GPU: the bits of the reference."""

from __future__ import annotations

import pytest
import torch

from lottery_sparse.ops.random import reference, triton
from lottery_sparse.ops.random.op import _normal_table, _truncated_normal_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTS = [0, 1, 3, 4, 31, 33, 1023, 1025, 3000]
# (seed, stream, step): small ones, all bits set, the sign bits of each
KEYS = [(0, 0, 0), (1, 1, 1), (-1, 2**32 - 1, 2**32 - 1), (-(2**63), 2**31, 2**31), (2**40, 7, 9)]


def same(law, *args):
    got = getattr(triton, law)(*args, DEVICE)
    expected = getattr(reference, law)(*args)
    assert got.dtype == expected.dtype
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("law", ["random_words", "random_signs", "random_uniform"])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_the_bits_of_the_reference(law, key):
    for count in COUNTS if key == KEYS[0] else COUNTS[-2:]:
        same(law, count, *key)


@pytest.mark.parametrize("table", [_normal_table(), _truncated_normal_table()], ids=["", "trunc"])
def test_normal(table):
    for count in COUNTS:
        same("random_normal", count, 5, 6, 7, table)
    for key in KEYS:
        same("random_normal", 1025, *key, table)
