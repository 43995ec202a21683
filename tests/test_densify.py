"""densify_ and dense_state_dict: from masked models back to dense ones."""

from __future__ import annotations

import pytest
import torch
from test_convert import effective, half, network, same
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
    torch.testing.assert_close(model(x), y)
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
    torch.testing.assert_close(dense(x), model(x))


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


def test_densify_refuses_a_subclass_before_it_changes_anything():
    class Twice(ls.MaskedLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(ls.MaskedLinear(3, 3), Twice(3, 3))
    with pytest.raises(TypeError, match=r"1 is a Twice, which has no dense form"):
        ls.densify_(model)
    assert type(model[0]) is ls.MaskedLinear
