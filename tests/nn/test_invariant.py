"""Masks hold: no optimizer moves the effective weight of a pruned entry by a single bit.

The layers are small, the steps many. What a pruned entry of the raw Parameter holds may drift, and
with weight decay or momentum it does; what the layer computes with may not.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lottery_sparse as ls

STEPS = 1000
DECAY = 1e-2

# (name, class, arguments); weight decay would move every pruned weight of a dense layer
OPTIMIZERS = [
    ("SGD-momentum", torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    ("SGD-nesterov", torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    ("Adam", torch.optim.Adam, {"lr": 0.01}),
    ("AdamW", torch.optim.AdamW, {"lr": 0.01}),
    ("RMSprop", torch.optim.RMSprop, {"lr": 0.001, "momentum": 0.9}),
    ("Adagrad", torch.optim.Adagrad, {"lr": 0.05}),
]
NOT_FUSED = (torch.optim.RMSprop,)  # torch has no fused form of it
RUNS = [
    pytest.param(kind, arguments | {"weight_decay": DECAY} | form, id=f"{name}-{form_name}")
    for name, kind, arguments in OPTIMIZERS
    for form_name, form in (
        ("single", {"foreach": False}),
        ("foreach", {"foreach": True}),
        ("fused", {"fused": True}),
    )
    if form_name != "fused" or kind not in NOT_FUSED
]


def network(convolution: bool = True) -> tuple[nn.Sequential, dict[str, torch.Tensor]]:
    """One layer per kind of frozen value, and what its pruned entries must hold."""
    model = ls.sparsify_(
        nn.Sequential(
            nn.Conv2d(1, 2, 3) if convolution else nn.Linear(4, 2),  # seeded
            nn.Flatten(),
            nn.Linear(8, 6),  # a tensor
            nn.Tanh(),
            nn.Linear(6, 6),  # sign x constant
            nn.Tanh(),
            nn.Linear(6, 3),  # zero
        )
    )
    masks = {name: torch.rand(mask.shape) > 0.5 for name, mask in ls.masks_of(model).items()}
    weights = {name: model.get_parameter(name).detach().clone() for name in masks}
    tensor = torch.randn(6, 8)
    ls.set_masks_(
        model,
        masks,
        frozen={
            "0.weight": ls.frozen.Seeded("normal", seed=7, std=0.5),
            "2.weight": tensor,
            "4.weight": ls.frozen.Constant(0.25),
        },
    )
    stream = ls.random.stream_of("0.weight")
    frozen = {
        "0.weight": ls.random.normal(weights["0.weight"].shape, 0.5, seed=7, stream=stream),
        "2.weight": tensor,
        "4.weight": torch.where(weights["4.weight"] >= 0, 0.25, -0.25),
        "6.weight": torch.zeros(3, 6),
    }
    return model, frozen


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.detach().contiguous().view(torch.int32)


def assert_pruned_hold(model: nn.Module, frozen: dict[str, torch.Tensor]) -> None:
    saved, dense = model.state_dict(), ls.dense_state_dict(model)
    for name, value in frozen.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        pruned = ~layer.weight_mask
        expected = bits(value)[pruned]
        for held in (layer.weight, layer.effective_weight, saved[name], dense[name]):
            assert torch.equal(bits(held)[pruned], expected), name


def gradients_at_pruned(model: nn.Module) -> int:
    """How many gradients at pruned entries are not exactly zero."""
    return sum(
        int((layer.weight.grad[~layer.weight_mask] != 0).sum())  # NaN counts too
        for layer in model
        if hasattr(layer, "weight_mask")
    )


@pytest.mark.parametrize(("kind", "arguments"), RUNS)
def test_pruned_weights_hold(kind, arguments):
    train_and_check(kind, arguments, convolution=False)


def test_pruned_weights_hold_in_a_convolution():
    train_and_check(torch.optim.AdamW, {"lr": 0.01, "weight_decay": DECAY}, convolution=True)


def train_and_check(kind, arguments, convolution):
    model, frozen = network(convolution)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(16, 1, 4, 4) if convolution else torch.randn(16, 4, 4)
    target = torch.randn(16, 3)
    optimizer = kind(model.parameters(), **arguments)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    overflow = STEPS // 2  # one step whose gradients are infinite: the scaler skips it
    drifted = set()

    def look(*_):  # runs before the hook that puts frozen values back
        for name, value in frozen.items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            if (bits(layer.weight) != bits(value))[~layer.weight_mask].any():
                drifted.add(name)

    optimizer.register_step_post_hook(look)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        scaler.scale(loss * math.inf if step == overflow else loss).backward()
        if step % 10 == 0:
            assert gradients_at_pruned(model) == 0
        if step % 2:  # unscaled for clipping, or inside the optimizer's own step
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        if step in (0, 1, overflow):
            assert_pruned_hold(model, frozen)

    assert_pruned_hold(model, frozen)
    for name in frozen:
        layer = model.get_submodule(name.removesuffix(".weight"))
        moved = layer.weight.detach() != start[name]
        assert moved[layer.weight_mask].all(), "kept weights train"
    # the proof that this test would see a leak: the step alone does move what is not zero
    assert drifted == frozen.keys() - {"6.weight"}
    ls.densify_(model)
    for name in frozen:
        assert torch.isfinite(model.get_parameter(name)).all()


def test_pruned_weights_hold_under_autocast():
    model, frozen = network()
    x, target = torch.randn(16, 1, 4, 4), torch.randn(16, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=DECAY)
    for _ in range(100):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x).float() - target).square().mean()
        loss.backward()
        assert gradients_at_pruned(model) == 0
        optimizer.step()
    assert_pruned_hold(model, frozen)


def test_momentum_from_before_the_mask_does_not_leak():
    model, _ = network()
    everything = {name: torch.ones_like(mask) for name, mask in ls.masks_of(model).items()}
    ls.set_masks_(model, everything)
    x = torch.randn(16, 1, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=DECAY)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for _ in range(10):
        step()
    masks = {name: torch.rand(mask.shape) > 0.5 for name, mask in everything.items()}
    ls.set_masks_(model, masks)
    for _ in range(10):
        step()
    zero = {name: torch.zeros(mask.shape) for name, mask in masks.items()}
    assert_pruned_hold(model, zero)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
def test_nothing_a_pruned_entry_holds_is_seen(poison):
    model, frozen = network()
    x = torch.randn(16, 1, 4, 4, requires_grad=True)

    def run():
        model.zero_grad()
        y = model(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        y.square().sum().backward()
        return [y, dx, *(p.grad.clone() for p in model.parameters())]

    clean = run()
    with torch.no_grad():
        for layer in model:
            if hasattr(layer, "weight_mask"):
                layer.weight[~layer.weight_mask] = poison
    for before, after in zip(clean, run(), strict=True):
        assert torch.equal(before, after)
    assert_pruned_hold(model, frozen)


def test_averaged_model_holds():
    model, frozen = network()
    average = torch.optim.swa_utils.AveragedModel(model)
    x = torch.randn(16, 1, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    assert_pruned_hold(average.module, frozen)
