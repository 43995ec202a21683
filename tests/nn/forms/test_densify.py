"""densify_ and dense_state_dict: from sparse models back to dense ones."""

from __future__ import annotations

import copy

import pytest
import torch
from test_convert import effective, half, network, same
from tolerances import close
from torch import nn

import lottery_sparse as ls
from lottery_sparse.nn.packed_formats import FORMATS


@pytest.mark.parametrize(
    "frozen", ["zero", ls.frozen.Constant(0.3), ls.frozen.Seeded("normal", 1)], ids=str
)
def test_densify(frozen):
    model = ls.sparsify_(network()).eval()
    ls.set_masks_(model, half(model), frozen)
    x = torch.randn(3, 1, 4, 4)
    y, state = model(x).detach(), effective(model)
    parameters = dict(model.named_parameters())
    assert ls.densify_(model) is model
    assert (type(model[0]), type(model[4])) == (nn.Conv2d, nn.Linear)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    same(model.state_dict(), state)
    close(model(x), y)
    assert not [n for n in vars(model[0]) if "mask" in n or "frozen" in n]
    assert dict(model[0].named_buffers()) == {}
    network().load_state_dict(model.state_dict())
    assert ls.masks_of(ls.sparsify_(model)).density == 1, "and masked again"


def test_dense_state_dict_loads_strictly_into_the_dense_model():
    model = ls.sparsify_(network()).eval()
    ls.set_masks_(model, half(model), ls.frozen.Constant())
    dense = network().eval()
    dense.load_state_dict(ls.dense_state_dict(model))
    x = torch.randn(3, 1, 4, 4)
    close(dense(x), model(x))


@pytest.mark.parametrize("some", [False, True], ids=["all layers", "one of two"])
def test_models_that_learn_their_masks_have_no_dense_state_yet(some):
    model = network()
    ls.supermask_(model, filter_fn=(lambda m, name: name == "0") if some else None)
    if some:
        ls.sparsify_(model, lambda m, name: name == "4")
    with pytest.raises(ValueError, match=r"masks are learned ones; call ls\.sparsify_"):
        ls.dense_state_dict(model)
    assert type(model[0]) is ls.nn.SupermaskConv2d
    assert type(model[4]) is (ls.nn.MaskedLinear if some else ls.nn.SupermaskLinear)
    ls.sparsify_(model)
    network().load_state_dict(ls.dense_state_dict(model))
    assert type(ls.densify_(model)[0]) is nn.Conv2d


def normed(by, source="zero"):
    """A masked model whose first layer computes its weight, and what it computes."""
    torch.manual_seed(0)
    model = ls.sparsify_(nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)))
    ls.set_masks_(model, half(model), source)
    by(model[0])
    x = torch.randn(4, 12)
    return model, x, model(x).detach()


@pytest.mark.parametrize("source", ["zero", ls.frozen.Constant(0.3)], ids=str)
def test_what_a_parametrization_computes_is_dense_as_one_tensor(source):
    model, x, y = normed(nn.utils.parametrizations.weight_norm, source)
    nn.utils.parametrize.register_parametrization(model[2], "bias", nn.Tanh())
    y = model(x).detach()
    dense = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
    state = ls.dense_state_dict(model)
    assert not any(value.requires_grad for value in state.values())
    dense.load_state_dict(state)
    close(dense(x), y)
    nn.utils.parametrizations.weight_norm(dense[0])
    with pytest.raises(RuntimeError, match=r"Missing key.*parametrizations\.weight"):
        dense.load_state_dict(state)


def test_densify_names_what_computes_a_weight_and_how_to_undo_it():
    model, x, y = normed(nn.utils.parametrizations.weight_norm)
    with pytest.raises(
        TypeError, match=r"^0\.weight is computed.*remove_parametrizations\(layer, "
    ):
        ls.densify_(model)
    assert type(model[2]) is ls.nn.MaskedLinear
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Identity())
    with pytest.raises(TypeError, match=r'^0\.bias is computed.*remove_param.*\(layer, "bias"\)'):
        ls.densify_(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "bias")
    close(ls.densify_(model)(x), y)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("call", [ls.densify_, ls.dense_state_dict])
def test_hooks_that_compute_a_weight_are_refused(call):
    model, x, y = normed(nn.utils.weight_norm)
    with pytest.raises(TypeError, match=r"^0\.weight is computed.*remove_weight_norm\(layer\)"):
        call(model)
    assert type(model[2]) is ls.nn.MaskedLinear
    nn.utils.remove_weight_norm(model[0])
    dense = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
    dense.load_state_dict(ls.dense_state_dict(model))
    close(dense(x), y)


@pytest.mark.parametrize("form", [lambda model: model, ls.compact_], ids=["masked", "compact"])
def test_networks_side_by_side_have_no_dense_layer(form):
    one = form(ls.sparsify_(nn.Sequential(nn.Linear(4, 3))))
    model = ls.ensemble.replicate(one, 2)
    with pytest.raises(TypeError, match=r"^0 holds several networks .*ensemble\.select\("):
        ls.densify_(model)
    assert type(model[0]) is type(one[0])
    assert type(ls.densify_(ls.ensemble.select(model, 1))[0]) is nn.Linear


def test_densify_refuses_a_subclass_before_it_changes_anything():
    class Twice(ls.nn.MaskedLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(ls.nn.MaskedLinear(3, 3), Twice(3, 3))
    with pytest.raises(TypeError, match=r"1 is a Twice, which has no dense form"):
        ls.densify_(model)
    assert type(model[0]) is ls.nn.MaskedLinear


# ---- packed and mixed ----------------------------------------------------------------------------


def weight_for(format, dtype):
    """A weight [9, 12] that the format holds, and no other values than it must."""
    if format == "ternary":
        return (0.7 * torch.randint(-1, 2, (9, 12))).to(dtype)
    return (torch.randn(9, 12) * half_of(9, 12)).to(dtype)


def half_of(*shape):
    return torch.rand(shape) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_layer_becomes_the_linear_layer_of_its_weight(format, bias, dtype):
    weight = weight_for(format, dtype)
    b = torch.randn(9, dtype=dtype) if bias else None
    model = nn.Sequential(ls.nn.PackedLinear(weight, b, format=format))
    layer, buffers = model[0], list(model.buffers())
    dense = nn.Sequential(nn.Linear(12, 9, bias=bias, dtype=dtype))
    dense.load_state_dict(ls.dense_state_dict(model), strict=True)
    assert torch.equal(dense[0].weight, weight)
    assert isinstance(model[0], ls.nn.PackedLinear), "asking changes nothing"

    assert ls.densify_(model) is model
    assert model[0] is layer
    assert vars(layer).keys() == vars(dense[0]).keys()
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, weight)
    assert layer.weight.dtype == dtype
    assert (layer.bias is None) if b is None else torch.equal(layer.bias, b)
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        layer.weight.fill_(3)
        assert not any((t == 3).any() for t in buffers if t.is_floating_point()), "its own memory"


def test_int8_activations_leave_the_weights_as_they_are():
    weight = weight_for("ternary", torch.float32)
    layer = ls.nn.PackedLinear(weight, activations="int8")
    assert torch.equal(ls.dense_state_dict(layer)["weight"], weight)
    assert torch.equal(ls.densify_(layer).weight, weight)


def mixed():
    """A convolution, and masked, compact, packed and plain linear layers, in a row."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.Flatten(), *(nn.Linear(16, 16) for _ in range(4))]
    model = ls.sparsify_(nn.Sequential(*layers), lambda m, name: name != "5")
    ls.set_masks_(
        model,
        half(model),
        {"2.weight": ls.frozen.Constant(0.3), "3.weight": ls.frozen.Constant(0.2)},
    )
    ls.compact_(nn.ModuleList([model[0], model[3]]))
    ls.pack_(model[4], report=None)
    return model


def test_a_model_of_several_forms_becomes_dense_as_a_whole():
    model, x = mixed(), torch.randn(3, 1, 4, 4)
    with torch.no_grad():
        y = model(x)
    dense = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), *(nn.Linear(16, 16) for _ in range(4)))
    dense.load_state_dict(ls.dense_state_dict(model), strict=True)
    torch.testing.assert_close(dense(x), y)
    plain = model[2].weight
    ls.densify_(model)
    assert [type(m) for m in model] == [type(m) for m in dense]
    assert model[2].weight is plain
    same(model.state_dict(), dense.state_dict())


def test_an_optimizer_of_compact_layers_goes_along():
    model, x = mixed(), torch.randn(3, 1, 4, 4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model[:4](x).square().sum().backward()
    optimizer.step()
    ls.densify_(model, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert optimizer.state[model[3].weight]["exp_avg"].shape == (16, 16)


def test_layers_that_shared_a_weight_have_one_each_after_packing():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    tied = copy.deepcopy(model)
    ls.set_masks_(ls.sparsify_(model), {"0.weight": half_of(6, 6)})
    x = torch.randn(2, 6)
    y = model(x).detach()
    together = copy.deepcopy(model)
    ls.pack_(model, report=None)
    tied.load_state_dict(ls.dense_state_dict(model), strict=True)
    torch.testing.assert_close(tied(x), y)
    torch.testing.assert_close(ls.densify_(model)(x), y)
    assert model[0].weight is not model[2].weight
    for form in (ls.sparsify_, ls.compact_):
        again = ls.densify_(form(copy.deepcopy(together)))
        assert again[0].weight is again[2].weight
        torch.testing.assert_close(again(x), y)


def test_a_packed_layer_in_two_places_has_two_names_and_stays_one():
    layer = ls.nn.PackedLinear(weight_for("csr", torch.float32)[:, :9], format="csr")
    model = nn.Sequential(layer, nn.ReLU(), layer)
    dense = nn.Linear(9, 9, bias=False)
    nn.Sequential(dense, nn.ReLU(), dense).load_state_dict(ls.dense_state_dict(model))
    assert torch.equal(dense.weight, layer.effective_weight)
    ls.densify_(model)
    assert model[0] is model[2]
    assert type(layer) is nn.Linear


def test_a_subclass_of_a_packed_layer_is_refused_before_anything_changes():
    class Twice(ls.nn.PackedLinear):
        pass

    model = nn.Sequential(ls.nn.MaskedLinear(12, 9), Twice(torch.randn(3, 9)))
    with pytest.raises(TypeError, match=r"^1 is a Twice, which has no dense form"):
        ls.densify_(model)
    assert type(model[0]) is ls.nn.MaskedLinear
    shapes = {name: tuple(value.shape) for name, value in ls.dense_state_dict(model).items()}
    assert shapes == {"0.weight": (9, 12), "0.bias": (9,), "1.weight": (3, 9)}


def test_a_packed_model_that_was_saved_and_loaded_becomes_dense():
    model = ls.sparsify_(network()).eval()
    ls.set_masks_(model, half(model))
    state = effective(model)
    ls.pack_(model, report=None)
    other = ls.pack_(ls.sparsify_(network()), report=None)
    other.load_state_dict(model.state_dict())
    same(dict(sorted(ls.dense_state_dict(other).items())), dict(sorted(state.items())))
    fresh = network()
    fresh.load_state_dict(ls.densify_(other).state_dict())
