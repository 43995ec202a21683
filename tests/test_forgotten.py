"""What a model that nobody has sparsified is told, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lottery_sparse as ls

SENTENCE = r"the model has no masked layer; call ls\.sparsify_\(model\) first\."


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def plan(model):
    return ls.plan(model, torch.randn(2, 6), cache=False)


@pytest.mark.parametrize(
    "call",
    [
        ls.compact_,
        ls.pack_,
        plan,
        lambda model: ls.set_masks_(model, {}),
        lambda model: ls.set_masks_(model, {"0.weight": torch.ones(8, 6)}),
        lambda model: ls.prune(
            model.state_dict(), model.state_dict(), ls.masks_of(model), "large_final", 0.5
        ),
    ],
    ids=["compact_", "pack_", "plan", "set_masks_ {}", "set_masks_", "prune"],
)
def test_a_model_that_was_not_sparsified(call):
    model = network()
    with pytest.raises(ValueError, match=SENTENCE):
        call(model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert type(model[0]) is nn.Linear
    call(ls.sparsify_(model))  # what the sentence says helps


@pytest.mark.parametrize("call", [ls.compact_, ls.pack_, plan], ids=["compact_", "pack_", "plan"])
def test_learned_masks_have_another_way_in(call):
    model = ls.supermask_(network())
    with pytest.raises(
        ValueError, match=r"masks are learned ones; call ls\.masked_\(model\) first"
    ):
        call(model)
    assert model.training
    assert model[0].score.requires_grad
    call(ls.masked_(model))


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (0, r"w_init must map .*, got Sequential; pass model\.state_dict\(\)\."),
        (1, r"w_final must map .*, got Sequential; pass model\.state_dict\(\)\."),
        (2, r"masks must map .*, got Sequential; pass ls\.masks_of\(model\)\."),
    ],
)
def test_a_model_where_its_weights_or_masks_belong(position, message):
    model = ls.sparsify_(network())
    given = [model.state_dict(), model.state_dict(), ls.masks_of(model)]
    given[position] = model
    with pytest.raises(TypeError, match=message):
        ls.prune(*given, "large_final", 0.5)
