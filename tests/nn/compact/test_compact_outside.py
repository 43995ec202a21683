"""Compact models and tools that look behind Parameters: saved, swapped, moved away, called."""

from __future__ import annotations

import copy

import pytest
import torch
from masked_layers import SOURCES, masked
from safetensors.torch import load_model, save_file, save_model
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import lottery_sparse as ls

frozen = pytest.mark.parametrize("frozen", SOURCES)
densities = pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def model_of(density=0.5, frozen="zero"):
    return ls.compact_(
        nn.Sequential(
            masked(nn.Conv2d(2, 4, 3), frozen, density),
            nn.Flatten(),
            masked(nn.Linear(16, 5), frozen, density),
        )
    )


def input_of():
    return torch.randn(3, 2, 4, 4)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


# ---- safetensors ---------------------------------------------------------------------------------


@frozen
@densities
def test_save_model_and_load_model(tmp_path, density, frozen):
    model, x = model_of(density, frozen), input_of()
    for value in model.state_dict().values():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    save_model(model, tmp_path / "a")
    save_file(model.state_dict(), tmp_path / "b")
    for other in (ls.sparsify_(model_of()), ls.compact_(ls.sparsify_(model_of()), spare=64)):
        load_model(other, tmp_path / "a")
        torch.testing.assert_close(other(x), model(x), **CLOSE)


@densities
@pytest.mark.parametrize("compact", [False, True])
def test_tied_weights(tmp_path, density, compact):
    model, x = ls.sparsify_(Tied()), torch.randn(2, 8)
    ls.set_masks_(model, {"a.weight": torch.rand(8, 8) < density})
    if compact:
        ls.compact_(model)
        state = model.state_dict()
        assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()
        save_model(model, tmp_path / "a")
        other = ls.compact_(ls.sparsify_(Tied()))
        load_model(other, tmp_path / "a")
        torch.testing.assert_close(other(x), model(x), **CLOSE)
        assert other.a.weight is other.b.weight
    for other in (copy.deepcopy(model), copy.deepcopy(model).double().float()):
        torch.testing.assert_close(other(x), model(x), **CLOSE)
        other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
        torch.testing.assert_close(other(x), model(x), **CLOSE)


# ---- torch ---------------------------------------------------------------------------------------


@frozen
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_parameters_that_are_swapped(density, frozen):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model, x = model_of(density, frozen), input_of()
        y, parameters = model(x).detach(), list(model.parameters())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        torch.testing.assert_close(model.double()(x.double()).float(), y, **CLOSE)
        model.float()
        for assign in (False, True):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, value in model.state_dict().items():
                layer = model[int(name[0])]
                if name.endswith("weight"):
                    assert torch.equal(value, layer.effective_weight)
                    assert not torch.equal(value, state[name])
            model.load_state_dict(state, assign=assign)
            torch.testing.assert_close(model(x), y, **CLOSE)
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@densities
def test_a_vector_of_parameters_goes_round(density):
    model, x = model_of(density), input_of()
    y = model(x).detach()
    vector = parameters_to_vector(model.parameters()).detach().clone()
    vector_to_parameters(torch.randn_like(vector), model.parameters())
    assert not torch.allclose(model(x), y)
    vector_to_parameters(vector, model.parameters())
    assert torch.equal(model(x), y)


@frozen
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_a_functional_call_takes_the_parameters_it_is_given(density, frozen):
    model, x = model_of(density, frozen), input_of()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    before = model(x).detach()
    y = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(y, other(x), **CLOSE)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_stacked_networks_of_one_mask(density):
    first = model_of(density)
    models = [first, copy.deepcopy(first)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(0.1)
    parameters, buffers = torch.func.stack_module_state(models)
    x = input_of()

    def call(parameters, buffers):
        return torch.func.functional_call(first, (parameters, buffers), (x,))

    got = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([m(x) for m in models]), **CLOSE)


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_a_weight_that_was_moved_away_says_so(density):
    """As accelerate and others do with the Parameters of a module that waits on the disk."""
    layer = model_of(density)[2]
    x, weight = torch.randn(2, 16), layer.weight
    y = layer(x).detach()
    layer._parameters["weight"] = nn.Parameter(torch.empty_like(weight, device="meta"))
    with pytest.raises((RuntimeError, ValueError), match=r"on meta, but .* on cpu; move"):
        layer(x)
    layer._parameters["weight"] = weight
    assert torch.equal(layer(x), y)
    layer._parameters["weight"] = nn.Parameter(weight.detach().clone().mul_(2))
    torch.testing.assert_close(layer(x), 2 * (y - layer.bias) + layer.bias, **CLOSE)
