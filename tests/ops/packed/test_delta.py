"""Weights by row with the distances of their columns: the format, its CUDA kernel on the host."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch
from cuda_emulator import thread_order  # noqa: F401  # a fixture
from test_cuda_kernels import DENSITIES, assert_close

import lottery_sparse as ls
from lottery_sparse.ops.packed import formats


def problem(n, k, density, dtype=torch.float32):
    kept = torch.rand(n, k) < density
    return torch.where(kept, torch.randn(n, k), 0.0).to(dtype), kept


@pytest.mark.parametrize("density", [*DENSITIES, 0.001])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (40, 5000), (3, 70000)], ids=str)
def test_entries_are_what_was_packed(shape, density):
    weight, kept = problem(*shape, density)
    values, starts, gaps = formats.pack_delta(weight, kept)
    columns = formats.delta_columns(starts, gaps).to(torch.int32)
    assert torch.equal(formats.unpack_csr(values, starts, columns, shape[1]), weight)
    assert int(kept.sum()) <= len(values) <= int(kept.sum()) + shape[0] * shape[1] // 255
    inside = torch.repeat_interleave(starts.diff())
    assert (columns.diff()[inside.diff() == 0] > 0).all(), "columns ascend in a row"


@pytest.mark.parametrize("column", [0, 1, 254, 255, 256, 510, 511, 765, 766])
def test_far_entries_have_others_between(column):
    kept = torch.zeros(2, 800, dtype=torch.bool)
    kept[1, [column, column + 1, 799]] = True
    values, starts, gaps = formats.pack_delta(kept.float(), kept)
    between = max(column - 1, 0) // 255 + (799 - column - 2) // 255
    assert starts.tolist() == [0, 0, 3 + between]
    where = formats.delta_columns(starts, gaps)[values != 0]
    assert where.tolist() == [column, column + 1, 799]


def test_bytes_of_a_kept_weight():
    """At 95 to 99% pruned, against 4 bytes of csr with bfloat16 values."""
    for density, most in ((0.05, 3.01), (0.02, 3.05), (0.01, 3.3)):
        weight, kept = problem(256, 8192, density, torch.bfloat16)
        entries = formats.pack_delta(weight, kept)
        assert (entries[0].nbytes + entries[2].nbytes) / int(kept.sum()) <= most


def test_a_layer_holds_its_weight():
    weight, kept = problem(20, 900, 0.01)
    del kept
    layer = ls.nn.PackedLinear(weight, torch.randn(20), format="delta")
    assert torch.equal(layer.effective_weight, weight)
    other = ls.nn.PackedLinear(torch.randn(20, 900), torch.zeros(20))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 900)
    assert other.format == "delta"
    assert torch.equal(other(x), layer(x))
    state = layer.state_dict()
    state["gaps"] = torch.full_like(state["gaps"], 255)
    with pytest.raises(RuntimeError, match="is no delta weight of 20 x 900"):
        layer.load_state_dict(state)


@pytest.mark.usefixtures("thread_order")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (70, 130, 2), (40, 1900, 4), (37, 40, 3), (90, 700, 7)], ids=str
)
def test_delta_linear(shape, density, dtype):
    n, k, batch = shape
    weight, kept = problem(n, k, density, dtype)
    x, bias = torch.randn(batch, k).to(dtype), torch.randn(n)
    y = emulator.csr_linear(x, *formats.pack_delta(weight, kept), bias)
    assert_close(y, x, weight.double(), bias)


def test_rows_beside_an_infinity_are_finite():
    """Entries of neighbouring rows are read too, and those of value 0 lie anywhere."""
    kept = torch.zeros(9, 900, dtype=torch.bool)
    kept[torch.arange(9), 100 * torch.arange(9)] = True
    x = torch.ones(1, 900).bfloat16()
    x[0, [255, 400, 510]] = torch.inf
    y = emulator.csr_linear(x, *formats.pack_delta(kept.bfloat16(), kept), None)
    assert y[0].isinf().tolist() == [i == 4 for i in range(9)]
    assert y[0].isnan().sum() == 0
