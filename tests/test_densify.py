"""densify_ and dense_state_dict: from masked models back to dense ones."""

from __future__ import annotations

import pytest
import torch
from test_convert import effective, half, network, same
from tolerances import close
from torch import nn

import lottery_sparse as ls


@pytest.mark.parametrize("frozen", ["zero", ls.Constant(0.3), ls.Seeded("normal", 1)], ids=str)
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
    ls.set_masks_(model, half(model), ls.Constant())
    dense = network().eval()
    dense.load_state_dict(ls.dense_state_dict(model))
    x = torch.randn(3, 1, 4, 4)
    close(dense(x), model(x))


@pytest.mark.parametrize("call", [ls.densify_, ls.dense_state_dict])
@pytest.mark.parametrize("some", [False, True], ids=["all layers", "one of two"])
def test_models_that_learn_their_masks_have_no_dense_form_yet(call, some):
    model = network()
    ls.supermask_(model, filter_fn=(lambda m, name: name == "0") if some else None)
    if some:
        ls.sparsify_(model, lambda m, name: name == "4")
    with pytest.raises(ValueError, match=r"masks are learned ones; call ls\.masked_\(model\)"):
        call(model)
    assert type(model[0]) is ls.SupermaskConv2d
    assert type(model[4]) is (ls.MaskedLinear if some else ls.SupermaskLinear)
    ls.masked_(model)
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


@pytest.mark.parametrize("source", ["zero", ls.Constant(0.3)], ids=str)
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
    assert type(model[2]) is ls.MaskedLinear
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
    assert type(model[2]) is ls.MaskedLinear
    nn.utils.remove_weight_norm(model[0])
    dense = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
    dense.load_state_dict(ls.dense_state_dict(model))
    close(dense(x), y)


def test_densify_refuses_a_subclass_before_it_changes_anything():
    class Twice(ls.MaskedLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(ls.MaskedLinear(3, 3), Twice(3, 3))
    with pytest.raises(TypeError, match=r"1 is a Twice, which has no dense form"):
        ls.densify_(model)
    assert type(model[0]) is ls.MaskedLinear
