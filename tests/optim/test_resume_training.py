"""Training stopped at any point and resumed with its optimizer, by the lines one would write."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import lottery_sparse as ls
from lottery_sparse.ops import dispatch

OPTIMIZERS = {
    "momentum": lambda kinds, p: kinds.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda kinds, p: kinds.Adam(p, lr=0.01),
    "AdamW": lambda kinds, p: kinds.AdamW(p, lr=0.01, weight_decay=0.1),
}
kinds = pytest.mark.parametrize("kinds", [torch.optim, ls.optim], ids=["torch", "ls"])
named = pytest.mark.parametrize("name", OPTIMIZERS)


def dense():
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))


def masks(density, seed):
    g = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (20, 12), "2.weight": (4, 20)}
    return {n: torch.rand(shape, generator=g) < density for n, shape in shapes.items()}


def batch(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(8, 12, generator=g), torch.randint(0, 4, (8,), generator=g)


def train(model, optimizer, steps):
    for i in steps:
        x, y = batch(i)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def narrow(model, optimizer):
    less = masks(0.6, 9)
    narrower = {n: m & less[n] for n, m in ls.masks_of(model).items()}
    ls.set_masks_(model, narrower, optimizer=optimizer)


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(model, other):
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def stays_masked(make, state):
    model = ls.sparsify_(dense())
    model.load_state_dict(state["model"])
    optimizer = make(model.parameters())
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


def load_then_compact(make, state, spare=0):
    model = ls.sparsify_(dense())
    model.load_state_dict(state["model"])
    ls.compact_(model, spare=spare)
    optimizer = make(model.parameters())
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


def load_then_compact_with_optimizer(make, state, spare=0):
    model = ls.sparsify_(dense())
    optimizer = make(model.parameters())
    model.load_state_dict(state["model"])
    ls.compact_(model, optimizer, spare=spare)
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


def compact_then_load(make, state, spare=0):  # every weight has a slot
    model = ls.compact_(ls.sparsify_(dense()))
    model.load_state_dict(state["model"])
    optimizer = make(model.parameters())
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


def compact_then_load_both(make, state, spare=0):
    model = ls.compact_(ls.sparsify_(dense()))
    optimizer = make(model.parameters())
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


COMPACT = (
    load_then_compact,
    load_then_compact_with_optimizer,
    compact_then_load,
    compact_then_load_both,
)


def check(model, optimizer, resume, pruned):
    """Trained on, and resumed from what was saved, to the same bits."""
    train(model, optimizer, range(3))
    state = saved(model, optimizer)
    other, its = resume(state)
    for m, o in ((model, optimizer), (other, its)):
        train(m, o, range(3, 5))
        if pruned:
            narrow(m, o)
        train(m, o, range(5, 7))
    same(model, other)


@kinds
@named
@pytest.mark.parametrize("pruned", [False, True])
def test_masked(name, kinds, pruned):
    def make(parameters):
        return OPTIMIZERS[name](kinds, parameters)

    for frozen in ("zero", ls.frozen.Constant(0.1)):
        model = ls.set_masks_(ls.sparsify_(dense()), masks(0.3, 1), frozen)
        check(model, make(model.parameters()), lambda state: stays_masked(make, state), pruned)


@kinds
@pytest.mark.parametrize("name", ["momentum", "AdamW"])
@pytest.mark.parametrize("order", COMPACT)
@pytest.mark.parametrize(("spare", "its_spare"), [(5, 5), (5, 0), (0, 5)])
def test_compact(name, kinds, order, spare, its_spare):
    def make(parameters):
        return OPTIMIZERS[name](kinds, parameters)

    for frozen, pruned in (("zero", True), (ls.frozen.Constant(0.1), False)):
        model = ls.set_masks_(ls.sparsify_(dense()), masks(0.3, 1), frozen)
        ls.compact_(model, spare=spare)
        optimizer = make(model.parameters())
        check(model, optimizer, lambda state: order(make, state, its_spare), pruned)


@kinds
@named
def test_a_mask_that_is_set_right_after_the_resume_moves_the_state(name, kinds):
    def make(parameters):
        return OPTIMIZERS[name](kinds, parameters)

    model = ls.compact_(ls.set_masks_(ls.sparsify_(dense()), masks(0.3, 1)), spare=4)
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    other, its = compact_then_load(make, saved(model, optimizer))
    for m, o in ((model, optimizer), (other, its)):
        narrow(m, o)
        train(m, o, range(3, 6))
    same(model, other)


@kinds
@named
def test_networks_side_by_side(name, kinds):
    def network(seed):
        return ls.set_masks_(ls.sparsify_(dense()), masks(0.1 + seed / 5, seed))

    def pair():
        return ls.compact_(ls.ensemble.replicate([network(1), network(3)]))

    def resume(state):
        model = ls.compact_(ls.ensemble.replicate([network(3), network(3)]), spare=9)
        model.load_state_dict(state["model"])
        optimizer = OPTIMIZERS[name](kinds, model.parameters())
        optimizer.load_state_dict(state["optimizer"])
        return model, optimizer

    def steps(model, optimizer, numbers):
        for i in numbers:
            x, y = batch(i)
            optimizer.zero_grad()
            sum(nn.functional.cross_entropy(out, y) for out in model(x)).backward()
            optimizer.step()

    model = pair()
    optimizer = OPTIMIZERS[name](kinds, model.parameters())
    steps(model, optimizer, range(3))
    other, its = resume(saved(model, optimizer))
    steps(model, optimizer, range(3, 6))
    steps(other, its, range(3, 6))
    same(model, other)


@named
@pytest.mark.skipif(not dispatch.built("cpu"), reason="the kernels are not built")
def test_train_step(name):
    def make(parameters):
        return OPTIMIZERS[name](torch.optim, parameters)

    model = ls.compact_(ls.set_masks_(ls.sparsify_(dense()), masks(0.3, 1)), spare=3)
    optimizer = make(model.parameters())
    step = ls.train_step(model, optimizer)
    for i in range(3):
        step(*batch(i))
    state = saved(model, optimizer)
    for order in COMPACT:
        other, its = order(make, copy.deepcopy(state))  # an optimizer goes on in what it loads
        its_step = ls.train_step(other, its)
        if order is compact_then_load:  # loaded once more, into a step that is there
            its_step(*batch(7))
            other.load_state_dict(state["model"])
            its.load_state_dict(copy.deepcopy(state["optimizer"]))
        for i in range(3, 6):
            its_step(*batch(i))
        states = other.state_dict()
        if order is COMPACT[0]:
            expected = {n: v.clone() for n, v in states.items()}
        assert all(torch.equal(v, expected[n]) for n, v in states.items())
    for i in range(3, 6):
        step(*batch(i))
    assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items())


@kinds
@named
@pytest.mark.parametrize("round_mask", [False, True])
def test_learned_masks(name, kinds, round_mask):
    def make(parameters):
        return OPTIMIZERS[name](kinds, [p for p in parameters if p.requires_grad])

    def network():
        return ls.supermask_(dense(), round_mask=round_mask)

    model = network()
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    state = saved(model, optimizer)
    other = network()
    other.load_state_dict(state["model"])
    its = make(other.parameters())
    its.load_state_dict(state["optimizer"])
    train(model, optimizer, range(3, 6))
    train(other, its, range(3, 6))
    same(model, other)


def test_state_of_a_masked_model_goes_on_in_the_compact_one():
    model = ls.set_masks_(ls.sparsify_(dense()), masks(0.3, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    other, its = load_then_compact(
        lambda p: torch.optim.Adam(p, lr=0.01), saved(model, optimizer), spare=2
    )
    train(model, optimizer, range(3, 6))
    train(other, its, range(3, 6))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)


# ---- refused -------------------------------------------------------------------------------------


@kinds
@named
def test_what_cannot_go_on_is_refused(name, kinds):
    def make(parameters):
        return OPTIMIZERS[name](kinds, parameters)

    model = ls.compact_(ls.set_masks_(ls.sparsify_(dense()), masks(0.3, 1)))
    optimizer = make(model.parameters())
    train(model, optimizer, range(2))
    state = saved(model, optimizer)
    slots = model[0].capacity

    other = ls.compact_(ls.sparsify_(dense()))  # nobody has loaded its masks
    its = make(other.parameters())
    its.load_state_dict(state["optimizer"])
    few = rf"holds state of {slots} kept weights, but a CompactLinear of \(20, 12\) keeps 240; load"
    with pytest.raises(ValueError, match=few):
        train(other, its, range(1))
    with pytest.raises(RuntimeError, match=few):
        other.load_state_dict(state["model"])

    other = ls.sparsify_(dense())
    its = make(other.parameters())
    other.load_state_dict(state["model"])
    its.load_state_dict(state["optimizer"])
    before = list(other.parameters())
    with pytest.raises(ValueError, match=rf"state of {slots} kept .* 0\.weight, .*then load the o"):
        ls.compact_(other, its)
    assert all(a is b for a, b in zip(before, other.parameters(), strict=True))
