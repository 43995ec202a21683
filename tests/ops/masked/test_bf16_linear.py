"""bfloat16 storage in the sparse linear kernels: float32 sums of what is stored, rounded once."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compact_problems import Arguments
from problems import NETWORKS, check, exact, linear_problem
from tolerances import of_sum
from torch import nn

import lottery_sparse as ls
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists

if not dispatch.built("cpu"):
    pytest.skip("the native kernels (lottery_sparse._C) are not built", allow_module_level=True)
from lottery_sparse.ops.common import cpu as common_cpu
from lottery_sparse.ops.compact.arguments import CompactArgs
from lottery_sparse.ops.masked.arguments import MaskedArgs

pytestmark = pytest.mark.numeric

kernels = torch.ops.lottery_sparse_native
BF16 = torch.bfloat16

# (N, K, B): one row, one column, no batch, odd features, blocks of 8, 16 and 32 features and rows
SHAPES = [
    (1, 1, 1), (1, 130, 3), (40, 1, 2), (7, 9, 0), (5, 31, 33), (17, 33, 65), (66, 32, 64),
    (3, 257, 31), (65, 47, 96),
]  # fmt: skip
DENSITIES = (0.0, 0.03, 0.3, 1.0)

networks = pytest.mark.parametrize("networks", NETWORKS)


def check_rounded(p, got):
    """Half a unit in the last place of the float64 answer, and the rounding of float32 sums."""
    check(p, got)
    assert not got[2][~p.mask].signbit().any()


@networks
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_matches_float64(shape, density, networks):
    p = linear_problem(*shape, density, "zero", *NETWORKS[networks], BF16)
    y = kernels.masked_linear(p.x, p.weight, p.mask, p.bias)
    gradients = kernels.masked_linear_backward(p.dy, p.x, p.weight, p.mask, True, True)
    db = exact(p)[3].bfloat16()  # not this op's
    check_rounded(p, [y, *gradients, db])


@networks
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compact_matches_float64(shape, density, networks):
    p = linear_problem(*shape, density, "zero", *NETWORKS[networks], BF16)
    a = Arguments.of(p)
    y, packed = kernels.compact_linear(p.x, a.values, a.kept.starts, a.kept.columns, p.bias)
    dx, dv, db = kernels.compact_linear_backward(
        p.dy, packed, a.values, *a.kept, networks == "shared x", True, True, True
    )
    check_rounded(p, [y, dx, a.dense(dv), db])
    tiles = kernels.pack_tiles(p.x)
    assert torch.equal(tiles, packed)
    assert torch.equal(tiles, kernels.pack_tiles(p.x.float()))


@networks
@pytest.mark.parametrize("backend", ["cpu", "dense", "reference"])
def test_more_columns_than_sixteen_bits(backend, networks):
    p = linear_problem(2, 2**16 + 3, 3, 0.01, "zero", *NETWORKS[networks], BF16)
    with ls.use_backend(backend):
        check(p, p.run())
        check(p, Arguments.of(p).run())


def test_results_are_those_of_float32_rounded():
    p = linear_problem(33, 70, 40, 0.1, "zero", 3, False, BF16)
    wide = replace(p, **{n: getattr(p, n).float() for n in ("x", "weight", "bias", "dy")})
    with ls.use_backend("cpu"):
        for run in (lambda q: q.run()[:3], lambda q: Arguments.of(q).run()[:3]):
            for half, full in zip(run(p), run(wide), strict=True):
                assert torch.equal(half, full.bfloat16())


def test_the_same_bits_for_any_thread_count():
    p = linear_problem(200, 333, 150, 0.15, "zero", 3, True, BF16)
    a = Arguments.of(p)
    threads = torch.get_num_threads()
    with ls.use_backend("cpu"):
        one = [*p.run(), *a.run()]
        try:
            torch.set_num_threads(3)
            several = [*p.run(), *a.run()]
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(s, t) for s, t in zip(one, several, strict=True))


def test_rounding_keeps_nan_and_infinity_and_ties_go_to_even():
    smallest, most = 2.0**-133, torch.finfo(BF16).max
    x = torch.tensor([[1.0, 1.0]], dtype=BF16)
    pairs = [
        (torch.nan, 1.0), (torch.inf, 1.0), (-torch.inf, 1.0), (torch.inf, -torch.inf),
        (1.0, 2.0**-8), (1 + 2.0**-7, 2.0**-8), (-1.0, -(2.0**-8)), (1.0, -(2.0**-9)),
        (most, most), (-most, -most), (most, 2.0**119), (smallest, 0.0), (-0.0, -0.0),
    ]  # fmt: skip
    weight = torch.tensor(pairs, dtype=BF16)
    expected = weight.float().sum(1, keepdim=True).T.bfloat16()
    got = kernels.masked_linear(x, weight, torch.ones_like(weight, dtype=torch.bool), None)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert got.isnan().sum() == 2
    lists = KeptLists.of(torch.ones_like(weight, dtype=torch.bool))
    compact, _ = kernels.compact_linear(x, weight.flatten(), lists.starts, lists.columns, None)
    torch.testing.assert_close(compact, got, rtol=0, atol=0, equal_nan=True)
    dy = torch.ones(1, len(pairs), dtype=BF16)
    dx, _ = kernels.masked_linear_backward(
        dy, x, weight, torch.ones_like(weight, dtype=torch.bool), True, False
    )
    assert dx[0, 0].isnan()
    assert dx[0, 1] == -torch.inf


def test_gather_and_scatter_copy_bits():
    mask = torch.rand(2, 9, 70) < 0.3
    lists = KeptLists.of(mask)
    dense = torch.randn(2, 9, 70).bfloat16()
    values = kernels.gather_kept(dense, lists.starts, lists.columns)
    back = torch.full_like(dense, 7.0)
    kernels.scatter_kept_(back, values, lists.starts, lists.columns)
    assert torch.equal(back, dense.where(mask, torch.tensor(7.0, dtype=BF16)))
    with pytest.raises(RuntimeError, match="values must be"):
        kernels.scatter_kept_(back, values.float(), lists.starts, lists.columns)
    with pytest.raises(RuntimeError, match="weight must be"):
        kernels.masked_linear(dense[0], dense[0].float(), mask[0], None)


# ---- which calls run here ------------------------------------------------------------------------


def chosen(p, monkeypatch, vectors=True, tiles=False):
    monkeypatch.setattr(common_cpu, "_multiplies_bfloat16", lambda: (vectors, tiles))
    a = Arguments.of(p)
    masked = MaskedArgs(p.x, p.weight, p.mask, p.bias)
    compact = CompactArgs(p.x, a.values, p.bias, a.effective, a.kept, zero=True)
    return [
        dispatch.kernel(op, p.x.device, (args,)).__module__.rpartition(".")[2]
        for op, args in (("masked_linear", masked), ("compact_linear", compact))
    ]


@pytest.mark.parametrize(("batch", "density"), [(64, 0.15), (16, 0.1), (1, 0.04)])
def test_dense_takes_over_above_the_measured_density(batch, density, monkeypatch):
    sparse, dense = ["cpu"] * 2, ["dense"] * 2
    below = linear_problem(100, 100, batch, density, dtype=BF16)
    above = linear_problem(100, 100, batch, 2 * density, dtype=BF16)
    assert chosen(below, monkeypatch) == sparse
    assert chosen(above, monkeypatch) == dense
    assert chosen(below, monkeypatch, tiles=True) == dense
    if batch == 64:  # emulated products are slow
        assert chosen(linear_problem(100, 100, 64, 0.24, dtype=BF16), monkeypatch, False) == sparse


# ---- layers --------------------------------------------------------------------------------------


def layer(density, dtype):
    torch.manual_seed(3)
    model = ls.sparsify_(nn.Sequential(nn.Linear(130, 70)))
    ls.set_masks_(model, {"0.weight": torch.rand(70, 130) < density})
    return ls.compact_(model)[0].to(dtype)


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_a_layer_trains_in_bfloat16(density):
    compact, x = layer(density, BF16), torch.randn(40, 130).bfloat16()
    weight = compact.effective_weight.detach().double()
    bias = compact.bias.detach().double()
    mask = compact.weight_mask
    optimizer = torch.optim.SGD(compact.parameters(), lr=0.05)
    for _ in range(3):
        y = compact(x)
        optimizer.zero_grad()
        (y.float() ** 2).mean().backward()
        dy = 2 * y.detach().double() / y.numel()
        dw, scale = dy.T @ x.double(), dy.abs().T @ x.double().abs()
        product = F.linear(x.double(), weight, bias)
        around = F.linear(x.double().abs(), weight.abs(), bias.abs())
        assert ((y.double() - product).abs() <= of_sum(product, around, 131, BF16)).all()
        got = compact.weight.grad.double()
        # each dy is rounded, too
        assert ((got - dw[mask]).abs() <= of_sum(dw, scale, 40, BF16, 2)[mask]).all()
        before = compact.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(before, compact.weight)
        weight = compact.effective_weight.detach().double()
        assert torch.equal(weight[mask].bfloat16(), compact.weight)
        assert not weight[~mask].any()
        bias = compact.bias.detach().double()


@pytest.mark.parametrize("density", [0.05, 0.2, 0.35, 0.7])
def test_autocast_gives_what_a_bfloat16_layer_gives(density, monkeypatch):
    monkeypatch.setattr(common_cpu, "_multiplies_bfloat16", lambda: (True, False))
    calls = []
    for name in ("compact_linear", "compact_linear_backward"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, k=kernel, n=name: calls.append(n) or k(*a))
    compact, half = layer(density, torch.float32), layer(density, BF16)
    with torch.no_grad():  # the dense weight now lags behind
        compact.weight.add_(0.125)
        half.weight.copy_(compact.weight)
    x, dy = torch.randn(40, 130, requires_grad=True), torch.randn(40, 70).bfloat16()
    with torch.autocast("cpu", BF16):
        y = compact(x)
    y.backward(dy)
    assert calls == (["compact_linear", "compact_linear_backward"] if density < 0.28 else [])
    inputs = x.detach().bfloat16().requires_grad_()
    expected = half(inputs)
    expected.backward(dy)
    assert torch.equal(y, expected)
    for got, want in (
        (x.grad, inputs.grad),
        (compact.weight.grad, half.weight.grad),
        (compact.bias.grad, half.bias.grad),
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, want.float())


@pytest.mark.parametrize("variant", ["portable", "avx2", "avx512"])
def test_every_instruction_set_packs_and_rounds_alike(variant):
    """Tiles and roundings of what needs no sum are the same bits everywhere."""
    code = """
import torch, lottery_sparse._C
ops = torch.ops.lottery_sparse_native
x = torch.arange(65 * 77).view(65, 77).remainder(251).sub(100).div(8).bfloat16()
assert torch.equal(ops.pack_tiles(x), ops.pack_tiles(x.float()))
eye = torch.eye(77, dtype=torch.bool)
third = torch.full((77, 77), 1 / 3).bfloat16()
y = ops.masked_linear(x, third, eye, None)
assert torch.equal(y, (x.float() * third[0, 0].float()).bfloat16())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LS_CPU": variant},
        text=True,
        capture_output=True,
    )
    if "LS_CPU is" in done.stderr:
        pytest.skip(f"this machine does not run {variant}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("columns", [1, 31, 63, 64, 65, 130, 1000])
@pytest.mark.parametrize("density", [0.05, 0.4, 0.9, 1.0])
def test_gathered_entries_are_those_of_the_matrix(columns, density):
    torch.manual_seed(columns)
    mask = torch.rand(7, columns) < density
    lists = KeptLists.of(mask, int(mask.sum()) + 3)
    dense = torch.randn(7, columns, dtype=BF16)
    values = kernels.gather_kept(dense, lists.starts, lists.columns)
    assert torch.equal(values[:-3], dense[mask])
    assert torch.equal(values[-3:], torch.zeros(3, dtype=BF16))
