"""CompactLinear and CompactConv2d train, copy and convert as the masked layers do."""

from __future__ import annotations

import copy

import pytest
import torch
from masked_layers import SOURCES, masked
from test_modules import CONVOLUTIONS, LINEAR_INPUTS
from tolerances import USUAL, close
from torch import nn
from torch.utils.checkpoint import checkpoint

import lottery_sparse as ls

pytestmark = pytest.mark.numeric

frozen = pytest.mark.parametrize("frozen", SOURCES)
# Adam and its kin divide: it keeps them from magnifying the rounding of tiny gradients
EPS = 1e-3


def pair(layer, frozen="zero", density=0.4, spare=3):
    """The masked layer and its compact twin."""
    plain = masked(layer, frozen, density)
    return plain, ls.compact_(copy.deepcopy(plain), spare=spare)


def network():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.Linear(6, 3)
    )


def pair_of_networks(source="zero", spare=2, seed=0):
    torch.manual_seed(seed)
    plain = ls.sparsify_(network())
    masks = {n: torch.rand(m.shape) < 0.4 for n, m in ls.masks_of(plain).items()}
    ls.set_masks_(plain, masks, source)
    return plain, ls.compact_(copy.deepcopy(plain), spare=spare)


def same_weights(compact, plain, roundings=0):
    a, b = compact.state_dict(), plain.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        close(a[name], b[name], roundings)


def is_fresh(model):
    layers = [m for m in model.modules() if hasattr(m, "weight_effective")]
    return all(torch.equal(m.weight_effective, m.effective_weight) for m in layers)


def dense_gradient(layer):
    """The gradient of a compact layer as one of its dense weight."""
    blank, kept = torch.zeros_like(layer.weight_effective), layer.kept
    return ls.ops.compact.reference.kept_weight(layer.weight.grad, blank, kept.starts, kept.columns)


def assert_same_step(compact, plain, x, roundings=None, layout=True):
    xs = [x.detach().clone().requires_grad_() for _ in range(2)]
    ys = [compact(xs[0]), plain(xs[1])]
    close(*ys, roundings)
    assert not layout or ys[0].stride() == ys[1].stride()
    dy = torch.randn_like(ys[0])
    for y in ys:
        y.backward(dy)
    close(xs[0].grad, xs[1].grad, roundings)
    close(dense_gradient(compact), plain.weight.grad, roundings)
    spare = compact.weight.grad[int(compact.kept.kept) :]
    assert (spare == 0).all()
    if plain.bias is not None:
        close(compact.bias.grad, plain.bias.grad, roundings)


# ---- one step: every argument of the masked layers ----------------------------------------------


@frozen
@pytest.mark.parametrize("shape", LINEAR_INPUTS, ids=str)
def test_linear_equals_the_masked_layer(shape, frozen):
    for density in (1.0, 0.5, 0.2):
        plain, compact = pair(nn.Linear(7, 6, bias=shape != (5, 7)), frozen, density)
        assert type(compact) is ls.nn.CompactLinear
        assert compact.weight.shape == (min(int(plain.weight_mask.sum()) + 3, 42),)
        assert_same_step(compact, plain, torch.randn(shape))
        same_weights(compact, plain)


def test_a_layer_that_keeps_nothing():
    layer = ls.sparsify_(nn.Linear(7, 6))
    with pytest.warns(UserWarning, match="layer collapse"):
        ls.set_masks_(layer, {"weight": torch.zeros(6, 7)})
    compact = ls.compact_(copy.deepcopy(layer))
    assert compact.weight.shape == (0,)
    assert_same_step(compact, layer, torch.randn(5, 7))
    optimizer = torch.optim.Adam(compact.parameters())
    optimizer.step()
    assert torch.equal(compact(torch.randn(2, 7)), compact.bias.expand(2, 6))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # nn.Conv2d's own
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
def test_conv2d_equals_the_masked_layer(arguments, channels_last):
    layer = nn.Conv2d(4, 8, **arguments).double()
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for density, held in ((1.0, "zero"), (0.4, "zero"), (0.4, "tensor"), (0.4, "constant")):
        plain, compact = pair(copy.deepcopy(layer), held, density)
        if channels_last:
            plain = plain.to(memory_format=torch.channels_last)
            compact = compact.to(memory_format=torch.channels_last)
        assert_same_step(compact, plain, x)
        # one image alone, whose layout torch's own layer does not take from its weight
        assert_same_step(compact, plain, torch.randn(4, 8, 9, dtype=torch.float64), layout=False)


def test_networks_side_by_side():
    layer = nn.Linear(7, 6)
    layer.weight = nn.Parameter(torch.randn(3, 6, 7))
    layer.bias = nn.Parameter(torch.randn(3, 6))
    mask = torch.rand(3, 6, 7) < torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1)
    plain = masked(layer, mask=mask)
    compact = ls.compact_(copy.deepcopy(plain))
    assert compact.weight.shape == (3, int(mask.sum((1, 2)).max()))
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01, eps=EPS) for m in (plain, compact)]
    for x in (torch.randn(5, 7), torch.randn(3, 5, 7)):
        for model, optimizer in zip((plain, compact), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        close(dense_gradient(compact), plain.weight.grad)
    same_weights(compact, plain, 10 * USUAL)
    masks = {"weight": mask.roll(1, -1)}
    for model, optimizer in zip((plain, compact), optimizers, strict=True):
        ls.set_masks_(model, masks, torch.full((3, 6, 7), 0.5), optimizer)
    plain.load_state_dict(compact.state_dict())  # regrown weights: the plain one had raw values
    x = torch.randn(5, 7)
    close(compact(x), plain(x))


@frozen
@pytest.mark.parametrize("convolution", [False, True])
def test_reset_parameters_draws_what_the_masked_layer_draws(frozen, convolution):
    plain, compact = pair(nn.Conv2d(2, 4, 3) if convolution else nn.Linear(7, 6), frozen)
    before, parameter = compact.effective_weight.detach().clone(), compact.weight
    frozen_values = before[~compact.weight_mask]
    for layer in (plain, compact):
        torch.manual_seed(5)
        layer.reset_parameters()
    assert compact.weight is parameter
    assert not torch.equal(compact.effective_weight, before)
    same_weights(compact, plain)
    assert torch.equal(compact.effective_weight[~compact.weight_mask], frozen_values)
    assert is_fresh(compact)
    assert (compact.weight[int(compact.kept.kept) :] == 0).all(), "spare slots hold nothing"


def test_reset_parameters_reaches_layers_that_share_a_weight_and_compiled_calls():
    model = ls.compact_(tied())
    first, other = [m for m in model.modules() if isinstance(m, ls.nn.CompactLinear)][:2]
    assert first.weight is other.weight
    first.reset_parameters()
    assert not other.refreshes_lazily, "what a compiled call reads, which checks no version"
    assert torch.equal(other._derived.dense, other.effective_weight)


@pytest.mark.parametrize("form", [ls.compact_, lambda model: model])
def test_reset_parameters_of_networks_side_by_side_draws_each_in_order(form):
    plain, _ = pair(nn.Linear(7, 6))
    networks = form(ls.ensemble.replicate(plain, 3))
    torch.manual_seed(5)
    networks.reset_parameters()
    torch.manual_seed(5)
    for e in range(3):
        plain.reset_parameters()
        same_weights(ls.ensemble.select(networks, e), plain)


def test_constructors_and_repr():
    for kind, dense, arguments in (
        (ls.nn.CompactLinear, nn.Linear, (3, 4)),
        (ls.nn.CompactConv2d, nn.Conv2d, (3, 4, 3)),
    ):
        torch.manual_seed(0)
        new = kind(*arguments, bias=False, dtype=torch.float64)
        torch.manual_seed(0)
        old = dense(*arguments, bias=False, dtype=torch.float64)
        assert torch.equal(new.weight, old.weight.flatten()), "same initialisation"
        assert (new.density, new.capacity, new.bias) == (1, old.weight.numel(), None)
        assert repr(new) == repr(old).replace(dense.__name__, kind.__name__)[:-1] + ", density=1)"


def test_an_input_that_does_not_fit_names_it():
    _, compact = pair(nn.Linear(7, 6))
    for x in (torch.randn(3, 6), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"input has shape.*needs \[\.\.\., 7\]"):
            compact(x)
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 5, 5\)"):
        pair(nn.Conv2d(4, 8, 3))[1](torch.randn(1, 3, 5, 5))


# ---- twenty steps with the optimizers of torch ------------------------------------------------

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD-momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}),
    "SGD-nesterov-foreach": (
        torch.optim.SGD,
        {"lr": 0.02, "momentum": 0.9, "nesterov": True, "foreach": True},
    ),
    "SGD-fused": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "fused": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "eps": EPS, "amsgrad": True}),
    "Adam-fused": (torch.optim.Adam, {"lr": 0.01, "eps": EPS, "fused": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "eps": EPS, "weight_decay": 0.1}),
    "AdamW-fused": (torch.optim.AdamW, {"lr": 0.01, "eps": EPS, "fused": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.001, "momentum": 0.9, "centered": True, "eps": EPS}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05, "eps": EPS}),
}


def train(model, optimizer, steps=20, scheduler=None, clip=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 1, 4, 4, generator=generator)
        (model(x) - x.sum((1, 2, 3)).view(-1, 1)).square().mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model


@pytest.mark.parametrize("source", ["zero", ls.frozen.Constant(0.2)], ids=["zero", "constant"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_as_the_masked_model(name, source):
    kind, arguments = OPTIMIZERS[name]
    models = pair_of_networks(source)
    start = copy.deepcopy(models[0].state_dict())
    for model in models:
        train(model, kind(model.parameters(), **arguments))
    assert is_fresh(models[1]), "the hook has refreshed after the last step"
    same_weights(models[1], models[0], 20 * USUAL)
    moved = {
        n: (v - start[n]).abs().max() for n, v in models[1].state_dict().items() if "bias" in n
    }
    assert min(moved.values()) > 1e-3, "and trained"


def test_schedulers_clipping_and_groups():
    models = pair_of_networks()
    for model in models:
        groups = [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": [model[3].weight, *model[4].parameters()], "weight_decay": 0.1},
            {"params": [model[3].bias]},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        train(model, optimizer, 20, scheduler, clip=0.5)
    assert is_fresh(models[1])
    same_weights(models[1], models[0], 20 * USUAL)


def test_clip_grad_norm_measures_kept_gradients():
    plain, compact = pair_of_networks(ls.frozen.Constant(0.1))
    x = torch.randn(4, 1, 4, 4)
    for model in (plain, compact):
        model(x).square().sum().backward()
    norms = [nn.utils.clip_grad_norm_(m.parameters(), 1.0) for m in (plain, compact)]
    close(*norms)


def test_gradient_accumulation_and_two_forwards_before_backward():
    plain, compact = pair_of_networks()
    xs = torch.randn(3, 4, 1, 4, 4)
    for model in (plain, compact):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in xs:
            model(x).square().mean().backward()
        losses = [model(x).square().mean() for x in xs]
        sum(losses[1:], losses[0]).backward()
        optimizer.step()
    same_weights(compact, plain, 10 * USUAL)


def test_a_step_between_forward_and_backward_raises_as_in_a_dense_layer():
    for model in (nn.Linear(7, 6), *pair(nn.Linear(7, 6))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(3, 7, requires_grad=True)
        model(x).sum().backward()
        y = model(x).square().sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_a_mask_between_forward_and_backward_raises():
    _, compact = pair(nn.Linear(7, 6))
    y = compact(torch.randn(3, 7)).square().sum()
    ls.set_masks_(compact, {"weight": compact.weight_mask.roll(1, 1)})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    _, compact = pair_of_networks(ls.frozen.Constant(0.1))
    x = torch.randn(4, 1, 4, 4, requires_grad=True)
    compact(x).square().sum().backward()
    expected = [p.grad.clone() for p in compact.parameters()]
    compact.zero_grad()
    checkpoint(compact, x, use_reentrant=reentrant).square().sum().backward()
    for parameter, gradient in zip(compact.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    ls.sparsify_(model)
    masks = {"0.weight": torch.rand(6, 6) < 0.4, "4.weight": torch.rand(2, 6) < 0.5}
    return ls.set_masks_(model, masks, ls.frozen.Seeded("normal", 1))


def test_layers_that_share_a_weight():
    plain = tied()
    compact = ls.compact_(copy.deepcopy(plain), spare=2)
    assert compact[0].weight is compact[2].weight
    assert len(list(compact.parameters())) == 5
    optimizers = [
        torch.optim.Adam(m.parameters(), lr=0.02, eps=EPS, fused=True) for m in (plain, compact)
    ]

    def steps():
        for model, optimizer in zip((plain, compact), optimizers, strict=True):
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.ones(3, 6)).square().sum().backward()
                optimizer.step()
        assert is_fresh(compact)
        same_weights(compact, plain, 10 * USUAL)

    steps()
    masks = {"0.weight": ls.masks_of(plain)["0.weight"].roll(1, 0)}
    for model, optimizer in zip((plain, compact), optimizers, strict=True):
        ls.set_masks_(model, masks, ls.frozen.Constant(0.1), optimizer)
    assert torch.equal(compact[0].weight_effective, compact[2].weight_effective)
    # where the mask regrows, the plain layer takes up its raw weight, the compact one what it held
    for model in (plain, compact):
        model.load_state_dict(copy.deepcopy(compact.state_dict()))
    steps()
    ls.sparsify_(compact, optimizer=optimizers[1])
    assert compact[0].weight is compact[2].weight
    steps()
