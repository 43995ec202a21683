"""The CUDA kernels of compact layers, emulated, against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import thread_order  # noqa: F401  # a fixture
from cuda_training import Rim
from problems import DTYPES, products
from tolerances import close, of_sum

from lottery_sparse.ops.compact import cuda as kernels
from lottery_sparse.ops.compact.arguments import CompactArgs
from lottery_sparse.ops.compact.kept import KeptLists

FORMS = ["single", "networks", "shared x"]
SMALL = 20 << 10  # bytes of shared memory that hold 58 columns of x, twice


@pytest.fixture(autouse=True)
def rim(monkeypatch):
    def use(**device):
        monkeypatch.setattr(kernels, "_ops", Rim(**device))

    use()
    return use


def problem(form, n, k, batch, density, dtype, spare=3):
    """(x, values, lists, weight, dy, mask); spare slots hold NaN."""
    networks = () if form == "single" else (2,)
    mask = torch.rand(*networks, n, k) < density
    lists = KeptLists.of(mask)
    lists = KeptLists.of(mask, lists.columns.shape[-1] + spare)
    weight = torch.where(mask, torch.randn(mask.shape), 0.0).to(dtype)
    values = torch.full(lists.columns.shape, torch.nan).to(dtype)
    each = (t if networks else t[None] for t in (values, weight, mask))
    for v, w, m in zip(*each, strict=True):
        v[: int(m.sum())] = w[m]
    x = torch.randn(*(() if form == "shared x" else networks), batch, k).to(dtype)
    dy = torch.randn(*networks, batch, n).to(dtype)
    return x, values, lists, weight, dy, mask


def check(got, expected, scale, terms):
    assert got.shape == expected.shape
    error = (got.double() - expected).abs() - of_sum(expected, scale, terms, got.dtype)
    assert (error <= 0).all(), f"{float(error.max())} too far"


def entries(dense, mask, slots):
    """[.., C] of a dense [.., N, K]: kept entries in row-major order, then zeros."""
    each = (t if mask.dim() == 3 else t[None] for t in (dense, mask))
    rows = [
        torch.cat([d[m], d.new_zeros(slots - int(m.sum()))]) for d, m in zip(*each, strict=True)
    ]
    return torch.stack(rows).view(*mask.shape[:-2], slots)


def verify(x, values, lists, weight, dy, mask, carry=True):
    bias = torch.randn(*mask.shape[:-1]).to(x.dtype)
    terms = products(mask.shape, x, dy, {})
    a, w, g, b = (t.double() for t in (x, weight, dy, bias.unsqueeze(-2)))
    args = CompactArgs(x, values, bias, weight, lists, zero=True)
    y, packed = kernels.compact_linear(args)
    check(y, a @ w.mT + b, a.abs() @ w.mT.abs() + b.abs(), terms["y"])
    carried = packed if carry else None
    dx, dv = kernels.compact_linear_backward(args, dy, True, True, carried)
    shared = x.dim() < dy.dim()
    results = g @ w, g.abs() @ w.abs()
    check(dx, *(t.sum(0) if shared else t for t in results), terms["dx"])
    slots = values.shape[-1]
    results = g.mT @ a, g.mT.abs() @ a.abs()
    check(dv, *(entries(t, mask, slots) for t in results), terms["dw"])
    return y, dx, dv


DENSITIES = pytest.mark.parametrize("density", [0.2, 0.03], ids=["from chunks", "directly"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@DENSITIES
def test_matches_float64(form, density, dtype):
    verify(*problem(form, 17, 40, 33, density, dtype))


@pytest.mark.usefixtures("thread_order")
@DENSITIES
def test_no_barrier_is_missing(density):
    verify(*problem("single", 33, 50, 37, density, torch.float32))


# (N, K, B): ones, none, around panels of 32 and 64, groups of 16 rows, windows of 32 entries
SHAPES = [(1, 1, 1), (1, 130, 3), (40, 1, 2), (7, 9, 0), (0, 5, 2), (5, 0, 2), (17, 33, 65)]


@pytest.mark.parametrize("density", [0.0, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes_and_densities(shape, density):
    verify(*problem("single", *shape, density, torch.float32), carry=False)


@pytest.mark.usefixtures("thread_order")
@pytest.mark.parametrize(
    ("processors", "dtype"), [(1, torch.float32), (2, torch.float16), (60, torch.float32)], ids=str
)
def test_chunks_of_columns_and_rows_of_a_warp(processors, dtype, rim):
    """The largest number of rows of a warp, some, and one; a chunk of three has no entries."""
    x, _, _, _, dy, mask = problem("single", 100, 130, 3, 0.0, dtype)
    mask = torch.rand(mask.shape) < 0.1
    mask[:, 40:90] = False
    mask[:3] = True
    lists, weight = KeptLists.of(mask), torch.where(mask, torch.randn(mask.shape), 0).to(dtype)
    rim(processors=processors, shared=SMALL)
    verify(x, weight[mask], lists, weight, dy, mask)


def test_runs_give_the_same_bits():
    x, values, lists, weight, dy, _ = problem("single", 20, 40, 70, 0.3, torch.float32)
    a = CompactArgs(x, values, None, weight, lists, zero=True)
    y, packed = kernels.compact_linear(a)
    assert torch.equal(kernels.compact_linear(a)[0], y)
    once, again = (kernels.compact_linear_backward(a, dy, True, True, c) for c in (packed, None))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("width", [2**16 + 3, 2**16])
def test_numbers_beyond_sixteen_bits(width):
    """Columns as int32, and beyond 2^15 as uint16; the same for row numbers."""
    mask = torch.zeros(2, width, dtype=torch.bool)
    mask[0, 7] = mask[1, [0, 2**15 + 1, width - 2]] = True
    lists, weight = KeptLists.of(mask), torch.where(mask, torch.randn(mask.shape), 0)
    assert lists.columns.dtype == (torch.int32 if width > 2**16 else torch.int16)
    x, dy = torch.randn(2, width), torch.randn(2, 2)
    a = CompactArgs(x, weight[mask], None, weight, lists, zero=True)
    y, packed = kernels.compact_linear(a)
    close(y, x @ weight.T)
    _, dv = kernels.compact_linear_backward(a, dy, False, True, packed)
    close(dv, (dy.T @ x)[mask])
    mask, weight = mask.T, weight.T.contiguous()
    lists = KeptLists.of(mask)
    a = CompactArgs(dy, weight[mask], None, weight, lists, zero=True)
    dx, _ = kernels.compact_linear_backward(a, x, True, False)
    close(dx, x @ weight)


@pytest.mark.parametrize("density", [1.0, 0.02])
def test_what_is_pruned_is_not_multiplied(density):
    """An infinity in a column that nothing keeps reaches nothing."""
    x, _, _, weight, dy, mask = problem("single", 6, 90, 3, density, torch.float32)
    mask[:, 4] = mask[2] = mask[:, 0] = False
    lists, weight = KeptLists.of(mask), torch.where(mask, weight, 0)
    x[:, [0, 4]], dy[:, 2] = torch.inf, torch.nan
    a = CompactArgs(x, weight[mask], None, weight, lists, zero=True)
    y, packed = kernels.compact_linear(a)
    assert y.isfinite().all()
    for gradient in kernels.compact_linear_backward(a, dy, True, True, packed):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("networks", [None, 3])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter(networks, density, dtype):
    mask = torch.rand(*(() if networks is None else (networks,)), 9, 75) < density
    slots = KeptLists.of(mask).columns.shape[-1] + 2
    lists, dense = KeptLists.of(mask, slots), torch.randn(mask.shape).to(dtype)
    target = torch.full(mask.shape, 5.0).to(dtype)
    values = entries(dense.float(), mask, slots)
    kernels.scatter_kept_(target, values, lists.starts, lists.columns)
    assert torch.equal(target, torch.where(mask, dense, 5.0))


def test_refusals_say_what_and_why():
    x, values, lists, weight, dy, _ = problem("networks", 3, 4, 2, 0.5, torch.float32)
    a = CompactArgs(x, values, None, weight, lists, zero=True)
    frozen, double = a._replace(zero=False), a._replace(x=x.double(), values=values.double())

    def says(text, *args, op="compact_linear"):
        assert text in (getattr(kernels, op).why_not(*args) or "")

    assert kernels.compact_linear.why_not(a) is None
    assert kernels.compact_linear_backward.why_not(frozen, dy, False, True) is None
    says("pruned entries are zero, got frozen values.", frozen)
    says("pruned entries are zero, got frozen values.", frozen, dy, True, False)
    says("x as float32", double)
    says("float64", double, dy, True, True)
    says("dy as float32", a, dy.double(), True, True)
    says("in one dtype", a._replace(x=x.half()))
    many = torch.empty(2**16, 0)
    says("up to 65535 networks", many, many, None, None, op="scatter_kept_")
    says("effective as", many.long(), many, None, None, op="scatter_kept_")
