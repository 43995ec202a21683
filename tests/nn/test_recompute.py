"""Gradient checkpointing over layers that draw: the forward and its recomputation draw alike."""

from __future__ import annotations

import copy
import functools
import gc

import pytest
import torch
from supermask_models import images, layers, learning
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

import lottery_sparse as ls
from lottery_sparse.nn.recompute import Draws

FORWARD = functools.partial(checkpoint, use_reentrant=False)
REENTRANT = functools.partial(checkpoint, use_reentrant=True)
kinds = pytest.mark.parametrize("kind", [FORWARD, REENTRANT], ids=["not reentrant", "reentrant"])


def plainly(function, x):
    return function(x)


class Network(nn.Module):
    """Two segments, which may be checkpointed, in one that may be, too; b runs three times."""

    def __init__(self, inner=plainly, outer=plainly):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 5)
        self.inner, self.outer = inner, outer

    def first(self, x):
        return self.b(torch.relu(self.a(x)))

    def second(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.b(x)))))

    def whole(self, x):
        y = torch.relu(self.a(torch.relu(self.inner(self.first, x))))
        return self.inner(self.second, y)

    def forward(self, x):
        return self.outer(self.whole, x)


def summed(model, xs):
    sum(model(x).square().mean() for x in xs).backward()


def one_by_one(model, xs):
    for x in xs:
        model(x).square().mean().backward()


def in_the_order_of_the_forwards(model, xs):
    for loss in [model(x).square().mean() for x in xs]:
        loss.backward()


def the_same_rows_twice(model, xs):
    summed(model, [xs[0], xs[0]])


def backward_twice(model, xs):
    loss = model(xs[0]).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


ACCUMULATED = [
    summed, one_by_one, in_the_order_of_the_forwards, the_same_rows_twice, backward_twice,
]  # fmt: skip


def steps(model, called=None, accumulate=summed, count=2, optimizer=None):
    """The gradients of some steps of SGD, two batches each; the model and the optimizer."""
    called = model if called is None else called
    scores = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(scores, lr=5.0, momentum=0.9)
    found = []
    for step in range(count):
        rows = torch.Generator().manual_seed(step)
        xs = [torch.randn(8, 20, generator=rows).requires_grad_() for _ in range(2)]
        optimizer.zero_grad()
        accumulate(called, xs)
        found += [p.grad.clone() for p in scores] + [xs[0].grad]
        optimizer.step()
    return found, optimizer


def network(*how, seed=0, **options):
    torch.manual_seed(seed)
    return ls.supermask_(Network(*how), **options)


def same(one, two):
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


def keys(model):
    return [m.key.tolist() for m in model.modules() if isinstance(m, ls.nn.SupermaskLinear)]


# of a reentrant one in another, where no input requires a gradient at first
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("accumulate", ACCUMULATED, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "how",
    [
        (FORWARD,), (REENTRANT,), (FORWARD, FORWARD), (REENTRANT, REENTRANT),
        (REENTRANT, FORWARD), (FORWARD, REENTRANT), (plainly, FORWARD), (plainly, REENTRANT),
    ],
    ids=range(8),
)  # fmt: skip
def test_checkpointed_steps_are_the_plain_ones(how, accumulate):
    plain, other = network(), network(*how)
    found, _ = steps(other, accumulate=accumulate)
    same(found, steps(plain, accumulate=accumulate)[0])
    assert keys(other) == keys(plain), "as many draws"


@pytest.mark.parametrize("how", [(FORWARD,), (FORWARD, FORWARD)], ids=["one", "nested"])
def test_recomputations_that_run_to_the_end(how):
    plain, other = network(), network(*how)
    with set_checkpoint_early_stop(False):
        found, _ = steps(other)
    same(found, steps(plain)[0])


@kinds
@pytest.mark.parametrize("options", [{"round_mask": True}, {"rescale": True}], ids=str)
def test_convolutions_and_all_options(kind, options):
    gradients = []
    for how in plainly, kind:
        model, x = learning(**options), images().requires_grad_()
        for _ in range(2):
            how(model, x).square().mean().backward()
        gradients.append([x.grad, *(layer.score.grad for layer in layers(model))])
    same(*gradients)


@kinds
def test_samples_of_evaluations(kind):
    """Attacks and saliency take gradients of x in evaluation mode."""
    gradients = []
    for how in plainly, kind:
        model, x = network().eval(), torch.ones(4, 20, requires_grad=True)
        for _ in range(2):
            how(model, x).square().mean().backward()
        gradients.append([x.grad])
        assert model.a.sample_key[2] == 2**31 + 4, "two draws of a forward"
    same(*gradients)


@kinds
def test_sequential_segments_and_networks_side_by_side(kind):
    x, gradients = torch.randn(6, 20, requires_grad=True), []
    for how in plainly, kind:
        models = []
        for seed in 1, 2:
            torch.manual_seed(seed)
            stack = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.Linear(20, 3))
            models.append(ls.supermask_(stack, seed=seed))
        both = ls.ensemble.replicate(models)
        how(both, x).square().mean().backward()
        one = models[0]
        reentrant = kind is REENTRANT
        y = one(x) if how is plainly else checkpoint_sequential(one, 3, x, use_reentrant=reentrant)
        y.square().mean().backward()
        scores = [p for m in (both, one) for p in m.parameters() if p.requires_grad]
        gradients.append([p.grad for p in scores])
    same(*gradients)


def test_a_resumed_training_goes_on_with_the_same_draws():
    first, second = network(FORWARD), network(FORWARD, seed=1)
    _, optimizer = steps(first, count=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed = torch.optim.SGD([p for p in second.parameters() if p.requires_grad], lr=5.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected, _ = steps(first, count=2, optimizer=optimizer)
    found, _ = steps(second, count=2, optimizer=resumed)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@kinds
def test_what_was_drawn_goes_with_the_graph(kind):
    steps(network(kind))
    gc.collect()
    assert not any(type(found) is Draws for found in gc.get_objects())


# ---- compiled ------------------------------------------------------------------------------------


# dynamo looks at .grad of the inputs of what it compiles in parts
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@kinds
@pytest.mark.parametrize("inside", [True, False])
def test_compiled_steps_are_the_plain_ones(kind, inside):
    """A model compiled with what it checkpoints, and a compiled model that is checkpointed."""
    plain, other = network(), network(kind if inside else plainly)
    compiled = torch.compile(other, backend="aot_eager")
    called = compiled if inside else functools.partial(kind, compiled)
    same(steps(other, called)[0], steps(plain)[0])
    assert keys(other) == keys(plain)


# ---- others that run a forward in a backward -----------------------------------------------------


class Again(torch.autograd.Function):
    """A checkpoint of somebody's own."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.function(x).backward(dy)
        return None, x.grad


def test_a_recomputation_of_somebodys_own_is_refused():
    model, x = network(), torch.randn(4, 20, requires_grad=True)
    y = Again.apply(model, x)
    before = keys(model)
    with pytest.raises(RuntimeError, match=r"not known which mask.*torch\.utils\.checkpoint"):
        y.sum().backward()
    assert keys(model) == before
    # masks that are not drawn are the same in any case
    ls.learning.use_masks_(model.eval(), "threshold")
    Again.apply(model, x).sum().backward()


def test_a_recomputation_that_draws_more_is_refused():
    model, x = network(), torch.randn(4, 20, requires_grad=True)
    calls = []

    def function(x):
        calls.append(1)
        return model(model.a(x) if len(calls) > 1 else x)

    y = REENTRANT(function, x)
    with pytest.raises(RuntimeError, match="not known which mask"):
        y.sum().backward()
