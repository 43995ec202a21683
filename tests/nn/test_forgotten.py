"""What a model that nobody has sparsified is told, and what stays as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lottery_sparse as ls

SENTENCE = r"the model has no masked layer; call ls\.sparsify_\(model\) first[.,]"


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def plan(model):
    return ls.plan(model, torch.randn(2, 6), cache=False)


@pytest.mark.parametrize(
    "call",
    [
        plan,
        lambda model: ls.set_masks_(model, {}),
        lambda model: ls.set_masks_(model, {"0.weight": torch.ones(8, 6)}),
        lambda model: ls.prune(
            model.state_dict(), model.state_dict(), ls.masks_of(model), "large_final", 0.5
        ),
    ],
    ids=["plan", "set_masks_ {}", "set_masks_", "prune"],
)
def test_a_model_that_was_not_sparsified(call):
    model = network()
    with pytest.raises(ValueError, match=SENTENCE):
        call(model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert type(model[0]) is nn.Linear
    call(ls.sparsify_(model))  # what the sentence says helps


def test_learned_masks_have_another_way_in():
    model = ls.supermask_(network())
    with pytest.raises(
        ValueError, match=r"masks are learned ones; call ls\.sparsify_\(model\) first"
    ):
        plan(model)
    assert model.training
    assert model[0].score.requires_grad
    plan(ls.sparsify_(model))


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


# ---- models of which sparsify_ masks nothing -----------------------------------------------------


class Conv1D(nn.Module):
    """A linear layer that is no nn.Linear, as those of GPT-2."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))
        self.bias = nn.Parameter(torch.randn(8))


class Experts(nn.Module):
    """Linear layers as one tensor of three dimensions."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 7))


class Subclass(nn.Linear):
    pass


def shared():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    return model


# model -> what the sentence says of it
WITHOUT_LAYERS = {
    "an LSTM": (lambda: nn.LSTM(6, 4), r"type: LSTM 1\.00\. Write nn\.Linear or nn\.Conv2d layers"),
    "several types": (
        lambda: nn.Sequential(Conv1D(), Experts(), nn.LayerNorm(500)),
        r"type: Experts 0\.88, Conv1D 0\.12\.",
    ),
    "vectors only": (lambda: nn.LayerNorm(5), r"type: LayerNorm 1\.00\."),
    "a subclass": (
        lambda: Subclass(3, 2),
        r"type: Subclass 1\.00; the model: Subclass is a subclass with behaviour of its own\.",
    ),
    "a shared weight": (
        shared,
        r"type: Embedding 1\.00; 1: its weight is shared with 0 \(Embedding\), which has no mask\.",
    ),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2),
        r"type: MultiheadAttention 0\.75, NonDynamic.* 0\.25; out_proj: nn\.Multihead",
    ),
    "many types": (
        lambda: nn.ModuleList(
            [nn.Conv1d(1, 1, 9), nn.Conv3d(1, 1, 2), nn.Bilinear(2, 2, 2), nn.GRU(1, 1)]
            + [nn.RNN(1, 1), Conv1D(), nn.Embedding(1, 1), nn.ConvTranspose2d(1, 1, 1)]
        ),
        r"type: Conv1D 0\.41, .*, 2 other types\.",
    ),
    "no weight": (nn.ReLU, r"it has no weights; give the module that holds them\."),
}


def silent(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ls.sparsify_(model)


@pytest.mark.parametrize("kind", WITHOUT_LAYERS)
@pytest.mark.parametrize(
    "call",
    [
        ls.compact_,
        ls.pack_,
        lambda model: ls.plan(model, torch.randn(2, 6)),
        lambda model: ls.set_masks_(model, {}),
        lambda model: ls.find_ticket(model, lambda *_, **__: None, 1, 0.5),
    ],
    ids=["compact_", "pack_", "plan", "set_masks_", "find_ticket"],
)
def test_a_model_that_sparsify_cannot_mask_is_told_what_it_is_made_of(kind, call):
    model, said = WITHOUT_LAYERS[kind]
    model = silent(model())
    with pytest.raises(ValueError, match=said) as caught:
        call(model)
    assert "call ls.sparsify_" not in str(caught.value)


def test_supermask_says_the_same():
    with pytest.raises(ValueError, match=r"no layer to learn a mask for; .* by type: LSTM 1\.00\."):
        ls.supermask_(nn.LSTM(6, 4))


@pytest.mark.parametrize("kind", WITHOUT_LAYERS)
def test_sparsify_warns_once_where_it_masks_nothing(kind):
    model, said = WITHOUT_LAYERS[kind]
    with pytest.warns(UserWarning, match="sparsify_") as caught:
        ls.sparsify_(model())
    (warning,) = caught
    assert warning.filename == __file__
    skipped = "sparsify_ skipped" in str(warning.message)  # which layer, and why
    assert skipped == (kind in ("a subclass", "a shared weight", "attention"))
    with pytest.raises(UserWarning, match="sparsify_ skipped" if skipped else said):
        raise warning.message


def test_a_filter_that_takes_nothing_is_said():
    with pytest.warns(UserWarning, match=r"masked nothing: filter_fn left out every layer"):
        ls.sparsify_(network(), lambda module, name: False)
    with pytest.raises(ValueError, match=r"no layer to learn a mask for; filter_fn left out every"):
        ls.supermask_(network(), filter_fn=lambda module, name: False)


@pytest.mark.parametrize("form", [ls.sparsify_, ls.supermask_])
def test_no_warning_where_masks_are_there_already(form):
    model = form(network())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ls.sparsify_(model)
    assert not [w for w in caught if "masked nothing" in str(w.message)]


def test_layers_that_learn_masks_already_are_named():
    model = ls.supermask_(network())
    with pytest.raises(ValueError, match=r"learn masks already; ls\.densify_"):
        ls.supermask_(model)


def test_packed_layers_have_a_way_back():
    model = ls.pack_(ls.sparsify_(network()), report=None)
    with pytest.raises(ValueError, match=r"layers are packed; ls\.sparsify_\(model\) makes"):
        ls.set_masks_(model, {})
    ls.set_masks_(ls.sparsify_(model), {})
