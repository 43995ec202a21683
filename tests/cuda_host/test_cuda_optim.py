"""The optimizer's CUDA kernels, emulated, against torch.optim in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from cuda_emulator import thread_order  # noqa: F401  # a fixture
from cuda_training import Rim
from optim_problems import (
    CASES,
    PAIRS,
    PER_STEP,
    assert_close,
    by_kernel,
    set_grads,
    states,
    train,
)
from test_optim_compact import Holder
from tolerances import of_sum
from torch import nn

import lottery_sparse as ls
from lottery_sparse.nn.compact import registry
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.steps import cuda as steps_cuda
from lottery_sparse.ops.steps import launches, tables
from lottery_sparse.optim import calls

SIZES = [(0,), (1,), (3, 11), (1024,), (2, 600)]  # none, one, chunks with and without a tail


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """The backend "cuda" for tensors on the CPU, where its kernels are emulated."""
    here = dispatch.Backend("lottery_sparse.ops.steps.cuda", needs="torch", devices=("cpu",))
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", here)
    monkeypatch.setattr(steps_cuda, "_ops", Rim())
    calls.op_of.cache_clear()
    yield
    calls.op_of.cache_clear()


@pytest.fixture(params=["beside", "on the host"])
def counts(request, monkeypatch):
    """Where Adam counts its steps; here both places are the same."""
    beside = request.param == "beside"
    monkeypatch.setattr(launches, "on_device", lambda steps, params: beside)


def parameters(dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def by_cuda(optimizer, params, steps=3):
    with ls.use_backend("cuda"):
        return train(optimizer, params, steps)


@pytest.mark.usefixtures("thread_order", "counts")
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_steps_are_those_of_torch(name, options, monkeypatch):
    params, exact = parameters(), parameters(torch.float64)
    mine, theirs = PAIRS[name][0](params, **options), PAIRS[name][1](exact, **options)
    train(theirs, exact, 3)
    by_kernel(monkeypatch)
    by_cuda(mine, params)
    assert_close(params, exact, 3)
    for a, b in zip(states(mine).values(), states(theirs).values(), strict=True):
        for key in b:
            assert_close([a[key]], [b[key]], 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_sixteen_bits_are_rounded_once(name, dtype):
    options = {"lr": 0.1} | ({"momentum": 0.9} if name == "SGD" else {"eps": 1e-3})
    params = parameters(dtype)
    exact = [nn.Parameter(p.detach().double()) for p in params]
    mine, theirs = PAIRS[name][0](params, **options), PAIRS[name][1](exact, **options)
    set_grads(params, 0)
    for p, e in zip(params, exact, strict=True):
        e.grad = p.grad.double()
    with ls.use_backend("cuda"):
        mine.step()
    theirs.step()
    for p, e in zip(params, exact, strict=True):
        e = e.detach()
        assert ((p - e).abs() <= of_sum(e, e.abs() + 1, 2 * PER_STEP, dtype)).all()
    assert params[1].dtype == dtype


@pytest.mark.usefixtures("counts")
@pytest.mark.parametrize("name", PAIRS)
def test_groups_missing_gradients_and_other_counts(name):
    results = []
    for cls, backend in zip(PAIRS[name], ("cuda", "reference"), strict=True):
        params = parameters()
        groups = [{"params": params[:2], "lr": 0.2, "weight_decay": 0.1}, {"params": params[2:]}]
        optimizer = cls(groups, lr=0.05)
        for step in range(3):
            set_grads(params, step)
            params[3].grad = None if step == 0 else params[3].grad
            with ls.use_backend(backend):
                optimizer.step()
        results.append(params)
    assert_close(*results, 3)


@pytest.mark.usefixtures("counts")
@pytest.mark.parametrize("name", PAIRS)
def test_a_learning_rate_on_the_device(name, request):
    if name != "SGD" and "host" in request.node.name:
        pytest.skip("then the rate is on the host, too")
    one, other = parameters(), parameters()
    options = {} if name == "SGD" else {"weight_decay": 0.1, "fused": True}
    held = PAIRS[name][0](one, lr=torch.tensor(0.05), **options)
    plain = PAIRS[name][0](other, lr=0.05, **options)
    by_cuda(held, one, 2)
    by_cuda(plain, other, 2)
    assert_close(one, other, 2)


@pytest.mark.usefixtures("thread_order")
@pytest.mark.parametrize("networks", [None, 3])
@pytest.mark.parametrize("columns", [300, 2**16 + 3])
@pytest.mark.parametrize("name", PAIRS)
def test_compact_parameters(name, networks, columns, monkeypatch):
    """Ragged networks, one of them empty; spare slots; rows without entries; three weights."""
    by_kernel(monkeypatch)
    density = 0.3 if columns < 2**16 else 2e-3
    lead = () if networks is None else (networks,)
    mask = torch.rand(*lead, 9, columns) < density
    mask[..., 2:5, :] = False
    mask.view(-1, 9, columns)[-1] &= networks != 3
    slots = int(mask.flatten(-2).sum(-1).max()) + 3
    kept = KeptLists.of(mask, slots)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    dense = [torch.full(mask.shape, 7.0).to(dtype) for dtype in dtypes]
    layers = [Holder(kept, weight) for weight in dense]
    for layer in layers[1:]:
        layer.weight = layers[0].weight
        registry.register(layer)
    start = torch.randn(layers[0].weight.shape)
    used = (torch.arange(slots) < kept.kept.unsqueeze(-1)).view(start.shape)
    start[~used] = 0
    params = [layers[0].weight, *parameters(sizes=[(40,)])]
    params[0].data.copy_(start)
    by_cuda(PAIRS[name][0](params, lr=0.1, weight_decay=0.1), params, 2)
    got = params[0].detach()
    assert (got[~used] == 0).all()
    monkeypatch.undo()
    same = [nn.Parameter(start.clone()), *parameters(sizes=[(40,)])]
    train(PAIRS[name][1](same, lr=0.1, weight_decay=0.1), same, 2)
    assert_close([got[used], params[1]], [same[0].detach()[used], same[1]], 2)
    for layer, weight in zip(layers, dense, strict=True):
        expected = torch.full(mask.shape, 7.0).masked_scatter(mask, got[used]).to(weight.dtype)
        assert torch.equal(weight, expected)
        assert layer.fresh_version == params[0]._version


def test_rows_are_found_among_empty_ones():
    """More than a round of 32 of them, and more parts than that."""
    mask = torch.zeros(5000, 3, dtype=torch.bool)
    mask[::97] = True
    mask[4990, 1] = True
    holder = Holder(KeptLists.of(mask), torch.zeros(mask.shape))
    params = [*parameters(sizes=[(3,)] * 70), holder.weight]
    by_cuda(ls.optim.SGD(params, lr=1.0), params, 1)
    dense = torch.zeros(mask.shape).masked_scatter(mask, -holder.weight.grad)
    assert torch.equal(holder.weight_effective, dense)


def test_views_that_no_vector_fits():
    """Tensors that begin between 16 bytes: all alike, and each its own way."""
    held = torch.randn(3, 1300)
    for offsets in ((1, 1, 1), (0, 1, 3), (3, 3, 3)):
        p, g, m = (t[o : o + 1200] for t, o in zip(held.clone(), offsets, strict=True))
        options = 0.1, 0.9, 0.0, 0.1, False, False, False
        assert steps_cuda.sgd_step([p], [g], [m], [], [], [], [], *options) == -1
        start = [t[o : o + 1200].double() for t, o in zip(held, offsets, strict=True)]
        buffer = 0.9 * start[2] + start[1] + 0.1 * start[0]
        assert_close([m], [buffer], 1)
        assert_close([p], [start[0] - 0.1 * buffer], 1)


def test_what_the_kernel_does_not_take():
    double, ragged = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(3, 4).t())
    for parameter in (double, ragged):
        with pytest.raises(RuntimeError, match="forced backend cuda"):
            by_cuda(ls.optim.SGD([parameter], lr=0.1), [parameter], 1)
    params = parameters(sizes=[(3, 4), (5,)])
    optimizer = ls.optim.SGD(params, lr=0.1)
    set_grads(params, 0)
    params[0].grad = params[0].grad.t().contiguous().t()
    before = params[0].detach().clone()
    with ls.use_backend("cuda"), pytest.raises(RuntimeError, match="for 1 of the Parameters"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_adam_steps_all_parameters_or_none_if_memory_runs_out(monkeypatch):
    """Parameters with other step counts are another launch, and another table."""
    monkeypatch.setattr(launches, "on_device", lambda steps, params: False)
    params = parameters()
    optimizer = ls.optim.Adam(params)
    with ls.use_backend("cuda"):
        for step in range(2):
            set_grads(params, step)
            params[3].grad = None if step == 0 else params[3].grad
            if step == 0:
                optimizer.step()
        before = copy.deepcopy([p.detach() for p in params])
        counts = [int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in params]
        made, table_of = [], tables.table_of

        def second_fails(*args):
            made.append(args)
            if len(made) == 2:
                raise torch.OutOfMemoryError("no memory for the second table")
            return table_of(*args)

        monkeypatch.setattr(tables, "table_of", second_fails)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
        assert all(map(torch.equal, params, before))
        assert [int(optimizer.state[p]["step"]) for p in params] == counts == [1, 1, 1, 0, 1]
        monkeypatch.setattr(tables, "table_of", table_of)
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 2, 2, 1, 2]
