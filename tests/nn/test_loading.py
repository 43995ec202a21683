"""The one loader of our layers: whatever one entry has wrong, nothing of the layer is written."""

import pytest
import torch
from torch import nn

import lottery_sparse as ls


def masked(seed):
    torch.manual_seed(seed)
    layer = ls.sparsify_(nn.Linear(9, 7))
    return ls.set_masks_(layer, {"weight": torch.rand(7, 9) < 0.4}, ls.frozen.Constant(0.5))


def supermask(seed):
    layer = ls.supermask_(masked(seed), evaluation="threshold")
    nn.init.normal_(layer.score)
    return ls.learning.use_masks_(layer, seed)


FORMS = {
    "masked": masked,
    "compact": lambda seed: ls.compact_(masked(seed), spare=30),
    "supermask": supermask,
    "packed": lambda seed: ls.pack_(masked(seed), report=None),
}
WRONG = {
    "masked": ("weight_mask", torch.ones(9, 7), "mask of weight has shape"),
    "compact": ("weight_frozen", torch.ones(3, dtype=torch.uint8), "source of weight is a"),
    "supermask": ("held_mask", torch.full((7, 9), 2), "held_mask"),
    "packed": ("bias", torch.ones(8), "bias must be"),
}


def values(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_takes_all_or_nothing(form, assign):
    layer, other = FORMS[form](1), FORMS[form](2)
    before, theirs = values(layer), values(other)
    assert not equal(before, theirs)
    name, wrong, says = WRONG[form]
    with pytest.raises(RuntimeError, match=says):
        layer.load_state_dict({**theirs, name: wrong}, assign=assign)
    assert equal(values(layer), before)
    assert str(layer.load_state_dict(theirs, assign=assign)) == "<All keys matched successfully>"
    assert equal(values(layer), theirs)
