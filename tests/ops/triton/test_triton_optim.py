"""The steps of Triton against torch.optim and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from optim_problems import CASES, PAIRS, by_kernel, states
from test_optim_compact import Holder, assert_fresh, compact_model
from torch import nn

import lottery_sparse as ls
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.steps import launches, tables
from lottery_sparse.ops.steps import triton as steps_triton
from lottery_sparse.ops.steps import triton_kernels as steps_triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# none, one, chunks with and without a tail
SIZES = [(0,), (1,), (3, 11), (1024,), (2, 600)]
STEPS = 3
BF16, FP16 = torch.bfloat16, torch.float16
TRUNCATED = 1 if DEVICE == "cuda" else 2  # the interpreter rounds to bfloat16 towards zero


def parameters(dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator) for size in sizes]
    return [nn.Parameter(t.to(DEVICE, dtype)) for t in drawn]


def set_grads(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def train(optimizer, params, steps=STEPS, first=0):
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()
    return params


def by_triton(optimizer, params, steps=STEPS, first=0):
    with ls.use_backend("triton"):
        return train(optimizer, params, steps, first)


def assert_close(params, expected, relative=1e-6):
    for p, e in zip(params, expected, strict=True):
        p, e = p.detach().double().cpu(), e.detach().double().cpu()
        error = (p - e).abs() / (e.abs() + 1)
        assert (error <= relative).all(), float(error.max())


@pytest.fixture(params=["beside", "on the host"])
def counts(request, monkeypatch):
    """Where Adam counts its steps. Without a GPU both places are the same."""
    if DEVICE == "cpu":
        beside = request.param == "beside"
        monkeypatch.setattr(launches, "on_device", lambda steps, params: beside)
        return {}
    return {"capturable": request.param == "beside"}


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_steps_are_those_of_torch(name, options, counts):
    ours, torchs = PAIRS[name]
    params, same, exact = parameters(), parameters(), parameters(torch.float64)
    mine = ours(params, **options, **(counts if name != "SGD" else {}))
    theirs = torchs(same, **options)
    by_triton(mine, params)
    train(theirs, same)
    train(torchs(exact, **options), exact)
    assert_close(params, same)
    assert_close(params, exact)
    for a, b in zip(states(mine).values(), states(theirs).values(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert (a[key].shape, a[key].dtype) == (b[key].shape, b[key].dtype)
            assert_close([a[key]], [b[key]])


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
    with ls.use_backend("triton"):
        mine.step()
    theirs.step()
    half = 2.0**-11 if dtype == torch.float16 else 2.0**-8 * TRUNCATED
    assert_close(params, exact, 1.1 * half)
    for a, b in zip(states(mine).values(), states(theirs).values(), strict=True):
        for key in a.keys() - {"step"}:
            assert a[key].dtype == dtype
            assert_close([a[key]], [b[key]], 1.1 * half)


@pytest.mark.parametrize("name", PAIRS)
def test_groups_missing_gradients_and_other_counts(name, counts):
    results = []
    for cls, run in zip(PAIRS[name], (by_triton, train), strict=True):
        params = parameters()
        groups = [{"params": params[:2], "lr": 0.2, "weight_decay": 0.1}, {"params": params[2:]}]
        options = counts if cls is PAIRS[name][0] and name != "SGD" else {}
        optimizer = cls(groups, lr=0.05, **options)
        for step in range(3):
            set_grads(params, step)
            params[3].grad = None if step == 0 else params[3].grad
            held = run is by_triton
            with ls.use_backend("triton" if held else "reference"):
                version = params[4]._version, params[0]._version
                params[0].grad = None
                optimizer.step()
            assert not held or params[4]._version > version[0]
            assert params[0]._version == version[1]
        results.append(params)
    assert_close(*results)


@pytest.mark.parametrize("name", PAIRS)
def test_a_learning_rate_on_the_device(name):
    one, other = parameters(), parameters()
    options = {} if name == "SGD" else {"weight_decay": 0.1, "fused": True}
    held = PAIRS[name][0](one, lr=torch.tensor(0.05, device=DEVICE), **options)
    plain = PAIRS[name][0](other, lr=0.05, **options)
    for step, lr in enumerate((0.05, 0.02)):
        held.param_groups[0]["lr"].fill_(lr)
        plain.param_groups[0]["lr"] = lr
        by_triton(held, one, 1, step)
        by_triton(plain, other, 1, step)
    assert_close(one, other, 1e-7)


@pytest.mark.parametrize("networks", [None, 1, 3])
@pytest.mark.parametrize("columns", [300, 2**16 + 3])
@pytest.mark.parametrize("name", PAIRS)
def test_compact_parameters(name, networks, columns, monkeypatch):
    """Ragged networks, one of them empty; spare slots; rows without entries; two weights."""
    by_kernel(monkeypatch)
    density = 0.3 if columns < 2**16 else 2e-3
    lead, rows = () if networks is None else (networks,), 9
    mask = torch.rand(*lead, rows, columns) < density
    mask[..., 2:5, :] = False
    mask.view(-1, rows, columns)[-1] &= networks != 3
    slots = int(mask.flatten(-2).sum(-1).max()) + 3
    kept = KeptLists.of(mask.to(DEVICE), slots)
    dense = [torch.full(mask.shape, 7.0, device=DEVICE).to(t) for t in (torch.float32, BF16, FP16)]
    layers = [Holder(kept, weight) for weight in dense]
    for layer in layers[1:]:
        layer.weight = layers[0].weight
        ls.nn.compact.registry.register(layer)
    start = torch.randn(layers[0].weight.shape)
    used = (torch.arange(slots) < kept.kept.unsqueeze(-1).cpu()).view(start.shape)
    start[~used] = 0
    other = nn.Parameter(start.clone().to(DEVICE))
    params = [layers[0].weight, *parameters(sizes=[(40,)])]
    params[0].data.copy_(start)
    optimizer = PAIRS[name][0](params, lr=0.1, weight_decay=0.1)
    by_triton(optimizer, params, 2)
    got = params[0].detach().cpu()
    assert (got[~used] == 0).all()
    assert (
        not optimizer.state[params[0]]
        or (optimizer.state[params[0]]["exp_avg"].cpu()[~used] == 0).all()
    )
    with ls.use_backend("reference"):
        monkeypatch.undo()
        same = [other, *parameters(sizes=[(40,)])]
        train(PAIRS[name][1](same, lr=0.1, weight_decay=0.1), same, 2)
    assert_close([got[used]], [other.detach().cpu()[used]])
    assert_close(params[1:], same[1:])
    for layer, weight in zip(layers, dense, strict=True):
        expected = torch.full(mask.shape, 7.0).masked_scatter(mask, got[used]).to(weight.dtype)
        if weight.dtype == BF16:
            assert_close([weight], [expected], 2.0**-7 * (TRUNCATED - 1))
        else:
            assert torch.equal(weight.cpu(), expected)
        assert layer.fresh_version == params[0]._version


@pytest.mark.parametrize("name", PAIRS)
def test_a_compact_model(name):
    """Its layers share a weight, and without a GPU no kernel reads what a step would write."""
    mine, theirs = compact_model(shared=True).to(DEVICE), compact_model(shared=True).to(DEVICE)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    pairs = zip(PAIRS[name], (mine, theirs), strict=True)
    optimizers = [cls(model.parameters(), **options) for cls, model in pairs]
    for step in range(2):
        x = torch.randn(8, 30, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        for model, optimizer in zip((mine, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            with ls.use_backend("triton" if model is mine else "reference"):
                optimizer.step()
    assert_close(mine.parameters(), theirs.parameters())
    assert_fresh(mine)


def test_views_that_no_vector_fits():
    """Tensors that begin between 16 bytes: all alike, and each its own way."""
    held = torch.randn(4, 1300)

    def run(offsets, step):
        p, g, m = (t[o : o + 1200].to(DEVICE) for t, o in zip(held.clone(), offsets, strict=False))
        p, g, m = (
            torch.cat([t.new_zeros(o), t])[o:] for t, o in zip((p, g, m), offsets, strict=True)
        )
        refused = step([p], [g], [m], [], [], [], [], 0.1, 0.9, 0.0, 0.1, False, False, False)
        assert refused == -1
        return p, g, m

    for offsets in ((1, 1, 1), (0, 1, 3), (3, 3, 3)):
        p, _, m = run(offsets, steps_triton.sgd_step)
        start = [t[o : o + 1200].double() for t, o in zip(held, offsets, strict=False)]
        buffer = 0.9 * start[2] + start[1] + 0.1 * start[0]
        assert_close([m], [buffer])
        assert_close([p], [start[0] - 0.1 * buffer])


def test_what_the_kernel_does_not_take():
    double, ragged = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(3, 4).t())
    for parameter in (double, ragged):
        parameter = nn.Parameter(parameter.detach().to(DEVICE))
        with pytest.raises(RuntimeError, match="forced backend triton"):
            by_triton(ls.optim.SGD([parameter], lr=0.1), [parameter], 1)
    params = parameters(sizes=[(3, 4), (5,)])
    optimizer = ls.optim.SGD(params, lr=0.1)
    set_grads(params, 0)
    params[0].grad = params[0].grad.t().contiguous().t()
    before = [p.detach().clone() for p in params]
    with ls.use_backend("triton"), pytest.raises(RuntimeError, match="for 1 of the Parameters"):
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))


def test_tables_are_held_until_something_moves():
    params = parameters()
    optimizer = ls.optim.Adam(params, lr=0.1)
    tables._tables.clear()
    set_grads(params, 0)
    with ls.use_backend("triton"):
        optimizer.step()
        optimizer.step()
        assert len(tables._tables) == 1
        held = params[3].grad  # so that the next is elsewhere
        params[3].grad = held.clone()
        optimizer.step()
        assert len(tables._tables) == 2


@triton.jit
def _rows(starts, slots, out, rows, count):
    for i in range(count):
        tl.store(out + i, steps_triton_kernels.row_of(starts, rows, tl.load(slots + i), 256))


@pytest.mark.parametrize("rows", [2, 255, 257, 70000])
def test_rows_are_found_among_empty_ones(rows):
    lengths = np.random.default_rng(rows).integers(0, 4, rows) * (np.arange(rows) % 5 > 1)
    lengths[rows // 2] += 1
    starts = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
    slots = torch.from_numpy(np.random.default_rng(1).integers(0, int(starts[-1]), 20))
    slots[0], slots[1] = 0, starts[-1] - 1
    expected = torch.searchsorted(starts, slots, right=True) - 1
    out = torch.empty(20, dtype=torch.int32, device=DEVICE)
    _rows[(1,)](starts.to(DEVICE), slots.to(DEVICE), out, rows, 20)
    assert torch.equal(out.cpu().long(), expected)


if DEVICE == "cuda":

    @pytest.mark.parametrize("name", PAIRS)
    def test_a_captured_step(name):
        options = {} if name == "SGD" else {"capturable": True}
        params, same = parameters(), parameters()
        optimizer = PAIRS[name][0](params, lr=0.1, **options)
        set_grads(params, 0)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                optimizer.step()
        graph.replay()
        theirs = PAIRS[name][1](same, lr=0.1)
        set_grads(same, 0)
        for _ in range(21):
            theirs.step()
        assert_close(params, same)
