"""replicate and select: what E networks compute side by side is what each computes alone."""

from __future__ import annotations

import pytest
import torch
from tolerances import close
from torch import nn

import lottery_sparse as ls

pytestmark = pytest.mark.numeric

E = 3


def stack(seed, kind="masked", density=0.4, frozen="zero"):
    """A small network; kind: "dense", "masked", "compact"."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(),
            nn.Sequential(nn.Linear(12, 9), nn.ReLU()),
            nn.Linear(9, 7, bias=False),
            nn.ReLU(),
            nn.Linear(7, 5),
        )
        if kind == "dense":
            return model
        ls.sparsify_(model)
        masks = {name: torch.rand(m.shape) < density for name, m in ls.masks_of(model).items()}
        ls.set_masks_(model, masks, frozen)
        return ls.compact_(model) if kind == "compact" else model


def images(seed, kind):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 5),
        )
        ls.sparsify_(model)
        masks = {name: torch.rand(m.shape) < 0.5 for name, m in ls.masks_of(model).items()}
        ls.set_masks_(model, masks)
        return ls.compact_(model) if kind == "compact" else model


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", ["dense", "masked", "compact"])
@pytest.mark.parametrize("shared", [True, False])
def test_networks_compute_what_each_computes_alone(kind, shared):
    models = [stack(e, kind) for e in range(E)]
    many = ls.ensemble.replicate(models)
    x = torch.randn(6, 3, 4) if shared else torch.randn(E, 6, 3, 4)
    y = many(x)
    assert y.shape == (E, 6, 5)
    y.square().mean((1, 2)).sum().backward()
    alone = [m(x if shared else x[e]) for e, m in enumerate(models)]
    close(y, torch.stack(alone))
    for e, (model, out) in enumerate(zip(models, alone, strict=True)):
        out.square().mean().backward()
        for p, q in zip(model.parameters(), many.parameters(), strict=True):
            own = q.grad[e].flatten()[: p.numel()].view(p.shape)
            close(own, p.grad)


@pytest.mark.parametrize("kind", ["masked", "compact"])
@pytest.mark.parametrize("shared", [True, False])
def test_convolutions_and_pooling(kind, shared):
    models = [images(e, kind) for e in range(E)]
    many = ls.ensemble.replicate(models)
    x = torch.randn(3, 2, 4, 4) if shared else torch.randn(E, 3, 2, 4, 4)
    alone = [m(x if shared else x[e]) for e, m in enumerate(models)]
    close(many(x), torch.stack(alone))
    same_state(ls.ensemble.select(many, 1), models[1])


@pytest.mark.parametrize("kind", ["dense", "masked", "compact"])
def test_select_gives_each_network_back(kind):
    models = [stack(e, kind, density=0.2 + 0.2 * e) for e in range(E)]
    many = ls.ensemble.replicate(models)
    for e, model in enumerate(models):
        one = ls.ensemble.select(many, e)
        same_state(one, model)
        assert [type(m) for m in one.modules()] == [type(m) for m in model.modules()]
        assert [p.shape for p in one.parameters()] == [p.shape for p in model.parameters()]
        one(torch.randn(2, 12)).sum().backward()  # no Parameter is shared with `many`
    assert all(p.grad is None for p in many.parameters())


@pytest.mark.parametrize("kind", ["masked", "compact"])
@pytest.mark.parametrize(
    "frozen",
    [
        [ls.frozen.Constant(0.25)] * E,
        [ls.frozen.Constant(0.1 * (e + 1)) for e in range(E)],
        [ls.frozen.Seeded("normal", seed=e) for e in range(E)],
        ["zero", ls.frozen.Constant(0.2), ls.frozen.Seeded("sign", seed=4)],
    ],
    ids=["constant", "constants", "seeded", "mixed"],
)
def test_frozen_values_come_along_and_back(kind, frozen):
    models = [stack(e, kind, frozen=source) for e, source in enumerate(frozen)]
    many = ls.ensemble.replicate(models)
    x = torch.randn(4, 12)
    close(many(x), torch.stack([m(x) for m in models]))
    for e, model in enumerate(models):
        same_state(ls.ensemble.select(many, e), model)


@pytest.mark.parametrize("kind", ["dense", "masked", "compact"])
def test_seeds_initialise_each_copy_anew(kind):
    model = stack(0, kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    many = ls.ensemble.replicate(model, seeds=[5, 6, 5])
    assert torch.equal(state, torch.get_rng_state())
    same_state(ls.ensemble.select(many, 0), ls.ensemble.select(many, 2))
    fresh = stack(5, "dense").state_dict()
    for e, network in enumerate(ls.ensemble.select(many, e) for e in range(E)):
        got = network.state_dict()
        for name, value in fresh.items():
            kept = got.get(f"{name}_mask", torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(got[name], torch.where(kept, value, 0.0)) == (e != 1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_copies_of_one_model():
    model = stack(0, "compact")
    many = ls.ensemble.replicate(model, E)
    assert all(p.shape[0] == E for p in many.parameters())
    for e in range(E):
        same_state(ls.ensemble.select(many, e), model)
    with torch.no_grad():
        for p in many.parameters():
            p[1].add_(1)
    same_state(ls.ensemble.select(many, 0), model)


def test_spare_slots_and_frozen_parameters_stay():
    model = stack(0)
    ls.compact_(model, spare=2)
    model[4].bias.requires_grad_(False)
    many = ls.ensemble.replicate(model, E)
    assert [m.capacity for m in many if hasattr(m, "capacity")] == [
        m.capacity for m in model if hasattr(m, "capacity")
    ]
    assert not many[4].bias.requires_grad


def test_an_x_that_fits_twice_is_shared_unless_it_has_rows():
    many = ls.ensemble.replicate(stack(0), E)
    assert many(torch.randn(E, 1, 3, 4)).shape == (E, E, 5)
    assert many(torch.randn(E, 1, 12)).shape == (E, 1, 5)
    with pytest.raises(ValueError, match="x has shape"):
        many(torch.randn(E, 4, 5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: (stack(0),), ValueError, "E must be at least 1"),
        (lambda: (stack(0), 0), ValueError, "E must be at least 1"),
        (lambda: (stack(0), 2, [1]), ValueError, "E is 2, but there are 1 seeds"),
        (lambda: ([stack(0), stack(1)], 3), ValueError, "a list of 2 models"),
        (lambda: (stack(0), "a"), TypeError, "E must be an int, the number of copies, got str"),
        (lambda: (stack(0), 2.5), TypeError, "E must be an int, the number of copies, got float"),
        (lambda: (stack(0), None, "ab"), TypeError, "seeds must be ints, one per copy, got 'ab'"),
        (lambda: (3, 2), TypeError, "a list of at least one"),
        (lambda: ([],), TypeError, "a list of at least one"),
        (lambda: ([stack(0), stack(0, "dense")],), ValueError, "differs from models.0. in struct"),
        (lambda: ([nn.Linear(2, 3), nn.Linear(3, 2)],), ValueError, "shape of layer 0"),
        (lambda: (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 2), TypeError, "1 is a Batch"),
        (lambda: (nn.Sequential(nn.Conv2d(2, 2, 1)), 2), TypeError, "call ls.sparsify_ first"),
        (lambda: (nn.Sequential(nn.Flatten(0)), 2), TypeError, "of dimensions 1 to -1"),
        (
            lambda: (ls.ensemble.replicate(stack(0), 2), 2),
            TypeError,
            "which has no form|side by side al",
        ),
    ],
)
def test_what_replicate_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        ls.ensemble.replicate(*arguments())


def test_shared_parameters_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with pytest.raises(TypeError, match="2 shares a parameter with 0"):
        ls.ensemble.replicate(model, 2)
    twice = nn.Sequential(model[0], model[1], model[0])  # one layer in two places
    with pytest.raises(TypeError, match="2 shares a parameter with 0"):
        ls.ensemble.replicate(twice, 2)


@pytest.mark.parametrize("e", [-1, E])
def test_select_needs_a_network_that_is_there(e):
    with pytest.raises(ValueError, match=f"there are {E} networks"):
        ls.ensemble.select(ls.ensemble.replicate(stack(0), E), e)
    with pytest.raises(ValueError, match="single network"):
        ls.ensemble.select(stack(0), 0)


def test_a_constant_set_on_networks_side_by_side_has_the_signs_of_each():
    networks = ls.ensemble.replicate(
        ls.sparsify_(nn.Sequential(nn.Linear(6, 4))), 3, seeds=[1, 2, 3]
    )
    before = networks[0].effective_weight.detach().clone()
    mask = torch.rand(3, 4, 6) < 0.5
    ls.set_masks_(networks, {"0.weight": mask}, frozen=ls.frozen.Constant(0.3))
    expected = torch.where(mask, before, torch.where(before >= 0, 0.3, -0.3))
    assert torch.equal(networks[0].effective_weight, expected)
    x = torch.randn(5, 6)
    y = networks(x)
    close(ls.compact_(networks)(x), y)
    close(ls.ensemble.select(networks, 1)(x), y[1])
