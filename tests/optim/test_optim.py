"""ls.optim against torch.optim, in float32 and in float64."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from optim_problems import (
    CASES,
    PAIRS,
    assert_close,
    by_kernel,
    needs_kernel,
    parameters,
    set_grads,
    states,
    train,
)
from tolerances import close
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import lottery_sparse as ls
from lottery_sparse.ops import dispatch
from lottery_sparse.optim import calls as optim_plan

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_steps_are_those_of_torch(name, options):
    ours, torchs = PAIRS[name]
    params, same, exact = parameters(), parameters(), parameters(dtype=torch.float64)
    mine, theirs = ours(params, **options), torchs(same, **options)
    train(mine, params)
    train(theirs, same)
    train(torchs(exact, **options), exact)
    assert_close(params, same)
    assert_close(params, exact)
    for a, b in zip(states(mine).values(), states(theirs).values(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert (a[key].shape, a[key].dtype) == (b[key].shape, b[key].dtype)
            assert_close([a[key]], [b[key]])


@needs_kernel
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_one_element_does_not_depend_on_place_or_threads(name, options, monkeypatch):
    by_kernel(monkeypatch)
    whole = parameters([(40000,)])
    parts = [nn.Parameter(p.clone()) for p in whole[0].detach().split([3, 17, 13000, 26980])]
    mine, split = PAIRS[name][0](whole, **options), PAIRS[name][0](parts, **options)
    for step in range(3):
        set_grads(whole, step)
        for p, g in zip(parts, whole[0].grad.split([len(p) for p in parts]), strict=True):
            p.grad = g
        torch.set_num_threads(2)
        mine.step()
        torch.set_num_threads(1)
        split.step()
    assert torch.equal(whole[0], torch.cat([p.detach() for p in parts]))


@needs_kernel
@pytest.mark.parametrize("name", PAIRS)
def test_groups_schedulers_and_missing_gradients(name, monkeypatch):
    by_kernel(monkeypatch)
    results = []
    for cls in PAIRS[name]:
        params = parameters()
        groups = [
            {"params": params[:3], "lr": 0.2, "weight_decay": 0.1},
            {"params": params[3:]},
        ]
        optimizer = cls(groups, lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        for step in range(6):
            set_grads(params, step)
            params[4].grad = None if step % 2 else params[4].grad
            params[5].grad = None
            version = params[1]._version, params[5]._version
            optimizer.step()
            scheduler.step()
            if cls is PAIRS[name][0]:
                assert params[1]._version > version[0]
                assert params[5]._version == version[1]
        optimizer.add_param_group({"params": parameters([(4,)], seed=9), "lr": 0.5})
        params += optimizer.param_groups[2]["params"]
        train(optimizer, params, 2)
        results.append(params)
    assert_close(*results)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_go_both_ways(name, ours_first):
    options = {"lr": 0.03, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
    classes = PAIRS[name] if ours_first else PAIRS[name][::-1]
    params = parameters()
    first = classes[0](params, **options)
    train(first, params, 4)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second = classes[1](params, lr=1.0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    train(second, params, 4, first=4)
    expected = parameters()
    train(PAIRS[name][1](expected, **options), expected, 8)
    assert_close(params, expected)


@pytest.mark.parametrize("name", PAIRS)
def test_copies_go_on(name):
    params = parameters()
    optimizer = PAIRS[name][0](params, lr=0.1)
    train(optimizer, params, 2)
    twin = copy.deepcopy(optimizer)
    copies = [p for group in twin.param_groups for p in group["params"]]
    train(optimizer, params, 2, first=2)
    train(twin, copies, 2, first=2)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_closures_hooks_and_types():
    params = parameters([(5,)])
    optimizer = ls.optim.Adam(params, lr=0.1)
    assert isinstance(optimizer, torch.optim.Adam)
    assert isinstance(ls.optim.AdamW(params), torch.optim.AdamW)
    assert isinstance(ls.optim.SGD(params), torch.optim.SGD)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert loss > 0
    assert calls == [True]
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("post")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append("global")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == [True, "pre", "post", "global"]
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#Adam.step" in {event.name for event in profile.events()}


def test_hooks_of_a_subclass_run_once():
    class Halved(ls.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    params, calls = parameters([(5,)]), []
    optimizer = Halved(params, lr=0.1)
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(1))
    train(optimizer, params, 1)
    assert calls == [1]


def odd_parameters():
    """What the kernel takes, between what it does not."""
    params = parameters([(4, 6), (7,), (5,), (3, 4), (6,), (2, 2)])
    params[0] = nn.Parameter(params[0].detach().t())
    params[2] = nn.Parameter(params[2].detach().double())
    params[4] = nn.Parameter(params[4].detach().to(torch.complex64))
    return params


@pytest.mark.parametrize("name", PAIRS)
def test_what_the_kernel_does_not_take_goes_through_torch(name):
    results = []
    for cls in PAIRS[name]:
        params = odd_parameters()
        optimizer = cls(params, lr=0.1)
        for step in range(3):
            set_grads(params, step)
            params[3].grad = params[3].grad.t().contiguous().t()  # not contiguous
            optimizer.step()
        results.append(params)
        assert len(states(optimizer)) == (0 if name == "SGD" else len(params))
    for p, q in zip(*results, strict=True):
        close(p, q)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adam", {"amsgrad": True}),
        ("AdamW", {"lr": torch.tensor(0.1)}),
        ("SGD", {"lr": torch.tensor(0.1), "momentum": 0.5}),
        ("Adam", {"fused": True}),
        ("SGD", {"foreach": True, "momentum": 0.5}),
    ],
    ids=str,
)
def test_options_of_torch(name, options):
    results = []
    for cls in PAIRS[name]:
        params = parameters()
        optimizer = cls(params, **options)
        train(optimizer, params, 4)
        results.append(params)
        if "amsgrad" in options:
            assert "max_exp_avg_sq" in states(optimizer)[1]
    assert_close(*results)


def test_sparse_gradients_go_through_torch():
    results = []
    for cls in PAIRS["SGD"]:
        torch.manual_seed(0)
        table = nn.Embedding(9, 4, sparse=True)
        optimizer = cls(table.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            table(torch.tensor([1, 3, 3])).square().sum().backward()
            optimizer.step()
        results.append([table.weight])
    assert_close(*results)


@needs_kernel
def test_backends_can_be_forced():
    params, complex_one = parameters(), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = ls.optim.SGD(params, lr=0.1)
    expected = train(torch.optim.SGD(parameters(), lr=0.1), same := parameters(), 1)
    assert expected is same
    with ls.use_backend("reference"):
        train(optimizer, params, 1)
    with ls.use_backend("cpu"):
        train(optimizer, params, 1)
        other = ls.optim.SGD([complex_one], lr=0.1)
        with pytest.raises(RuntimeError, match="forced backend cpu"):
            train(other, [complex_one], 1)


@needs_kernel
def test_lists_that_do_not_fit_are_an_error():
    one = [torch.ones(3)]
    for op in (optim_plan.op_of("sgd_step", "cpu"), dispatch.function("sgd_step", "cpu")):
        with pytest.raises(RuntimeError, match="do not fit each other"):
            op(one, [], [], [], [], [], [], 0.1, 0.0, 0.0, 0.0, False, False, False)
        with pytest.raises(RuntimeError, match="do not fit each other"):
            op(one, one, [], one, one, one, [5], 0.1, 0.0, 0.0, 0.0, False, False, False)
        assert op(one, [torch.ones(4)], [], [], [], [], [], 0.1, 0, 0, 0, False, False, False) == 0
    assert torch.equal(one[0], torch.ones(3))


def test_compiled_step():
    params, same = parameters([(5,), (3, 4)]), parameters([(5,), (3, 4)])
    optimizer, theirs = ls.optim.SGD(params, lr=0.1), torch.optim.SGD(same, lr=0.1)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for step in range(3):
        set_grads(params, step)
        set_grads(same, step)
        compiled()
        theirs.step()
    assert_close(params, same)
