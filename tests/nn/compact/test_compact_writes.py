"""Who writes to the weights of a compact layer, by whatever way, and who reads them."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from masked_layers import SOURCES, masked
from torch import nn
from torch.nn.utils import vector_to_parameters

import lottery_sparse as ls
from lottery_sparse.nn.compact import following
from lottery_sparse.ops import dispatch

# Densities at which kernels skip what is pruned, and at which the dense library multiplies.
DENSITIES = 0.1, 0.5, 0.9
densities = pytest.mark.parametrize("density", DENSITIES)
needs_kernel = pytest.mark.skipif(not dispatch.built("cpu"), reason="the kernels are not built")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def layer_of(density, frozen="zero", conv=False, spare=0):
    dense = nn.Conv2d(4, 24, 3) if conv else nn.Linear(30, 40)
    return ls.compact_(masked(dense, frozen, density), spare=spare)


def input_of(layer, batch=7):
    return torch.randn(batch, 30) if isinstance(layer, nn.Linear) else torch.randn(batch, 4, 6, 6)


def assert_computes(layer, weight):
    """The layer computes with this dense weight, by every way and with every gradient."""
    x = input_of(layer)
    dense = ls.densify_(ls.sparsify_(copy.deepcopy(layer)))
    with torch.no_grad():
        dense.weight.copy_(weight)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [layer(xs[0]), dense(xs[1])]
    torch.testing.assert_close(*ys, **CLOSE)
    for y in ys:
        y.square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-4)
    layer.zero_grad()
    assert torch.equal(layer.state_dict()["weight"], weight)


def with_values(layer, values):
    """The dense weight whose kept entries are these, in row-major order."""
    frozen = layer.effective_weight.detach()
    return frozen.masked_scatter(layer.weight_mask, values)


# ---- writes that count no version ----------------------------------------------------------------


def assign(weight, values):
    weight.data = values.clone()


def copy_into(weight, values):
    weight.data.copy_(values)


def scale_and_add(weight, values):
    weight.data.mul_(0).add_(values)


def from_a_vector(weight, values):
    vector_to_parameters(values, [weight])


def through_numpy(weight, values):
    weight.detach().numpy()[:] = values.numpy()


WRITES = assign, copy_into, scale_and_add, from_a_vector, through_numpy


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("frozen", SOURCES)
@densities
def test_a_write_to_the_whole_vector_is_seen_by_the_next_forward(density, frozen, write):
    for conv in (False, True):
        layer = layer_of(density, frozen, conv)
        layer(input_of(layer))
        for _ in range(2):
            values = torch.randn_like(layer.weight)
            version = layer.weight._version
            write(layer.weight, values)
            assert layer.weight._version == version, "none of these counts one"
            assert_computes(layer, with_values(layer, values))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", [torch.optim.SGD, ls.optim.SGD, torch.optim.Adam, ls.optim.Adam])
@densities
def test_a_rewind_right_after_a_step(kind, write, density):
    layer = layer_of(density)
    start, weight = layer.weight.detach().clone(), layer.state_dict()["weight"].clone()
    x = input_of(layer)
    y = layer(x).detach()
    optimizer = kind(layer.parameters(), lr=0.1)
    bias = layer.bias.detach().clone()
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    write(layer.weight, start)
    layer.bias.data.copy_(bias)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.state_dict()["weight"], weight)


def test_a_write_to_a_few_slots_needs_refresh():
    layer = layer_of(0.9)
    x = input_of(layer)
    layer(x)
    kept = int(layer.weight_mask.sum())
    weight = layer.weight.data
    weight[1 : kept // 17] += 1  # between the first two slots that are looked at
    expected = with_values(layer, layer.weight.detach()).clone()
    ls.nn.refresh_(layer)
    assert_computes(layer, expected)


def test_networks_side_by_side_and_spare_slots_are_looked_at():
    layers = [masked(nn.Linear(30, 40), "zero", density) for density in (0.9, 0.3)]
    both = ls.compact_(ls.ensemble.replicate(layers), spare=2000)
    x = torch.randn(5, 30)
    both(x)
    kept = both.kept.kept.tolist()
    for e in range(2):
        both.weight.data[e, : kept[e]] *= 2  # one of them
        want = [x @ w.T + b for w, b in zip(both.effective_weight, both.bias, strict=True)]
        torch.testing.assert_close(both(x), torch.stack(want), **CLOSE)


@densities
def test_train_step_sees_them_too(density):
    if not dispatch.built("cpu"):
        pytest.skip("the kernels are not built")
    model = nn.Sequential(layer_of(density))
    x, y = torch.randn(9, 30), torch.randint(0, 40, (9,))
    step = ls.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for scale in (1, 3, 0.1):
        model[0].weight.data.mul_(scale)
        loss = step(x, y)
        expected = nn.functional.cross_entropy(
            nn.functional.linear(x, model[0].effective_weight, model[0].bias), y
        )
        torch.testing.assert_close(loss, expected, **CLOSE)


@needs_kernel
def test_a_compiled_forward_sees_them_after_refresh():
    layer = layer_of(0.9)
    x = input_of(layer)
    run = torch.compile(layer, backend="aot_eager")
    run(x)
    layer.weight.data.mul_(2)
    ls.nn.refresh_(layer)
    torch.testing.assert_close(run(x), layer(x), **CLOSE)


# ---- writes to the tensors of state_dict() -------------------------------------------------------


@pytest.mark.parametrize("frozen", SOURCES)
@densities
def test_what_is_written_to_state_dict_is_taken_in_and_frozen_values_stay(density, frozen):
    for conv in (False, True):
        layer = layer_of(density, frozen, conv, spare=3)
        state, mask = layer.state_dict(), layer.weight_mask
        held = state["weight"].clone()
        new = torch.randn_like(held)
        state["weight"].copy_(new)
        state["bias"].zero_()
        assert_computes(layer, torch.where(mask, new, held))
        kept = int(layer.kept.kept)
        assert torch.equal(layer.weight[:kept], new[mask])
        assert not layer.weight[kept:].any(), "spare slots hold zero"
        del state
        with torch.no_grad():  # the tensors of a state_dict that nobody else holds
            for name, value in layer.state_dict().items():
                if name in ("weight", "bias"):
                    value.mul_(0.5)
        assert torch.equal(layer.state_dict()["weight"], torch.where(mask, new * 0.5, held))


@pytest.mark.parametrize("kind", [torch.optim.SGD, ls.optim.SGD])
@densities
def test_an_optimizer_steps_from_what_was_written_to_state_dict(density, kind):
    layer = layer_of(density)
    optimizer = kind(layer.parameters(), lr=0.5)
    layer.weight.grad = torch.ones_like(layer.weight)
    new = torch.randn(40, 30)
    layer.state_dict()["weight"].copy_(new)
    optimizer.step()
    assert_computes(layer, torch.where(layer.weight_mask, new - 0.5, 0.0))


@densities
def test_train_step_steps_from_it(density):
    if not dispatch.built("cpu"):
        pytest.skip("the kernels are not built")
    model = nn.Sequential(layer_of(density))
    step = ls.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    x, y = torch.randn(9, 30), torch.randint(0, 40, (9,))
    step(x, y)
    model.state_dict()["0.weight"].mul_(2)
    twice = nn.functional.linear(x, model[0].effective_weight, model[0].bias)
    torch.testing.assert_close(step(x, y), nn.functional.cross_entropy(twice, y), **CLOSE)


@pytest.mark.parametrize("kind", [torch.optim.SGD, ls.optim.SGD])
@densities
def test_a_held_state_dict_follows_the_training(density, kind):
    layer = layer_of(density)
    state, x = layer.state_dict(), input_of(layer)
    optimizer = kind(layer.parameters(), lr=0.1)
    for _ in range(2):
        before = state["weight"].clone()
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(state["weight"], before)
        assert torch.equal(state["weight"], layer.effective_weight)


@densities
def test_averages_that_write_to_state_dict(density):
    """As the EMA of timm and of YOLO trainers do; decay 0 makes a copy of it."""
    model = nn.Sequential(layer_of(density), nn.ReLU(), nn.Linear(40, 3))
    average, x = copy.deepcopy(model).eval(), torch.randn(6, 30)
    average(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for decay in (0.5, 0.0):
        model(x).square().mean().backward()
        optimizer.step()
        state, was = model.state_dict(), average[0].effective_weight.detach()
        with torch.no_grad():
            for name, value in average.state_dict().items():
                if value.is_floating_point():
                    value.mul_(decay).add_(state[name], alpha=1 - decay)
        want = decay * was + (1 - decay) * model[0].effective_weight
        torch.testing.assert_close(average[0].effective_weight, want)
    assert torch.equal(average(x), model(x))


def test_layers_that_share_a_parameter_share_what_they_lend():
    for density in DENSITIES:
        model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
        model[1].weight = model[0].weight
        ls.sparsify_(model)
        ls.set_masks_(model, {"0.weight": torch.rand(9, 9) < density})
        ls.compact_(model)
        state, mask = model.state_dict(), model[0].weight_mask
        assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()
        new, x = torch.randn(9, 9), torch.randn(4, 9)
        state["1.weight"].copy_(new)
        kept = torch.where(mask, new, 0.0)
        want = nn.functional.linear(x, kept, model[0].bias)
        y = model(x)
        torch.testing.assert_close(y, nn.functional.linear(want, kept, model[1].bias), **CLOSE)
        y.sum().backward()  # the second forward did not write to what the first one saved
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert torch.equal(state["0.weight"], model[1].effective_weight)
        other = copy.deepcopy(model).double().float()
        assert torch.equal(other(x), model(x))


# ---- memory --------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, ls.optim.Adam])
def test_no_dense_weight_is_made_where_kernels_serve(monkeypatch, conv, kind):
    layer = layer_of(0.1, conv=conv)
    monkeypatch.setattr(following, "zeros_of", lambda *_: pytest.fail("a dense weight"))
    optimizer, x = kind(layer.parameters()), input_of(layer)
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
    assert layer._derived.dense.untyped_storage().nbytes() == 4
    if not conv:
        step = ls.train_step(nn.Sequential(layer), optimizer)
        step(x, torch.randint(0, 40, (7,)))
    copy.deepcopy(layer)(x)
    assert all(t.numel() < layer.weight_mask.numel() for t in layer.derived())


@needs_kernel
def test_what_readers_have_let_go_is_given_up():
    layer = layer_of(0.1)
    layer.state_dict()
    assert len(layer.derived()) == 6
    layer(input_of(layer))
    assert len(layer.derived()) == 5
    state = layer.state_dict()
    layer(input_of(layer))
    assert len(layer.derived()) == 6, "somebody has it"
    del state
    gc.collect()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert len(layer.derived()) == 5
    layer.products = "dense"
    layer(input_of(layer))
    assert len(layer.derived()) == 6
    layer.products = "auto"
    assert len(ls.compact_(layer).derived()) == 5
