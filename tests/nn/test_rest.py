"""The Parameter is the weight: whoever reads or writes tensors sees what the layer computes with.

Each way of writing is used on a dense, a masked and a compact model. The dense one, whose weights
are selected by hand afterwards, says what must come out.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from masked_layers import SOURCES
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
)

import lottery_sparse as ls

frozen_sources = pytest.mark.parametrize("frozen", SOURCES)
densities = pytest.mark.parametrize("density", [0.1, 0.6], ids=["kernel", "dense"])


def dense_model():
    """The linear layers are large enough for both ways through a product."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(192, 40), nn.ReLU(), nn.Linear(40, 5)
    )


LAYERS = (0, 2, 4)
X = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def source_of(model, frozen):
    source = SOURCES[frozen]
    if not callable(source):
        return source
    return {f"{i}.weight": source(model[i].weight.detach()) for i in LAYERS}


def masks_at(model, density, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(mask.shape, generator=generator) < density
        for name, mask in ls.masks_of(model).items()
    }


def masked_model(frozen="zero", density=0.6, form="masked"):
    model = ls.sparsify_(dense_model())
    ls.set_masks_(model, masks_at(model, density), source_of(model, frozen))
    return ls.compact_(model) if form == "compact" else model


def train(model, steps=3, make=torch.optim.SGD, **options):
    optimizer = make(model.parameters(), lr=0.002, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return optimizer


def signs_of(values, held):
    """What a loaded weight makes of sign x constant: the signs are those of its own entries."""
    return {n: torch.where(values[n] >= 0, 0.25, -0.25) for n in held}


def at_rest(model, frozen_values):
    """Whether the Parameters hold the frozen values bit by bit, without any forward in between."""
    for name, values in frozen_values.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        pruned = ~layer.weight_mask
        assert torch.equal(layer.weight.detach()[pruned], values[pruned]), name
        assert layer.effective_weight.detach().data_ptr() == layer.weight.data_ptr()


def by_selection(model, x):
    """What the layers compute by definition, from their Parameters and the masks alone."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            x = F.linear(x, layer.weight, layer.bias)
        elif isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, layer.weight, layer.bias, padding=1)
        else:
            x = layer(x)
    return x


@frozen_sources
@densities
def test_the_parameter_is_the_weight_after_masks_steps_and_loads(frozen, density):
    model = masked_model(frozen, density)
    held = {f"{i}.weight": model[i].weight.detach().clone() for i in LAYERS}
    at_rest(model, held)
    for make in (torch.optim.AdamW, ls.optim.SGD):
        train(model, make=make, weight_decay=0.3)
        at_rest(model, held)
    torch.testing.assert_close(by_selection(model, X), model(X))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in held:
        state[name] += torch.randn_like(state[name])  # as an old file, with dead values in it
    if frozen == "constant":
        held = signs_of(state, held)
    model.load_state_dict(state)
    at_rest(model, held)
    assert model.state_dict()["2.weight"].data_ptr() == model[2].weight.data_ptr()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight.add_(1.0)
    other(X)
    at_rest(other, held)
    at_rest(model, held)


# ---- twelve kinds of writing ---------------------------------------------------------------------
# (model, another model's tensors by name) -> None; all but the named ones reach the whole weight


def _assign_data(model, values):
    for name, parameter in model.named_parameters():
        parameter.data = values[name].clone()


def _copy_data(model, values):
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values[name])


def _in_place(model, values):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


def _vector(model, values):
    vector = torch.cat([values[name].flatten() for name, _ in model.named_parameters()])
    nn.utils.vector_to_parameters(vector, model.parameters())


def _polyak(model, values):
    for name, parameter in model.named_parameters():
        parameter.data.mul_(0.0).add_(values[name])


def _state_dict_in_place(model, values):
    state = model.state_dict()
    for name, _ in model.named_parameters():
        state[name].mul_(0.0).add_(values[name])


def _load(model, values):
    model.load_state_dict({**model.state_dict(), **values})


def _assign_load(model, values):
    model.load_state_dict({**model.state_dict(), **values}, assign=True)


def _new_parameter(model, values):
    for name, parameter in list(model.named_parameters()):
        layer, _, tensor = name.rpartition(".")
        new = nn.Parameter(values[name].clone(), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(layer), tensor, new)


def _foreach(model, values):
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(list(parameters.values()), [values[n] for n in parameters], 1.0)


def _numpy(model, values):
    for name, parameter in model.named_parameters():
        parameter.detach().numpy()[...] = values[name].numpy()


def _hooked_step(model, values):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for name, parameter in model.named_parameters():
        parameter.grad = parameter.detach() - values[name]
    optimizer.step()


WRITES = [
    _assign_data, _copy_data, _in_place, _vector, _polyak, _state_dict_in_place, _load,
    _assign_load, _new_parameter, _foreach, _numpy, _hooked_step,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__.strip("_"))
@frozen_sources
@densities
def test_after_any_write_the_mask_holds_and_readers_see_it(write, frozen, density):
    model = masked_model(frozen, density)
    held = {f"{i}.weight": model[i].weight.detach().clone() for i in LAYERS}
    model(X)  # has been at rest, and remembers it
    torch.manual_seed(7)
    values = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    if frozen == "constant" and write in (_load, _assign_load):
        held = signs_of(values, held)
    dense = dense_model()
    dense.load_state_dict({n: v.clone() for n, v in values.items()})
    with torch.no_grad():
        for name, frozen_values in held.items():
            mask = model.get_submodule(name.removesuffix(".weight")).weight_mask
            weight = dense.get_parameter(name)
            weight.copy_(torch.where(mask, weight, frozen_values))
    write(model, values)
    torch.testing.assert_close(model(X), dense(X), rtol=1e-4, atol=1e-4)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}  # of a step by a gradient
    for name in held:
        torch.testing.assert_close(
            model.get_parameter(name), dense.get_parameter(name), **tolerance
        )
        torch.testing.assert_close(model.state_dict()[name], dense.get_parameter(name), **tolerance)
    at_rest(model, held)


def test_a_write_is_put_back_before_the_state_dict_is_read():
    model = masked_model()
    with torch.no_grad():
        model[2].weight.fill_(3.0)
    assert (model.state_dict()["2.weight"] != 0).sum() == model[2].weight_mask.sum()


def test_a_write_to_a_part_that_counts_no_version_needs_a_word():
    model = masked_model(density=0.6)
    y = model(X)
    layer = model[2]
    where = (~layer.weight_mask).nonzero()[-1]
    layer.weight.data[tuple(where)] = float("nan")
    ls.nn.refresh_(model)
    assert layer.weight[tuple(where)] == 0
    assert torch.equal(model(X), y)


def test_a_mask_written_in_place_holds():
    model = masked_model("seeded")
    model(X)
    layer = model[2]
    source = layer.weight_frozen.clone()
    layer.weight_mask[0] = False
    y = layer(torch.ones(3, 192))
    torch.testing.assert_close(y[:, 0], (source[0].sum() + layer.bias[0]).expand(3))
    assert torch.equal(layer.weight.detach()[0], source[0])


def test_functional_calls_leave_the_parameters_alone():
    model = masked_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    raw = {n: torch.randn_like(p) for n, p in before.items()}
    kept = {n: v.clone() for n, v in raw.items()}
    y = torch.func.functional_call(model, raw, (X,))
    wanted = copy.deepcopy(model)
    wanted.load_state_dict({**model.state_dict(), **kept})
    torch.testing.assert_close(y, wanted(X))
    assert all(torch.equal(raw[n], kept[n]) for n in raw)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@densities
def test_gradients_at_pruned_entries_are_zero_and_of_kept_ones_those_of_f_linear(density):
    model = masked_model("seeded", density)
    model(X).square().mean().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    by_selection(model, X).square().mean().backward()
    for name, parameter in model.named_parameters():
        wanted = parameter.grad
        if name.endswith("weight"):
            mask = model.get_submodule(name.removesuffix(".weight")).weight_mask
            assert not got[name][~mask].any()
            wanted = wanted * mask
        torch.testing.assert_close(got[name], wanted, rtol=1e-4, atol=1e-6)


@densities
def test_gradients_of_gradients(density):
    model = masked_model(density=density).double()
    x = X.double().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    dx.square().sum().backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    (dx,) = torch.autograd.grad(by_selection(model, x).sin().sum(), x, create_graph=True)
    dx.square().sum().backward()
    for gradient, (name, parameter) in zip(got, model.named_parameters(), strict=True):
        wanted = parameter.grad
        if name.endswith("weight") and wanted is not None:
            wanted = wanted * model.get_submodule(name.removesuffix(".weight")).weight_mask
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted)


# ---- averages ------------------------------------------------------------------------------------

AVERAGES = {
    "swa": {},
    "swa, one by one": {"avg_fn": get_swa_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
    "ema, one by one": {"avg_fn": get_ema_avg_fn(0.5)},
    "torchvision": {"avg_fn": lambda average, model, _: 0.5 * average + 0.5 * model},
}


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers"])
@pytest.mark.parametrize("way", AVERAGES)
@frozen_sources
def test_averages_follow_a_mask_that_changes(way, buffers, frozen):
    model = ls.sparsify_(dense_model())
    source = source_of(model, frozen)
    if frozen == "seeded":  # else the values are others once the weights deviate otherwise
        source = ls.frozen.Seeded("normal", seed=3, std=0.2)
    ls.set_masks_(model, masks_at(model, 0.6), source)
    average = AveragedModel(model, use_buffers=buffers, **AVERAGES[way])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        if step in (2, 4):  # narrower, then another one
            ls.set_masks_(model, masks_at(model, 0.3, seed=step), source, optimizer)
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        assert ls.masks_of(average.module) == ls.masks_of(model)
        average(X)
    for i in LAYERS:
        pruned = ~model[i].weight_mask
        torch.testing.assert_close(
            average.module[i].weight.detach()[pruned], model[i].weight.detach()[pruned]
        )


def test_averages_that_write_into_the_tensors_of_a_state_dict():
    model = masked_model()
    by_loop, by_copy = copy.deepcopy(model), copy.deepcopy(model)
    train(model)
    ls.set_masks_(model, masks_at(model, 0.4, seed=3))
    state = model.state_dict()
    with torch.no_grad():
        for name, value in by_loop.state_dict().items():  # numbers alone, as YOLO's trainers
            if value.is_floating_point():
                value *= 0.0
                value += state[name]
        for value, new in zip(by_copy.state_dict().values(), state.values(), strict=True):
            value.copy_(0.0 * value + 1.0 * new)  # all of them, as timm's ModelEmaV2
    assert ls.masks_of(by_copy) == ls.masks_of(model)
    torch.testing.assert_close(by_copy(X), model(X))
    for i in LAYERS:  # the masks stay those of the copy
        both = model[i].weight_mask & by_loop[i].weight_mask
        torch.testing.assert_close(by_loop[i].weight[both], model[i].weight[both])


def test_mean_of_state_dicts():
    """A soup of models under one mask is one under that mask; of different masks it is refused."""
    models = [masked_model("seeded") for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    models[1](X)
    states = [model.state_dict() for model in models]
    numbers = [n for n, v in states[0].items() if v.dtype != torch.uint8]
    soup = {n: (states[0][n] + states[1][n]) / 2 for n in numbers}
    soup |= {n: v for n, v in states[0].items() if v.dtype == torch.uint8}  # descriptors
    found = copy.deepcopy(models[0])
    found.load_state_dict(soup)
    assert ls.masks_of(found) == ls.masks_of(models[0])
    mean = (models[0][2].weight + models[1][2].weight) / 2
    torch.testing.assert_close(found[2].weight.detach(), mean.detach())
    ls.set_masks_(models[1], masks_at(models[1], 0.3, seed=2))
    states[1] = models[1].state_dict()
    name = "2.weight_mask"
    with pytest.raises(RuntimeError, match=r"mask of 2\.weight must hold only 0 and 1"):
        found.load_state_dict(soup | {name: (states[0][name] + states[1][name]) / 2})


def test_a_mask_in_a_file_is_a_plain_tensor():
    model = masked_model()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(type(value) is torch.Tensor for value in state.values())
    for name, mask in ls.masks_of(model).items():
        assert torch.equal(state[f"{name}_mask"], mask)
        assert type(mask) is torch.Tensor


def test_arithmetic_with_a_mask_has_the_value_of_plain_arithmetic():
    model = masked_model()
    mask = model[2].weight_mask
    plain = mask.clone().numpy()
    weight = torch.randn(mask.shape)
    assert (weight * mask).numpy().tolist() == (weight.numpy() * plain).tolist()
    assert torch.equal(mask * 2.0 - 1.0, torch.from_numpy(plain * 2.0 - 1.0).float())
    assert int(mask.sum()) == plain.sum()
    assert (mask & ~mask).sum() == 0
    assert type(mask.float()) is torch.Tensor
