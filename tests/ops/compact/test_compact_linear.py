"""Kept weights as lists, and the kernels on them, against dense float64 products."""

from __future__ import annotations

import pytest
import torch
from tolerances import of_sum

import lottery_sparse as ls
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists

if not dispatch.built("cpu"):
    pytest.skip("the native kernels (lottery_sparse._C) are not built", allow_module_level=True)
import lottery_sparse._C  # registers the kernels

pytestmark = pytest.mark.numeric

kernels = torch.ops.lottery_sparse_native

# (N, K, B): one row, one column, no batch, batches around tiles of 32, more than one block of rows
SHAPES = [(1, 1, 1), (1, 130, 3), (40, 1, 2), (7, 9, 0), (17, 33, 65), (100, 257, 32), (20, 30, 96)]
DENSITIES = [0.0, 0.03, 0.3, 1.0]


def entries(values, mask):
    """Dense [.., N, K] from values by slot; pruned entries are 0."""
    kept = torch.cat([v[: int(m.sum())] for v, m in zip(values, mask, strict=True)])
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, kept)


@pytest.mark.parametrize("networks", [None, 3])
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("density", DENSITIES)
def test_lists_name_every_kept_entry_once(networks, spare, density):
    shape = (9, 13) if networks is None else (networks, 9, 13)
    mask = torch.rand(shape) < density
    lists = KeptLists.of(mask)
    lists = KeptLists.of(mask, lists.columns.shape[-1] + spare)
    each = [lists] if networks is None else [KeptLists(*t) for t in zip(*lists, strict=True)]
    for m, one in zip(mask.view(-1, 9, 13), each, strict=True):
        row, column = m.nonzero().unbind(1)
        kept = len(row)
        assert int(one.kept) == kept
        assert torch.equal(one.starts.diff(), m.sum(1))
        assert torch.equal(one.columns[:kept].long(), column)
        assert torch.equal(one.column_starts.diff(), m.sum(0))
        slots = one.positions[:kept].long()
        assert torch.equal(slots.sort().values, torch.arange(kept))
        assert torch.equal(one.rows[:kept].long(), row[slots])
        assert (column[slots].diff() >= 0).all()


def test_wide_numbers_where_sixteen_bits_do_not_hold_them():
    mask = torch.zeros(2, 2**16 + 2, dtype=torch.bool)
    mask[1, -1] = True
    wide, narrow = KeptLists.of(mask), KeptLists.of(mask[:, 2:])
    assert (wide.columns.dtype, int(wide.columns)) == (torch.int32, 2**16 + 1)
    assert (narrow.columns.dtype, int(narrow.columns) & 0xFFFF) == (torch.int16, 2**16 - 1)


@pytest.mark.parametrize(
    ("mask", "capacity", "message"),
    [
        (torch.ones(2, 3), None, "mask must be bool"),
        (torch.ones(3, dtype=torch.bool), None, "mask must be bool"),
        (torch.ones(2, 3, dtype=torch.bool), 5, "capacity is 5, but a network keeps 6"),
    ],
)
def test_bad_lists(mask, capacity, message):
    with pytest.raises(ValueError, match=message):
        KeptLists.of(mask, capacity)


@pytest.mark.parametrize("form", ["single", "networks", "shared x"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_matches_float64(form, shape, density):
    n, k, batch = shape
    networks = () if form == "single" else (3,)
    mask = torch.rand(*networks, n, k) < density
    lists = KeptLists.of(mask)
    lists = KeptLists.of(mask, lists.columns.shape[-1] + 3)
    values = torch.randn(lists.columns.shape)
    values[..., -3:] = torch.nan  # spare slots are never read
    x = torch.randn(*(() if form == "shared x" else networks), batch, k)
    dy, bias = torch.randn(*networks, batch, n), torch.randn(*networks, n)

    y, packed = kernels.compact_linear(x, values, lists.starts, lists.columns, bias)
    dx, dvalues, dbias = kernels.compact_linear_backward(
        dy, packed, values, *lists, form == "shared x", True, True, True
    )

    w = entries(values.view(-1, values.shape[-1]), mask.view(-1, n, k)).view(mask.shape).double()
    expected_y = x.double() @ w.mT + bias.double().unsqueeze(-2)
    expected_dx, dx_size = dy.double() @ w, dy.double().abs() @ w.abs()
    expected_dw = torch.where(mask, dy.double().mT @ x.double(), 0.0)
    if form == "shared x":
        expected_dx, dx_size = expected_dx.sum(0), dx_size.sum(0)
    got_dw = entries(dvalues.view(-1, dvalues.shape[-1]), mask.view(-1, n, k)).view(mask.shape)
    for got, wanted, size, terms in (
        (y, expected_y, x.double().abs() @ w.mT.abs() + bias.double().abs().unsqueeze(-2), k + 1),
        (dx, expected_dx, dx_size, n * (3 if form == "shared x" else 1)),
        (got_dw, expected_dw, dy.double().abs().mT @ x.double().abs(), batch),
        (dbias, dy.double().sum(-2), dy.double().abs().sum(-2), batch),
    ):
        assert ((got - wanted).abs() <= of_sum(wanted, size, terms, got.dtype)).all()
    for spare, kept in zip(
        dvalues.view(-1, dvalues.shape[-1]), lists.kept.view(-1).tolist(), strict=True
    ):
        assert (spare[kept:] == 0).all()


def test_what_is_not_needed_is_empty():
    lists = KeptLists.of(torch.rand(5, 7) < 0.5)
    values = torch.randn(lists.columns.shape)
    _, packed = kernels.compact_linear(torch.randn(4, 7), values, lists.starts, lists.columns, None)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        grads = kernels.compact_linear_backward(
            torch.randn(4, 5), packed, values, *lists, False, *needs
        )
        assert [g.numel() > 0 for g in grads] == list(needs)


def test_the_same_bits_as_the_masked_op_and_for_any_thread_count():
    mask = torch.rand(3, 200, 70) < 0.2
    lists, w = KeptLists.of(mask), torch.randn(3, 200, 70)
    values = torch.zeros(lists.columns.shape)
    for e in range(3):
        values[e, : int(lists.kept[e])] = w[e][mask[e]]
    x, dy = torch.randn(3, 150, 70), torch.randn(3, 150, 200)

    def run():
        y, packed = kernels.compact_linear(x, values, lists.starts, lists.columns, None)
        return (
            y,
            *kernels.compact_linear_backward(dy, packed, values, *lists, False, True, True, True),
        )

    one = run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True))
    finally:
        torch.set_num_threads(threads)
    with ls.use_backend("cpu"):
        assert torch.equal(one[0], ls.ops.masked_linear(x, w, mask))
    alone = kernels.compact_linear(x[1], values[1], lists.starts[1], lists.columns[1], None)[0]
    assert torch.equal(one[0][1], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(4, 7).double()}, "x must be"),
        ({"columns": torch.zeros(3, dtype=torch.int16)}, "do not fit each other"),
        ({"starts": torch.zeros(6, dtype=torch.int32)}, "starts must be"),
        ({"bias": torch.zeros(4)}, "bias has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    lists = KeptLists.of(torch.ones(5, 7, dtype=torch.bool))
    arguments = {
        "x": torch.randn(4, 7),
        "values": torch.randn(35),
        "starts": lists.starts,
        "columns": lists.columns,
        "bias": None,
    }
    with pytest.raises(RuntimeError, match=message):
        kernels.compact_linear(**{**arguments, **change})
