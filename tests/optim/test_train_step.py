"""train_step against autograd and torch's optimizers in float64, step by step."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from step_problems import (
    BATCHES,
    FROZEN,
    OPTIMIZERS,
    ROUNDINGS,
    STEPS,
    WIDTHS,
    assert_same,
    batches,
    by_modules,
    check,
    network,
    twin,
)
from tolerances import close, of_sum
from torch import nn

import lottery_sparse as ls
from lottery_sparse.ops import dispatch
from lottery_sparse.optim import train_step as step_module

if not dispatch.built("cpu"):
    pytest.skip("the native kernels (lottery_sparse._C) are not built", allow_module_level=True)

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore:.*layer collapse")]

# which products are dense: (for outputs and inputs' gradients, for weights' gradients)
PRODUCTS = {"sparse": (2, 2), "dense": (-1, -1), "multiply": (-1, 2), "sample": (2, -1)}


@pytest.fixture
def products(request, monkeypatch):
    """Dense or sparse products, whatever the density."""
    multiply, sample = PRODUCTS[request.param]
    monkeypatch.setattr(step_module, "MAX_DENSITY_STEP", multiply)
    monkeypatch.setattr(step_module, "MAX_DENSITY_STEP_SAMPLED", sample)


every_product = pytest.mark.parametrize("products", PRODUCTS, indirect=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name):
    check(network(), *OPTIMIZERS[name], batches(WIDTHS[0], 33))


@every_product
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.6, 1.0])
def test_widths_and_densities(widths, density, products):
    check(network(widths, density), *OPTIMIZERS["adam"], batches(widths, 33, 4))


@every_product
@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("batch", [1, 33, 60])
def test_gradients_within_the_rounding_of_their_products(density, batch, products):
    """The momentum of a first step is the gradient."""
    model = network((130, 33, 10), density, frozen=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = next(batches((130, 10), batch))
    layers = [model[1], model[3]]
    w = [layer.weight_effective.double() for layer in layers]
    b = [layer.bias.detach().double() for layer in layers]
    inputs = [x.double(), (x.double() @ w[0].T + b[0]).relu()]
    logits = inputs[1] @ w[1].T + b[1]
    dy = [None, (logits.softmax(1) - F.one_hot(y, 10)) / batch]
    dy[0] = (dy[1] @ w[1]) * (inputs[1] > 0)
    # the same sums of absolute values; a softmax is as exact as its logits
    sizes = [inputs[0].abs(), inputs[0].abs() @ w[0].abs().T + b[0].abs()]
    logit_size = (sizes[1] @ w[1].abs().T + b[1].abs()).amax(1, keepdim=True)
    lost = [None, dy[1].abs() + logits.softmax(1) * logit_size / batch]
    lost[0] = (lost[1] @ w[1].abs()) * (inputs[1] > 0)
    ls.train_step(model, optimizer)(x, y)
    for i, layer in enumerate(layers):
        got = optimizer.state[layer.weight]["momentum_buffer"].double()
        rows, columns = layer.weight_mask.nonzero().unbind(1)
        wanted, size = dy[i].T @ inputs[i], lost[i].T @ sizes[i]
        # through the sums of both layers, of the softmax and of the batch
        allowed = of_sum(wanted, size, 130 + 33 + 2 * 10 + batch, torch.float32)[rows, columns]
        assert ((got - wanted[rows, columns]).abs() <= allowed).all()


@every_product
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=list(FROZEN))
@pytest.mark.parametrize("density", [0.0, 0.3, 0.9])
def test_frozen_values(frozen, density, products):
    model = network(density=density, frozen=frozen)
    check(model, *OPTIMIZERS["momentum"], batches(WIDTHS[0], 33, 4))


@pytest.mark.parametrize("plain", [(2,), (0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("name", ["adam", "nesterov", "sgd"])
def test_plain_layers(plain, name):
    model = network(plain=plain)
    check(model, *OPTIMIZERS[name], batches(WIDTHS[0], 33, 6))
    models = [network(plain=plain, density=d, seed=e) for e, d in enumerate((0.1, 0.7))]
    check(ls.ensemble.replicate(models), *OPTIMIZERS[name], batches(WIDTHS[0], 33, 4, (2,)))


@every_product
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("bias", [True, False])
def test_batches(batch, bias, products):
    model = network(bias=bias)
    check(model, *OPTIMIZERS["momentum"], batches(WIDTHS[0], batch, 5))


@pytest.mark.parametrize("own_x", [True, False])
@pytest.mark.parametrize("own_y", [True, False])
@pytest.mark.parametrize("name", ["adam", "nesterov"])
def test_networks_side_by_side(own_x, own_y, name):
    models = [network(density=d, seed=e) for e, d in enumerate((0.05, 0.5, 1.0))]
    data = [
        (x if own_x else x[0], y if own_y else y[0]) for x, y in batches(WIDTHS[0], 35, 6, (3,))
    ]
    check(ls.ensemble.replicate(models), *OPTIMIZERS[name], data)


@pytest.mark.parametrize("name", ["adam", "momentum"])
@pytest.mark.parametrize("options_of_models", [{}, {"frozen": None}, {"plain": (1,)}], ids=str)
def test_the_same_bits_alone_and_in_company_and_for_any_thread_count(name, options_of_models):
    kind, options = OPTIMIZERS[name]
    models = [
        network(density=d, seed=e, **options_of_models)
        for e, d in enumerate((0.05, 0.5, 1.0, 0.3, 0.1))
    ]
    results = []
    data = list(batches(WIDTHS[0], 35, 3))
    for threads in (1, 2, 3, 7):
        many = ls.ensemble.replicate(models)
        step = ls.train_step(many, kind(many.parameters(), **options))
        torch.set_num_threads(threads)
        losses = [step(x, y) for x, y in data]
        torch.set_num_threads(1)
        results.append((many, torch.stack(losses)))
    first, losses = results[0]
    for other, other_losses in results[1:]:
        assert torch.equal(losses, other_losses)
        assert all(map(torch.equal, first.parameters(), other.parameters()))
    for e, model in enumerate(models):
        step = ls.train_step(model, kind(model.parameters(), **options))
        assert torch.equal(torch.stack([step(x, y) for x, y in data]), losses[:, e])
        state = ls.ensemble.select(first, e).state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key]), key


def test_the_optimizer_keeps_its_state_and_modules_may_go_on():
    kind, options = OPTIMIZERS["adam"]
    model = network()
    other, other_optimizer = twin(model, kind, options)
    optimizer = kind(model.parameters(), **options)
    step = ls.train_step(model, optimizer)
    for i, (x, y) in enumerate(batches(WIDTHS[0], 33)):
        step(x, y) if i % 3 else by_modules(model, optimizer, x, y)
        by_modules(other, other_optimizer, x, y)
        if i == 9:  # a checkpoint in between
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(saved)
    assert_same(model, other)
    assert {float(s["step"]) for s in optimizer.state.values()} == {float(STEPS)}
    assert len(optimizer.state) == 6


@pytest.mark.parametrize("density", [0.2, 0.8])
def test_weights_may_be_written_between_steps(density):
    kind, options = OPTIMIZERS["momentum"]
    model = network(density=density)
    other, other_optimizer = twin(model, kind, options)
    step = ls.train_step(model, kind(model.parameters(), **options))
    for i, (x, y) in enumerate(batches(WIDTHS[0], 33, 6)):
        loss = step(x, y)
        expected = by_modules(other, other_optimizer, x, y)
        close(loss.double(), expected, ROUNDINGS, torch.float32)
        with torch.no_grad():
            close(model(x).double(), other(x.double()), ROUNDINGS, torch.float32)
            if i == 2:
                for p in (*model.parameters(), *other.parameters()):
                    p.mul_(0.5)
            if i == 4:  # other storage under the same Parameters
                for p in model.parameters():
                    p.data = p.data.clone()
    assert_same(model, other)


@pytest.mark.parametrize(
    ("density", "products", "written"),
    [(0.1, "auto", False), (0.1, "dense", True), (0.9, "auto", True)],
)
def test_effective_weights_are_written_where_something_reads_them(density, products, written):
    model = network((40, 10), density)
    layer = model[1]
    before = layer.weight_effective.clone()
    step = ls.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = list(batches((40, 10), 5, 2))
    step(*data[0])
    layer.products = products
    step(*data[1])
    assert layer._derived.dense.any() == written, (
        "zeros without memory of their own where none reads it"
    )
    assert not torch.equal(layer.weight_effective, before)


def test_options_are_read_in_every_call():
    kind, options = OPTIMIZERS["momentum"]
    model = network()
    other, other_optimizer = twin(model, kind, options)
    optimizer = kind(model.parameters(), **options)
    step = ls.train_step(model, optimizer)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, other_optimizer)]
    for x, y in batches(WIDTHS[0], 33, 8):
        step(x, y)
        optimizer.step()  # for the scheduler's order; no gradients, so nothing happens
        by_modules(other, other_optimizer, x, y)
        for scheduler in schedulers:
            scheduler.step()
    assert_same(model, other)


def test_groups_with_options_of_their_own():
    model = network()
    other = ls.sparsify_(copy.deepcopy(model)).double()

    def groups(m):
        layers = [layer for layer in m if isinstance(layer, nn.Linear)]
        weights = [layer.weight for layer in layers]
        return [
            {"params": weights, "weight_decay": 0.1},
            {"params": [layer.bias for layer in layers], "lr": 0.003},
        ]

    optimizers = [torch.optim.AdamW(groups(m), lr=0.01, eps=1e-3) for m in (model, other)]
    step = ls.train_step(model, optimizers[0])
    for x, y in batches(WIDTHS[0], 33, 8):
        step(x, y)
        by_modules(other, optimizers[1], x, y)
    assert_same(model, other)


def test_images_nested_stacks_and_names():
    flat = network((12, 9, 4))
    model = nn.Sequential(OrderedDict(start=flat[0], body=nn.Sequential(*flat[1:3]), end=flat[3]))
    step = ls.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = torch.randn(7, 3, 2, 2), torch.randint(4, (7,))
    with torch.no_grad():
        expected = F.cross_entropy(model(x), y)
    close(step(x, y), expected)


def test_spare_slots_stay_zero_and_masks_may_change():
    model = network(compact=False)
    ls.compact_(model, spare=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step = ls.train_step(model, optimizer)
    for x, y in batches(WIDTHS[0], 33, 3):
        step(x, y)
    assert all((layer.weight[-3:] == 0).all() for layer in model if hasattr(layer, "kept"))
    masks = {k: m & (torch.rand(m.shape) < 0.5) for k, m in ls.masks_of(model).items()}
    ls.set_masks_(model, masks, optimizer=optimizer)
    other = copy.deepcopy(model)
    for x, y in batches(WIDTHS[0], 33, 3):
        step(x, y)
    for layer, before in zip(model, other, strict=True):
        if hasattr(layer, "kept"):
            assert (layer.weight_effective[~layer.weight_mask] == 0).all()
            assert not torch.equal(layer.weight, before.weight)


@every_product
def test_spare_slots_of_dense_products(products):
    model = network(compact=False)
    masks = ls.masks_of(model)
    ls.compact_(model, spare=40)
    check(model, *OPTIMIZERS["adam"], batches(WIDTHS[0], 33, 3))
    assert all((layer.weight[-40:] == 0).all() for layer in model if hasattr(layer, "kept"))
    ls.set_masks_(model, {k: m | (torch.rand(m.shape) < 0.01) for k, m in masks.items()})
    check(model, *OPTIMIZERS["adam"], batches(WIDTHS[0], 33, 3))


def test_a_replaced_weight_is_an_error():
    model = network()
    step = ls.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    with pytest.raises(ValueError, match=r"was replaced .* call it anew"):
        step(*next(batches(WIDTHS[0], 5)))


def test_not_a_number_stays_one():
    model = network()
    step = ls.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = next(batches(WIDTHS[0], 5))
    x[2, 3] = torch.nan
    assert step(x, y).isnan()


def test_versions_are_raised():
    model = network()
    step = ls.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = [p._version for p in model.parameters()]
    step(*next(batches(WIDTHS[0], 5)))
    assert all(p._version > b for p, b in zip(model.parameters(), before, strict=True))
