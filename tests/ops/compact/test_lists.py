"""Ops read no memory that their lists do not own: what does not fit is refused in a sentence.

Each fault is met on every way to a kernel: forward and backward, one row of x and many, networks.
"""

from __future__ import annotations

import pytest
import torch

import lottery_sparse as ls
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits import reference
from lottery_sparse.ops.compact import lists
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.packed import formats

N, K, SPARE = 48, 128, 3
SHAPES = {"linear": (N, K), "conv2d": (N, K // 4, 2, 2), "grouped": (N, K // 8, 2, 2)}
# entry of the list, what it becomes; of negative starts, and of numbers that 16 bits hold
FAULTS = {
    "starts": [(0, 1), (0, -1), (3, 2**40), (3, -(2**40)), (3, 2**62), (-1, 2**40), (-1, -1)],
    "columns": [(5, 30000), (5, -1), (-SPARE - 1, K)],
    "column_starts": [(0, 1), (3, 2**40), (3, -(2**62)), (-1, 10**6)],
    "rows": [(5, 30000), (5, -1), (-SPARE - 1, N)],
    "positions": [(5, 2**30), (5, -1), (0, -(2**31))],
}
CASES = [(name, *fault) for name, faults in FAULTS.items() for fault in faults]
MADE_FOR_FORWARD = ("starts", "columns")


def problem(kind, networks=()):
    shape = SHAPES[kind]
    columns = K // 2 if kind == "grouped" else K
    mask = torch.rand(*networks, *shape) < 0.1
    mask[..., -1, -1] = mask[..., 0, 0] = True
    matrices = mask.reshape(*networks, N, columns)
    kept = KeptLists.of(matrices)
    kept = KeptLists.of(matrices, kept.columns.shape[-1] + SPARE)
    effective = torch.where(mask, torch.randn(mask.shape), 0.0)
    values = torch.randn(kept.columns.shape)
    x = (
        torch.randn(*networks, 2, K)
        if kind == "linear"
        else torch.randn(*networks, 2, K // 4, 6, 6)
    )
    return x.requires_grad_(), values.requires_grad_(), kept, effective


def call(kind, x, values, kept, effective):
    if kind == "linear":
        return ls.ops.compact_linear(x, values, kept, effective, zero=True)
    groups = 2 if kind == "grouped" else 1
    return ls.ops.compact_conv2d(x, values, kept, effective, zero=True, groups=groups)


def broken(kept, name, at, number):
    numbers = getattr(kept, name).clone()
    numbers[..., at] = number
    return kept._replace(**{name: numbers})


@pytest.mark.parametrize("forced", [False, True], ids=["auto", "cpu"])
@pytest.mark.parametrize("networks", [(), (2,)], ids=["one", "two networks"])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("name", "at", "number"), CASES)
def test_compact_products_refuse_lists_that_do_not_fit(name, at, number, kind, networks, forced):
    if forced and not dispatch.built("cpu"):
        pytest.skip("the native kernels are not built")
    x, values, kept, effective = problem(kind, networks)
    if name == "positions":
        number = max(number, torch.iinfo(torch.int32).min)
    bad = broken(kept, name, at, number)

    def step():
        y = call(kind, x, values, bad, effective)
        torch.autograd.grad(y.sum(), (x, values))

    if forced:
        with ls.use_backend("cpu"):
            if name in MADE_FOR_FORWARD:
                with pytest.raises(ValueError, match=rf"kept\.{name} must .*got -?\d+"):
                    step()
            else:
                refuses_or_reads_other_lists(step, name)
    else:
        refuses_or_reads_other_lists(step, name)


def refuses_or_reads_other_lists(step, name):
    """A way to the gradients that does not read the list is right with it."""
    error = None
    try:
        step()
    except (ValueError, RuntimeError, IndexError) as caught:
        error = caught
    assert not isinstance(error, ValueError) or str(error).startswith(f"kept.{name} must")


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_of_a_linear_layer_refuses_them(name, dtype):
    if not dispatch.built("cpu"):
        pytest.skip("the native kernels are not built")
    dispatch.library_of("cpu")
    native = torch.ops.lottery_sparse_native
    x, values, kept, _ = problem("linear")
    x, values = (t.detach().to(dtype) for t in (x, values))
    packed_x, dy = native.pack_tiles(x), torch.randn(2, N, dtype=dtype)
    dense = torch.zeros(N, K, dtype=dtype)
    for at, number in FAULTS[name]:
        bad = broken(kept, name, at, number)
        calls = [
            lambda bad=bad: native.compact_linear_backward(
                dy, packed_x, values, *bad, True, True, True, True
            )
        ]
        if name in MADE_FOR_FORWARD:
            calls.append(lambda bad=bad: native.compact_linear(x, values, *bad[:2], None))
            calls.append(lambda bad=bad: native.gather_kept(dense, *bad[:2]))
            calls.append(lambda bad=bad: native.scatter_kept_(dense, values, *bad[:2]))
        for refused in calls:
            with pytest.raises(RuntimeError, match=rf"{name} (must|begin|end)"):
                refused()


def test_lists_changed_between_forward_and_backward_are_refused():
    x, values, kept, effective = problem("linear")
    y = call("linear", x, values, kept, effective)
    kept.rows.data[5] = 30000  # no version counts this
    kept.columns.data[5] = 30000
    with pytest.raises((RuntimeError, IndexError)):
        torch.autograd.grad(y.sum(), (x, values))


# ---- packed ------------------------------------------------------------------------------------


def packed(kind):
    mask = torch.rand(N, K) < 0.1
    mask[:, 0] = mask[:, -1] = True
    weight = torch.where(mask, torch.randn(N, K), 0.0)
    values, starts, columns = formats.pack_csr(weight, mask)
    return [values, starts, columns if kind == "csr" else reference.pack_mask(mask)]


BAD_STARTS = [
    (0, -1), (0, 1), (5, 2**40), (5, -(2**40)), (5, 2**62), (N, 2**40), (N, -1),
]  # fmt: skip
PACKED = [
    *((kind, "starts", *fault) for kind in ("csr", "bitmap") for fault in BAD_STARTS),
    *(("csr", "columns", at, number) for at in (0, 7, -1) for number in (K, 30000, -1)),
    *(("bitmap", "bits", at, -1) for at in (N - 1,)),
]


@pytest.mark.parametrize("batch", [1, 2, 20, 40])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16 values"])
@pytest.mark.parametrize(("kind", "name", "at", "number"), PACKED)
def test_packed_products_refuse_lists_that_do_not_fit(kind, name, at, number, half, batch):
    values, *rest = packed(kind)
    rest[name != "starts"][at] = number
    op, x = getattr(ls.ops, f"{kind}_linear"), torch.randn(batch, K)
    sentence = f"{name} of row" if name == "bits" else f"{name} must"
    with pytest.raises(ValueError, match=sentence):
        op(x, values.bfloat16() if half else values, *rest)


def test_wide_columns_are_checked_as_well():
    values, starts, columns = packed("csr")
    columns = columns.to(torch.int32)
    for number in (K, -1, 2**31 - 1):
        columns[7] = number
        for batch in (1, 20):
            with pytest.raises(ValueError, match=rf"columns must .* below {K}, got {number}"):
                ls.ops.csr_linear(torch.randn(batch, K), values, starts, columns)


def test_no_columns_and_no_rows_are_lists_that_fit():
    empty = torch.empty(0), torch.zeros(N + 1, dtype=torch.int64)
    x = torch.randn(3, 0)
    assert ls.ops.csr_linear(x, *empty, torch.empty(0, dtype=torch.int16)).eq(0).all()
    none = torch.empty(0), torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int16)
    assert ls.ops.csr_linear(torch.randn(3, K), *none).shape == (3, 0)


# ---- ternary, and what is checked once -----------------------------------------------------------


def test_a_ternary_code_of_three_is_refused_whenever_it_is_written():
    codes = formats.pack_ternary(torch.randint(-1, 2, (N, K)))
    x, scale = torch.randn(2, K), torch.ones(1)
    ls.ops.ternary_linear(x, codes, scale, N)
    codes[0, 0, 0] |= 3
    for activations in ("exact", "int8"):
        with pytest.raises(ValueError, match="codes hold a 3"):
            ls.ops.ternary_linear(x, codes, scale, N, activations=activations)


def test_a_check_runs_once_until_something_is_written():
    seen = []
    first, second = torch.zeros(3), torch.zeros(3)

    def check(*args):
        seen.append(args)

    for _ in range(2):
        lists.once(check, first, second, 7)
    assert len(seen) == 1
    second += 1
    lists.once(check, first, second, 7)
    lists.once(check, first, second.clone(), 7)
    lists.once(check, first, second, 8)
    assert len(seen) == 4
    count = len(lists._passed)
    del first, seen[:]
    assert len(lists._passed) < count
