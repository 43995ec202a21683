"""MaskedLinear and MaskedConv2d as nn.Linear and nn.Conv2d: values, copies, dtypes, transforms."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from masked_layers import SOURCES, assert_trains_like, dense_twin, masked
from tolerances import close
from torch import nn

import lottery_sparse as ls

# ---- values: every argument of the dense layers -------------------------------------------------

LINEAR_INPUTS = [(7,), (5, 7), (2, 3, 7), (0, 7), (2, 0, 7), (2, 1, 3, 7)]


@pytest.mark.parametrize("density", [1.0, 0.5, 0.05])
@pytest.mark.parametrize("frozen", SOURCES)
@pytest.mark.parametrize("shape", LINEAR_INPUTS, ids=str)
def test_linear_equals_nn_linear(shape, frozen, density):
    layer = masked(nn.Linear(7, 6, bias=shape != (5, 7)), frozen, density)
    assert_trains_like(layer, dense_twin(layer), torch.randn(shape))


def test_linear_takes_a_strided_input():
    layer = masked(nn.Linear(7, 6))
    assert_trains_like(layer, dense_twin(layer), torch.randn(7, 3, 5).permute(2, 1, 0))


CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": (3, 2), "stride": 2},
    {"kernel_size": 3, "stride": (1, 2), "padding": (2, 0)},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (2, 4), "padding": "same", "dilation": 2},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "dilation": (1, 2), "padding": 1},
    {"kernel_size": 3, "groups": 2, "padding": 1},
    {"kernel_size": 3, "groups": 4, "padding": 1, "stride": 2, "bias": False},
    *(
        {"kernel_size": 3, "padding": padding, "padding_mode": mode}
        for mode in ("reflect", "replicate", "circular")
        for padding in (1, (2, 1), "same")
    ),
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular", "dilation": (1, 2)},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # nn.Conv2d's own
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
def test_conv2d_equals_nn_conv2d(arguments, channels_last):
    layer = nn.Conv2d(4, 8, **arguments).double()
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64)
    if channels_last:
        layer, x = (
            layer.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )
    for density, frozen in ((1.0, "zero"), (0.5, "zero"), (0.5, "tensor"), (0.5, "constant")):
        new = masked(copy.deepcopy(layer), frozen, density)
        assert_trains_like(new, dense_twin(new), x)
        if channels_last:
            assert new(x).is_contiguous(memory_format=torch.channels_last)


def test_conv2d_without_a_batch():
    layer = masked(nn.Conv2d(4, 8, 3, padding=1))
    assert_trains_like(layer, dense_twin(layer), torch.randn(4, 5, 6))


@pytest.mark.parametrize(
    ("kind", "dense", "arguments"),
    [
        (ls.nn.MaskedLinear, nn.Linear, (3, 4)),
        (ls.nn.MaskedConv2d, nn.Conv2d, (3, 4, 3)),
    ],
)
def test_constructors_are_the_dense_ones(kind, dense, arguments):
    torch.manual_seed(0)
    new = kind(*arguments, bias=False, dtype=torch.float64)
    torch.manual_seed(0)
    old = dense(*arguments, bias=False, dtype=torch.float64)
    assert isinstance(new, dense)
    assert torch.equal(new.weight, old.weight), "same initialisation"
    assert new.bias is None
    assert new.density == 1
    assert repr(new) == repr(old).replace(dense.__name__, kind.__name__)[:-1] + ", density=1)"
    masked(new, mask=torch.arange(new.weight.numel()).view_as(new.weight) % 3 == 0)
    assert "density=0.33" in repr(new)


# ---- copies, dtypes, devices --------------------------------------------------------------------


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("frozen", SOURCES)
def test_copies(copied, frozen):
    layer = masked(nn.Linear(7, 6), frozen)
    other = copied(layer)
    assert type(other) is ls.nn.MaskedLinear
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name])
    x = torch.randn(3, 7)
    assert torch.equal(other(x), layer(x))
    ls.set_masks_(other, {"weight": torch.arange(42).view(6, 7) < 7})
    assert torch.equal(layer.weight_mask, before["weight_mask"]), "independent of each other"


@pytest.mark.parametrize("frozen", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, frozen):
    layer = masked(nn.Linear(7, 6), frozen)
    expected = layer.effective_weight.detach().to(dtype)
    layer = layer.half() if dtype == torch.float16 else layer.to(dtype)
    assert layer.weight_mask.dtype == torch.bool
    assert torch.equal(layer.effective_weight, expected)
    assert_trains_like(layer, dense_twin(layer), torch.randn(5, 7, dtype=dtype))


def test_to_a_device_and_a_memory_format():
    layer = masked(nn.Conv2d(4, 8, 3), "tensor").to("cpu", memory_format=torch.channels_last)
    for value in (layer.weight, layer.weight_mask, layer.weight_frozen, layer.effective_weight):
        assert value.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("frozen", SOURCES)
def test_meta_layers_load_with_assign(frozen):
    state = masked(nn.Linear(7, 6), frozen).state_dict()
    with torch.device("meta"):
        layer = ls.nn.MaskedLinear(7, 6)
    assert layer.weight_mask.is_meta
    assert "density=?" in repr(layer)
    assert layer(torch.randn(3, 7, device="meta")).shape == (3, 6)
    layer.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in (layer.weight, layer.bias, layer.weight_mask))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name])
    assert isinstance(layer.weight, nn.Parameter)
    layer(torch.randn(3, 7)).sum().backward()
    assert (layer.weight.grad[~layer.weight_mask] == 0).all()


def test_meta_layers_come_to_life_with_every_weight_kept():
    model = ls.sparsify_(nn.Sequential(nn.Linear(7, 6)).to("meta"))
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device.*to_empty"):
        ls.set_masks_(model, {"0.weight": torch.ones(6, 7)})
    model.to_empty(device="cpu")
    assert model[0].weight_mask.all()


# ---- subclasses and parametrizations ------------------------------------------------------------


class Scaled(ls.nn.MaskedLinear):
    def __init__(self, in_features, out_features, scale):
        super().__init__(in_features, out_features)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return self.scale * super().forward(x)


def test_subclasses_work_like_the_layer():
    model = nn.Sequential(Scaled(7, 6, 2.0), nn.Linear(6, 3))
    ls.sparsify_(model)
    assert type(model[0]) is Scaled
    mask = torch.rand(6, 7) < 0.5
    ls.set_masks_(model, {"0.weight": mask})
    x = torch.randn(3, 7)
    expected = 2 * nn.functional.linear(x, model[0].weight * mask, model[0].bias)
    close(model[0](x), expected)
    other = nn.Sequential(Scaled(7, 6, 1.0), ls.nn.MaskedLinear(6, 3))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_a_masked_layer_can_be_parametrized():
    layer = masked(nn.Linear(7, 6))
    mask = layer.weight_mask.clone()
    nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(3, 7)
    close(layer(x), nn.functional.linear(x, layer.weight * mask, layer.bias))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    other = nn.utils.parametrizations.weight_norm(ls.nn.MaskedLinear(7, 6))
    other.load_state_dict(state)
    close(other(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("by", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize(
    "source", [ls.frozen.Constant(0.5), ls.frozen.Seeded("normal", 1)], ids=repr
)
def test_frozen_values_of_a_parametrized_layer_are_saved(by, source):
    def layer(seed):
        torch.manual_seed(seed)
        new = masked(nn.Linear(7, 6))
        ls.set_masks_(new, ls.masks_of(new), source)
        return by(new)

    old, new = layer(0), layer(1)
    x = torch.randn(3, 7)
    expected = old(x)
    assert not torch.equal(new(x), expected)
    new.load_state_dict(old.state_dict())
    assert torch.equal(new(x), expected)
    assert torch.equal(new.effective_weight, old.effective_weight)


def test_signs_of_a_weight_that_a_checkpoint_does_not_hold_are_refused():
    old = masked(nn.Linear(7, 6))
    ls.set_masks_(old, ls.masks_of(old), ls.frozen.Constant(0.5))
    source = old.state_dict()["weight_frozen"]
    nn.utils.parametrizations.weight_norm(old)
    before = old.effective_weight.detach()
    with pytest.raises(RuntimeError, match=r"frozen values of weight are signs.*does not hold"):
        old.load_state_dict(old.state_dict() | {"weight_frozen": source})
    assert torch.equal(old.effective_weight, before)


def test_an_input_that_does_not_fit_names_it():
    with pytest.raises(ValueError, match=r"x has shape \(3, 6\), but weight \(6, 7\) needs"):
        ls.nn.MaskedLinear(7, 6)(torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"weight is torch\.float32, but x is torch\.float64"):
        ls.nn.MaskedConv2d(4, 8, 3)(torch.randn(1, 4, 5, 5).double())


@pytest.mark.parametrize(
    "source", [ls.frozen.Seeded("normal", 1), ls.frozen.Constant(0.1)], ids=repr
)
def test_values_of_a_descriptor_survive_a_trip_through_half(source):
    layer = ls.sparsify_(nn.Linear(8, 6))
    ls.set_masks_(layer, {"weight": torch.rand(6, 8) < 0.5}, frozen=source)
    before = layer.effective_weight.detach()[~layer.weight_mask]
    layer.half().float()
    assert torch.equal(layer.effective_weight[~layer.weight_mask], before)
    other = ls.nn.MaskedLinear(8, 6)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.effective_weight, layer.effective_weight)


@pytest.mark.parametrize(
    "source", [ls.frozen.Seeded("normal", 1), ls.frozen.Constant(0.1)], ids=repr
)
def test_frozen_values_of_tied_layers_survive_a_trip_through_half(source):
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    model[1].weight = model[0].weight
    ls.sparsify_(model)
    ls.set_masks_(model, {"0.weight": torch.rand(7, 7) < 0.5}, frozen=source)
    before = model[0].effective_weight.detach()
    model.half().float()
    for layer in model:
        pruned = ~layer.weight_mask
        assert torch.equal(layer.effective_weight[pruned], before[pruned])
    assert model[0].weight is model[1].weight


def test_fx_traces_a_masked_layer_as_one_node():
    model = ls.sparsify_(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 5)))
    ls.set_masks_(model, {"2.weight": torch.rand(5, 48) < 0.3}, frozen=ls.frozen.Constant(0.1))
    x = torch.randn(2, 2, 6, 6)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_skip_init_accepts_masked_layers():
    layer = nn.utils.skip_init(ls.nn.MaskedConv2d, 2, 3, kernel_size=3)
    assert layer.weight.shape == (3, 2, 3, 3)
    assert layer.weight_mask.all()
