"""The compact layer's kernels of Triton against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import DTYPES
from tolerances import of_sum

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops.compact import triton as compact_triton
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.compact.triton import sampled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ["single", "networks", "shared x"]

# (N, K, B): one row, one column, no batch, around a word of 32, a chunk of 128, a tile of 64
SHAPES = [(1, 1, 1), (1, 130, 3), (40, 1, 2), (7, 9, 0), (66, 33, 65), (5, 129, 32)]
DENSITIES = [0.0, 0.03, 0.3, 1.0]


def problem(form, n, k, batch, density, dtype, spare):
    """(x, values, lists, dense effective weight with frozen values, dy, mask)."""
    networks = () if form == "single" else (3,)
    mask = torch.rand(*networks, n, k) < density
    lists = KeptLists.of(mask)
    lists = KeptLists.of(mask, lists.columns.shape[-1] + spare)
    effective = torch.randn(mask.shape).to(dtype)
    values = torch.full(lists.columns.shape, torch.nan).to(dtype)  # spare slots are never read
    one = lists.columns.shape[-1]
    each = values.view(-1, one), effective.view(-1, n, k), mask.view(-1, n, k)
    for v, w, m in zip(*each, strict=True):
        v[: int(m.sum())] = w[m]
    x = torch.randn(*(() if form == "shared x" else networks), batch, k).to(dtype)
    dy = torch.randn(*networks, batch, n).to(dtype)
    moved = (t.to(DEVICE) for t in (x, values, effective, dy))
    return *moved, KeptLists(*(t.to(DEVICE) for t in lists)), mask


def close(got, expected, scale, dtype, terms):
    error = (got.cpu().double() - expected).abs() - of_sum(expected, scale, terms, dtype)
    assert (error <= 0).all(), f"{float(error.max())} too far"


def kept_entries(dense, mask, slots):
    """[.., C] of a dense [.., N, K]: entries in row-major order, then zeros."""
    rows = []
    each = (t.view(-1, *t.shape[-2:]) for t in (dense, mask))
    for d, m in zip(*each, strict=True):
        rows.append(torch.cat([d[m], d.new_zeros(slots - int(m.sum()))]))
    return torch.stack(rows).view(*mask.shape[:-2], slots)


def verify(form, shape, density, dtype, spare=3):
    n, k, batch = shape
    x, values, effective, dy, lists, mask = problem(form, n, k, batch, density, dtype, spare)
    x, values = x.requires_grad_(), values.requires_grad_()
    bias = torch.randn(*mask.shape[:-2], n).to(DEVICE, dtype)
    with ls.use_backend("triton"):
        y = ops.compact_linear(x, values, lists, effective, bias)
        dx, dv = torch.autograd.grad(y, (x, values), dy)
    a, w, g = (t.detach().cpu().double() for t in (x, effective, dy))
    b = bias.cpu().double().unsqueeze(-2)
    close(y.detach(), a @ w.mT + b, a.abs() @ w.mT.abs() + b.abs(), dtype, k + 1)
    expected, scale = g @ w, g.abs() @ w.abs()
    shared = form == "shared x"
    close(dx, *(t.sum(0) if shared else t for t in (expected, scale)), dtype, 3 * n)
    slots = values.shape[-1]
    dense, absolute = g.mT @ a, g.mT.abs() @ a.abs()
    wanted, scale = kept_entries(dense, mask, slots), kept_entries(absolute, mask, slots)
    close(dv, wanted, scale, dtype, batch)
    assert dv.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_matches_float64(form, dtype):
    verify(form, (33, 70, 17), 0.2, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_odd_shapes_and_densities(shape, density):
    verify("single", shape, density, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_entries_in_a_tile_than_one_pass_takes_and_more_parts_than_one(dtype):
    mask = torch.rand(9, 70) < 0.9
    lists = KeptLists.of(mask, 9 * 70)
    dy, x = torch.randn(700, 9).to(dtype), torch.randn(700, 70).to(dtype)
    values = torch.empty(9 * 70, dtype=dtype)
    args = (t.to(DEVICE) for t in (dy, x, values, lists.starts, lists.columns))
    dv = sampled(*args)
    dense = dy.double().mT @ x.double()
    scale = dy.double().mT.abs() @ x.double().abs()
    close(dv, kept_entries(dense, mask, 630), kept_entries(scale, mask, 630), dtype, 700)


def test_numbers_beyond_sixteen_bits():
    mask = torch.zeros(2, 2**16 + 3, dtype=torch.bool)
    mask[0, 7] = mask[1, [0, 2**15 + 1, 2**16 + 1]] = True
    for m in (mask, mask[:, 3:]):
        lists, x, dy = KeptLists.of(m), torch.randn(2, m.shape[1]), torch.randn(2, 2)
        dense = (dy.mT @ x).to(DEVICE)
        got = compact_triton.gather_kept(dense, lists.starts.to(DEVICE), lists.columns.to(DEVICE))
        torch.testing.assert_close(got.cpu(), dense.cpu()[m])


@pytest.mark.parametrize("networks", [None, 3])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gather_and_scatter(networks, density, dtype):
    mask = torch.rand(*(() if networks is None else (networks,)), 6, 75) < density
    slots = KeptLists.of(mask).columns.shape[-1] + 2
    lists = KeptLists.of(mask, slots)
    starts, columns = lists.starts.to(DEVICE), lists.columns.to(DEVICE)
    dense = torch.randn(mask.shape).to(DEVICE, dtype)
    values = compact_triton.gather_kept(dense, starts, columns)
    assert torch.equal(values.cpu(), kept_entries(dense.cpu(), mask, slots))
    target = torch.full(mask.shape, 5.0).to(DEVICE, dtype)
    compact_triton.scatter_kept_(target, values.float(), starts, columns)
    assert torch.equal(target.cpu(), torch.where(mask, dense.cpu(), 5.0))


def test_the_weight_of_a_convolution_in_either_layout():
    mask = torch.rand(5, 2, 3, 3) < 0.4
    lists = KeptLists.of(mask.flatten(1))
    starts, columns = lists.starts.to(DEVICE), lists.columns.to(DEVICE)
    for layout in (torch.contiguous_format, torch.channels_last):
        dense = torch.randn(mask.shape).to(DEVICE, memory_format=layout)
        values = compact_triton.gather_kept(dense, starts, columns)
        assert torch.equal(values.cpu(), dense.cpu()[mask])
        target = torch.full_like(dense, 5.0)
        compact_triton.scatter_kept_(target, values, starts, columns)
        assert torch.equal(target.cpu(), torch.where(mask, dense.cpu(), 5.0))


def test_a_layer_with_another_mask():
    torch.manual_seed(0)
    masked = ls.nn.MaskedLinear(40, 6).to(DEVICE)
    ls.set_masks_(masked, {"weight": torch.rand(6, 40) < 0.4})
    layer = ls.compact_(copy.deepcopy(masked), spare=5)
    for mask in (None, torch.rand(6, 40) < 0.3):
        if mask is not None:
            ls.set_masks_(layer, {"weight": mask})
            ls.set_masks_(masked, {"weight": mask})
            masked.weight.data.copy_(layer.effective_weight)
        x = torch.randn(3, 40, device=DEVICE)
        layer.weight.grad = masked.weight.grad = None
        with ls.use_backend("triton"):
            y = layer(x)
            y.square().sum().backward()
            layer.refresh_()
        expected = masked(x)
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected)
        kept = masked.weight.grad[masked.weight_mask]
        torch.testing.assert_close(layer.weight.grad[: len(kept)], kept)
        assert (layer.weight.grad[len(kept) :] == 0).all()
