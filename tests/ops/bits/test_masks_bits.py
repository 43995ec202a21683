"""pack_mask and unpack_mask: the layout of the words, frozen by golden values, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import lottery_sparse as ls
from lottery_sparse.ops import dispatch, pack_mask, unpack_mask

AVAILABLE = dispatch.available("pack_mask", "cpu")
backend = pytest.mark.parametrize("backend", AVAILABLE)


def random_mask(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(shape).random(shape) < 0.5)


@backend
def test_golden_words(backend):
    # columns 0, 31, 32, 63, 64, 95, 96, 127, 128 and 130 of 131: both ends of each word
    mask = torch.zeros(131, dtype=torch.bool)
    mask[[0, 31, 32, 63, 64, 95, 96, 127, 128, 130]] = True
    with ls.use_backend(backend):
        bits = pack_mask(mask)
    assert bits.dtype == torch.int32
    assert bits.tolist() == [1 - 2**31] * 4 + [0b101, 0, 0, 0]


@backend
@settings(max_examples=60)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    columns=st.integers(0, 400),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(backend, lead, columns, seed):
    mask = np.random.default_rng(seed).random((*lead, columns)) < 0.5
    with ls.use_backend(backend):
        bits = pack_mask(torch.from_numpy(mask))
        assert bits.shape == (*lead, 4 * -(-columns // 128))
        assert bits.is_contiguous()
        assert torch.equal(unpack_mask(bits, columns), torch.from_numpy(mask))
    spare = [(0, 0)] * len(lead) + [(0, 32 * bits.shape[-1] - columns)]
    expected = np.packbits(np.pad(mask, spare), axis=-1, bitorder="little")  # spare bits are zero
    assert bits.numpy().tobytes() == expected.tobytes()


@backend
def test_any_strides(backend):
    mask = random_mask(33, 70)
    with ls.use_backend(backend):
        assert torch.equal(pack_mask(mask.T), pack_mask(mask.T.contiguous()))
        assert torch.equal(pack_mask(mask[:, ::2]), pack_mask(mask[:, ::2].contiguous()))
        row = pack_mask(mask[:1].expand(5, -1))
        assert torch.equal(row, pack_mask(mask[:1]).expand(5, -1))
        bits = pack_mask(mask)
        apart = bits.repeat_interleave(2, -1)[:, ::2]
        assert torch.equal(unpack_mask(apart, 70), mask)


@backend
def test_spare_bits_are_not_read(backend):
    bits = torch.full((2, 4), -1, dtype=torch.int32)
    with ls.use_backend(backend):
        assert unpack_mask(bits, 3).tolist() == [[True] * 3] * 2


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap(dim):
    masks = random_mask(3, 4, 5)
    got = torch.vmap(pack_mask, dim)(masks)
    assert torch.equal(got, pack_mask(masks.movedim(dim, 0)))
    columns = masks.movedim(dim, 0).shape[-1]
    back = torch.vmap(lambda bits: unpack_mask(bits, columns))(got)
    assert torch.equal(back, masks.movedim(dim, 0))
    nested = torch.vmap(torch.vmap(pack_mask))(masks)
    assert torch.equal(nested, pack_mask(masks))


@pytest.mark.parametrize("shape", [(2, 33), (129,)], ids=str)
def test_opcheck(shape):
    mask = random_mask(*shape)
    opcheck(torch.ops.lottery_sparse.pack_mask.default, (mask,))
    opcheck(torch.ops.lottery_sparse.unpack_mask.default, (pack_mask(mask), shape[-1]))


def test_compiled_equals_eager():
    mask = random_mask(3, 200)

    def there_and_back(mask):
        bits = pack_mask(mask)
        return bits, unpack_mask(bits, mask.shape[-1])

    bits, back = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(mask)
    assert torch.equal(bits, pack_mask(mask))
    assert torch.equal(back, mask)


def test_meta_tensors():
    bits = pack_mask(torch.ones(3, 200, dtype=torch.bool, device="meta"))
    assert bits.shape == (3, 8)
    assert unpack_mask(bits, 200).shape == (3, 200)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(2, 3),
            r"mask must be bool \(True = kept\), got torch\.float32; use mask\.bool",
        ),
        (torch.tensor(True), "mask must have at least one dimension"),
    ],
)
def test_bad_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        pack_mask(mask)


@pytest.mark.parametrize(
    ("bits", "columns", "message"),
    [
        (torch.zeros(2, 4), 3, r"bits must be int32.*got torch\.float32 of shape \(2, 4\)"),
        (torch.tensor(1, dtype=torch.int32), 3, r"at least one dimension.*shape \(\)"),
        (torch.zeros(2, 4).int(), 129, "bits has 4 words a row, but 129 columns need 8"),
        (torch.zeros(2, 8).int(), 128, "bits has 8 words a row, but 128 columns need 4"),
        (torch.zeros(2, 0).int(), -1, "-1 columns need 0"),
    ],
)
def test_bad_bits(bits, columns, message):
    with pytest.raises(ValueError, match=message):
        unpack_mask(bits, columns)
