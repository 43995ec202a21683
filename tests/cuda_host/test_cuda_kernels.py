"""Whole CUDA kernels on the host, thread by thread, against float64; their index maps."""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from collections import Counter

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator import thread_order  # noqa: F401  # a fixture
from tiles import unpack_bitmap_tiles, unpack_tiles
from tolerances import of_sum

from lottery_sparse.ops.packed import formats


def assert_close(y, x, weight, bias):
    """A float32 sum of exact products, rounded once to the dtype of x."""
    expected, scale = x.double() @ weight.mT, x.double().abs() @ weight.abs().mT
    if bias is not None:
        expected, scale = expected + bias.double(), scale + bias.double().abs()
    error = (y.double() - expected).abs()
    error -= of_sum(expected, scale, x.shape[1] + 2, x.dtype)  # a bias and a scale
    assert (error <= 0).all(), float(error.max())


# ---- ternary -----------------------------------------------------------------------------------


def test_every_weight_of_a_tile_is_one_bit_pair_of_one_lane():
    """The map lane -> word -> bits -> weight is a bijection with the packed format."""
    weight = emulator.library().ls_ternary_weight
    row, column = ctypes.c_int(), ctypes.c_int()
    found = set()
    for lane, word, pair, half in itertools.product(range(32), range(4), range(8), range(2)):
        weight(lane, word, pair, half, ctypes.byref(row), ctypes.byref(column))
        k = column.value % 16
        # ternary_pair moves these bits to the top of this half
        assert 16 * half + 14 - 2 * pair == 8 * (k % 4) + 2 * (k // 4)
        found.add((row.value, column.value))
    assert found == set(itertools.product(range(32), range(64)))


# (N, K, B): around words of 16, tiles of 32 x 64, 8 warps, batches of loads, operands of 8 rows
SHAPES = [
    (1, 1, 1),
    (33, 31, 3),
    (16, 1040, 1),
    (7, 0, 2),
    (70, 520, 8),
    (40, 2100, 9),
    (100, 200, 16),
]


def ternary(n, k, density=0.5, by_row=False, dtype=torch.bfloat16):
    signs = torch.where(torch.rand(n, k) < density, torch.randint(0, 2, (n, k)) * 2 - 1, 0)
    scale = (torch.rand(n if by_row else 1) + 0.5).to(dtype)
    return formats.pack_ternary(signs), scale, scale.double().unsqueeze(1) * signs


@pytest.mark.usefixtures("thread_order")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ternary_linear(shape, dtype):
    n, k, batch = shape
    codes, scale, weight = ternary(n, k, by_row=batch % 2 == 0, dtype=dtype)
    x, bias = torch.randn(batch, k).to(dtype), torch.randn(n).to(dtype)
    assert_close(emulator.ternary_linear(x, codes, scale, bias, n), x, weight, bias)
    y = emulator.ternary_linear(x, codes, scale.float(), None, n, processors=1)
    assert_close(y, x, weight, None)


def test_ternary_splits_add_up_in_a_fixed_order():
    codes, scale, weight = ternary(40, 3000)
    x, bias = torch.randn(12, 3000).bfloat16(), torch.randn(40)
    shared = 80 << 10
    assert emulator.library().ls_ternary_splits(12, 3000, shared) > 2
    y = emulator.ternary_linear(x, codes, scale, bias, 40, shared=shared)
    assert_close(y, x, weight, bias)
    assert torch.equal(
        y, emulator.ternary_linear(x, codes, scale, bias, 40, processors=9, shared=shared)
    )


SHARED_OF = [99 << 10, 163 << 10, 227 << 10]  # bytes of a block on sm_86, sm_80 and sm_90

# ---- tiles -------------------------------------------------------------------------------------

DENSITIES = [0.0, 0.004, 0.05, 0.2, 1.0]


FORMATS = {
    "tiles": (formats.pack_tiles, unpack_tiles),
    "bitmap": (formats.pack_bitmap_tiles, unpack_bitmap_tiles),
}


def tiles(n, k, density, dtype=torch.bfloat16, format="tiles"):
    kept = torch.rand(n, k) < density
    weight = torch.where(kept, torch.randn(n, k), 0.0).to(dtype)
    rows, columns = kept.nonzero().unbind(1)
    return FORMATS[format][0](weight[kept], rows, columns, (n, k)), weight


def test_places_of_a_tile_are_a_bijection_and_those_of_the_kernel():
    grid = torch.arange(64)
    places = formats.tile_places(*torch.meshgrid(grid, grid, indexing="ij"))
    assert torch.equal(places.flatten().sort().values, torch.arange(4096))
    place = emulator.library().ls_tile_place
    for row, column in itertools.product(range(64), range(64)):
        assert place(row, column) == 2 * int(places[row, column])


def test_bits_of_a_bitmap_tile_are_a_bijection_and_those_of_the_kernel():
    bit, order = formats.bitmap_places(torch.arange(4096))
    for places in (bit, order):
        assert torch.equal(places.sort().values, torch.arange(4096))
    found = [emulator.library().ls_bitmap_bit(place) for place in range(4096)]
    assert bit.tolist() == found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (64, 64), (65, 130), (200, 70)], ids=str)
def test_tiles_are_what_was_packed(shape, density, format):
    (starts, data), weight = tiles(*shape, density, format=format)
    assert torch.equal(FORMATS[format][1](starts, data, shape, weight.dtype), weight)
    kept, weights = (weight != 0).sum(), (len(starts) - 1) * 64 * 64
    if format == "tiles":
        assert data.numel() * 8 <= 3.5 * kept + (64 * 3.5 + 96) * (len(starts) - 1)
    else:
        assert data.numel() * 8 <= 2 * kept + weights / 8 + 16 * (len(starts) - 1)


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_entries_of_a_group_rarely_meet_in_a_bank(density):
    """32 lanes write at once; entries in one bank, other than in one word, wait for each other."""
    (_, data), _ = tiles(64, 64, density)
    layout = formats.TileLayout(
        torch.tensor([len(data) // 14 * 4 + max(len(data) % 14 - 2, 0) // 3])
    )
    low = data.flatten()[layout.low].view(torch.uint8).view(-1, 32, 2)
    words = (low.to(torch.int64).mT.reshape(-1, 32) // 2).tolist()
    turns = [max(Counter(w % 32 for w in set(row)).values()) for row in words]
    assert sum(turns) / len(turns) <= {0.05: 2.5, 0.2: 1.8}[density]


@pytest.mark.usefixtures("thread_order")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (70, 130, 3), (60, 1100, 9), (130, 60, 16), (70, 1500, 5)], ids=str
)
def test_tiles_linear(shape, density, format, dtype):
    n, k, batch = shape
    (starts, data), weight = tiles(n, k, density, dtype, format)
    x, bias = torch.randn(batch, k).to(dtype), torch.randn(n)
    shared = SHARED_OF[batch % 3]
    y = emulator.tiles_linear(format == "bitmap", x, starts, data, bias, n, shared=shared)
    assert_close(y, x, weight.double(), bias)


# ---- rows --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("thread_order")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (70, 130, 2), (40, 900, 4), (37, 40, 3), (90, 700, 7)], ids=str
)
def test_csr_linear(shape, density, dtype):
    n, k, batch = shape
    kept = torch.rand(n, k) < density
    weight = torch.where(kept, torch.randn(n, k), 0.0).to(dtype)
    x, bias = torch.randn(batch, k).to(dtype), torch.randn(n)
    y = emulator.csr_linear(x, *formats.pack_csr(weight, kept), bias)
    assert_close(y, x, weight.double(), bias)


def test_rows_beside_an_infinity_are_finite():
    """A lane reads entries of neighbouring rows too, and must not add them."""
    kept = torch.eye(9, dtype=torch.bool)
    x = torch.ones(1, 9).bfloat16()
    x[0, 4] = torch.inf
    y = emulator.csr_linear(x, *formats.pack_csr(kept.bfloat16(), kept), None)
    assert y[0].isinf().tolist() == [i == 4 for i in range(9)]


# ---- drivers -----------------------------------------------------------------------------------


def test_the_rim_of_cuda_needs_no_machine():
    """A C++ compiler without CUDA takes the headers with which the rim calls the kernels."""
    rims = sorted((emulator.ROOT / "csrc").rglob("bindings_cuda*.cpp"))
    names = {
        name for rim in rims for name in re.findall(r'#include "(\w+/\w+\.h)"', rim.read_text())
    }
    lines = [f'#include "{name}"\n' for name in sorted(names) if not name.startswith("rim/")]
    assert len(lines) > 3
    command = [*emulator.compiler().split(), "-std=c++20", "-fsyntax-only", "-Icsrc", "-xc++", "-"]
    done = subprocess.run(
        command, input="".join(lines), cwd=emulator.ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
