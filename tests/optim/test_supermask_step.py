"""train_step of networks with learned masks, against their modules in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from step_problems import BATCHES, OPTIMIZERS, ROUNDINGS, WIDTHS, batches, by_modules
from tolerances import close
from torch import nn

import lottery_sparse as ls
from lottery_sparse.nn.forms.compacting import expand_layers_
from lottery_sparse.ops import dispatch, sample_mask

pytestmark = pytest.mark.numeric

if not dispatch.built("cpu"):
    pytest.skip("the native kernels (lottery_sparse._C) are not built", allow_module_level=True)

MASKS = [{}, {"rescale": True}, {"weights": "signed_constant", "rescale": True}]
masks = pytest.mark.parametrize("options", MASKS, ids=lambda o: "-".join(o) or "plain")


def network(widths=WIDTHS[0], seed=0, bias=True, spread=1.0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Flatten()]
        for k, n in itertools.pairwise(widths):
            layers += [nn.Linear(k, n, bias=bias), nn.ReLU()]
        model = ls.supermask_(nn.Sequential(*layers[:-1]), seed=seed, **options)
        with torch.no_grad():
            for score in trained(model):
                score += spread * torch.randn(score.shape)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def check(model, kind, options, data):
    other = copy.deepcopy(model).double()
    theirs = getattr(torch.optim, kind.__name__)(trained(other), **options)
    step = ls.train_step(model, ours := kind(trained(model), **options))
    for x, y in data:
        loss, expected = step(x, y), by_modules(other, theirs, x, y)
        close(loss.double(), expected, ROUNDINGS, torch.float32)
    wanted = other.state_dict()
    for name, value in model.state_dict().items():
        close(value, wanted[name].to(value.dtype), ROUNDINGS, msg=name)
    for a, b in zip(trained(model), trained(other), strict=True):
        for key, value in theirs.state[b].items():
            if isinstance(value, torch.Tensor):
                value = value.to(ours.state[a][key].dtype)
                close(ours.state[a][key], value, ROUNDINGS)


@masks
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name, options):
    kind, rates = OPTIMIZERS[name]
    check(network(**options), kind, rates, batches(WIDTHS[0], 33))


@masks
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_shapes(widths, batch, options):
    check(network(widths, **options), *OPTIMIZERS["momentum"], batches(widths, batch, 4))


@pytest.mark.parametrize("level", [-3.0, 3.0, -40.0, 40.0])
def test_few_ones_none_and_all(level):
    model = network(rescale=True, init_score=level)
    check(model, *OPTIMIZERS["sgd"], batches(WIDTHS[0], 33, 3))


@masks
def test_gradients_within_the_rounding_of_their_products(options):
    """The momentum of a first step is the gradient."""
    model = network((130, 33, 10), **options)
    layers = [model[1], model[3]]
    x, y = next(batches((130, 10), 60))
    drawn = [sample_mask(m.score, m.key).detach().double() for m in layers]
    score = [m.score.detach().double().requires_grad_() for m in layers]
    weights = []
    for m, s, layer in zip(drawn, score, layers, strict=True):
        p = torch.sigmoid(s)
        m = m + p - p.detach()
        w = layer.weight.double() * m
        weights.append(w * m.numel() / m.sum() if layer.rescale else w)
    hidden = F.linear(x.double(), weights[0], layers[0].bias.double()).relu()
    loss = F.cross_entropy(F.linear(hidden, weights[1], layers[1].bias.double()), y)
    wanted = torch.autograd.grad(loss, score)
    optimizer = torch.optim.SGD(trained(model), lr=0.1, momentum=0.9)
    ls.train_step(model, optimizer)(x, y)
    for layer, gradient in zip(layers, wanted, strict=True):
        got = optimizer.state[layer.score]["momentum_buffer"].double()
        close(got, gradient, dtype=torch.float32)


def test_masks_are_those_that_modules_draw():
    model = network(spread=0.0)
    twin = copy.deepcopy(model)
    frozen = ls.train_step(model, torch.optim.SGD(trained(model), lr=0.0))
    for x, y in batches(WIDTHS[0], 33, 5):
        expected = F.cross_entropy(twin(x), y)
        close(frozen(x, y), expected.detach())
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@masks
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_alone_and_in_company_and_for_any_thread_count(threads, options):
    models = [network(seed=e, **options) for e in range(3)]
    many = ls.ensemble.replicate(models)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = ls.train_step(many, torch.optim.SGD(trained(many), lr=1.0, momentum=0.9))
        alone = [
            ls.train_step(m, torch.optim.SGD(trained(m), lr=1.0, momentum=0.9)) for m in models
        ]
        for x, y in batches(WIDTHS[0], 60, 5, networks=(3,)):
            losses = together(x, y)
            for e, step in enumerate(alone):
                assert torch.equal(step(x[e], y[e]), losses[e])
    finally:
        torch.set_num_threads(before)
    for e, model in enumerate(models):
        one = ls.ensemble.select(many, e).state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(one[name], value), name


def test_resumed_from_state_dicts_is_the_same_to_the_bit():
    data = list(batches(WIDTHS[0], 33, 10))
    whole, model = network(rescale=True), network(rescale=True)
    kind, rates = OPTIMIZERS["momentum"]
    step = ls.train_step(whole, kind(trained(whole), **rates))
    for x, y in data:
        step(x, y)
    step = ls.train_step(model, optimizer := kind(trained(model), **rates))
    for x, y in data[:5]:
        step(x, y)
    fresh = network(spread=0.0, rescale=True)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = kind(trained(fresh), **rates)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step = ls.train_step(fresh, resumed)
    for x, y in data[5:]:
        step(x, y)
    for name, value in whole.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_steps_by_modules_can_follow_and_alternate():
    model, other = network(), network().double()
    kind, rates = OPTIMIZERS["momentum"]
    ours, theirs = kind(trained(model), **rates), kind(trained(other), **rates)
    step = ls.train_step(model, ours)
    for i, (x, y) in enumerate(batches(WIDTHS[0], 33, 8)):
        by_modules(model, ours, x, y) if i % 3 == 1 else step(x, y)
        by_modules(other, theirs, x, y)
    for a, b in zip(trained(model), trained(other), strict=True):
        close(a.double(), b, ROUNDINGS, torch.float32)


def test_learned_masks_beside_other_layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 31), nn.ReLU(), nn.Linear(31, 10)
        )
        ls.sparsify_(model, lambda m, name: name == "2")
        ls.set_masks_(model, {"2.weight": torch.rand(31, 33) < 0.3})
        ls.compact_(model)
        ls.supermask_(model, filter_fn=lambda m, name: name == "0")
    for name, p in model.named_parameters():
        p.requires_grad_(name not in ("0.weight", "0.bias"))
    other = expand_layers_(copy.deepcopy(model)).double()
    kind, rates = OPTIMIZERS["adam"]
    step = ls.train_step(model, kind(trained(model), **rates))
    theirs = kind(trained(other), **rates)
    for x, y in batches(WIDTHS[0], 33, 5):
        step(x, y)
        by_modules(other, theirs, x, y)
    for name, value in model.state_dict().items():
        wanted = other.state_dict()[name].to(value.dtype)
        close(value, wanted, ROUNDINGS, msg=name)


def test_an_optimizer_may_hold_what_is_frozen_too():
    model, other = network(), network()
    steps = [
        ls.train_step(m, torch.optim.SGD(p, lr=1.0))
        for m, p in ((model, model.parameters()), (other, trained(other)))
    ]
    for x, y in batches(WIDTHS[0], 33, 3):
        assert torch.equal(steps[0](x, y), steps[1](x, y))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_dropped_weight_holds_stays_out():
    model = network(bias=False, init_score=-50.0, spread=0.0)
    with torch.no_grad():
        model[1].score[:, ::2] = 1.0
        model[1].weight[:, 1::2] = torch.nan
    step = ls.train_step(model, torch.optim.SGD(trained(model), lr=0.0))
    x, y = next(batches(WIDTHS[0], 33, 1))
    assert step(x, y).isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[1].bias.requires_grad_(), "1.bias requires a gradient"),
        (lambda m: m[1].weight.requires_grad_(), "1.weight requires a gradient"),
        (lambda m: m[1].score.requires_grad_(False), "1.score does not require a gradient"),
        (lambda m: m.double(), "torch.float64"),
    ],
)
def test_what_is_not_done_is_refused(change, message):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    change(model)
    with pytest.raises(ValueError, match=message + r".*through the modules|" + message):
        ls.train_step(model, optimizer)


def test_rounded_masks_are_refused_by_a_step():
    model = network(round_mask=True)
    step = ls.train_step(model, torch.optim.SGD(trained(model), lr=0.1))
    with pytest.raises(ValueError, match=r"a layer rounds its mask.*through the modules"):
        step(*next(batches(WIDTHS[0], 33, 1)))


def test_a_call_that_fails_draws_nothing():
    model = network()
    step = ls.train_step(model, torch.optim.SGD(trained(model), lr=0.1))
    with pytest.raises(ValueError, match=r"^labels must be in \[0, \d+\), got -?\d+; ignore_index"):
        step(torch.randn(5, 40), torch.full((5,), 10))
    assert model[1].key[2] == 0
