"""Networks that were pruned elsewhere: zeros in a checkpoint, masks of torch.nn.utils.prune."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from tolerances import close
from torch import nn

import lottery_sparse as ls


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))


X = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))

# ---- zeros ---------------------------------------------------------------------------------------


def with_zeros():
    model = network()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[3].weight[:, ::3] = -0.0
    return model


def test_zeros_become_masks():
    model = with_zeros()
    expected = {name: model.state_dict()[name] != 0 for name in ("0.weight", "3.weight")}
    y = model(X)
    dense = ls.Masks.of_nonzero(model)
    ls.sparsify_(model)
    masks = ls.Masks.of_nonzero(model)
    assert masks == dense == ls.Masks(expected)
    assert 0 < masks.density < 1
    ls.compact_(ls.set_masks_(model, masks))
    assert model[3].weight.shape == (40,)
    close(model(X), y)
    assert ls.Masks.of_nonzero(model) == masks, "of compact layers too"


def test_nonzero_is_asked_of_effective_weights_and_of_masked_layers_only():
    model = ls.sparsify_(network(), lambda module, name: name == "3")
    mask = torch.arange(60).view(5, 12) % 2
    ls.set_masks_(model, {"3.weight": mask})
    assert ls.Masks.of_nonzero(model) == ls.Masks({"3.weight": mask})


def test_tied_weights_have_one_mask():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(ls.Masks.of_nonzero(model)) == ["0.weight"]
    assert list(ls.Masks.of_nonzero(nn.Linear(3, 3))) == ["weight"]


# ---- torch.nn.utils.prune ------------------------------------------------------------------------


def pruned_once(model):
    torch_prune.random_unstructured(model[0], "weight", 0.5)
    torch_prune.l1_unstructured(model[3], "weight", 0.3)


def pruned_twice(model):  # a PruningContainer
    pruned_once(model)
    torch_prune.ln_structured(model[0], "weight", 1, n=2, dim=0)
    torch_prune.random_unstructured(model[3], "weight", 0.5)


def with_biases(model):
    torch_prune.l1_unstructured(model[3], "bias", 0.4)
    pruned_once(model)


@pytest.mark.parametrize("prune", [pruned_once, pruned_twice, with_biases])
def test_masks_are_taken_over(prune):
    torchs = network()
    prune(torchs)
    ours = network()
    prune(ours)
    originals = [ours[0].weight_orig, ours[3].weight_orig]
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (torchs, ours)]
    masks = ls.Masks({f"{i}.weight": ours[i].weight_mask for i in (0, 3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.sparsify_(ours)
    assert (type(ours[0]), type(ours[3])) == (ls.nn.MaskedConv2d, ls.nn.MaskedLinear)
    assert ls.masks_of(ours) == masks
    assert 0 < masks.density < 1
    assert ours[0].weight is originals[0]
    assert ours[3].weight is originals[1]
    assert next(iter(ours[3]._parameters)) == "weight", "where a dense layer has it"
    for _ in range(3):
        outputs = []
        for model, optimizer in zip((torchs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(model(X))
            outputs[-1].square().mean().backward()
        close(*outputs)
        for i in (0, 3):
            close(torchs[i].weight_orig.grad, ours[i].weight.grad)
        for optimizer in optimizers:
            optimizer.step()
    if prune is with_biases:
        assert (ours[3].bias == 0).sum() == 2, "what prunes the bias stays"
        assert len(ours[3]._forward_pre_hooks) == 1
    else:
        assert not ours[3]._forward_pre_hooks
        fresh = ls.sparsify_(network())
        fresh.load_state_dict(ours.state_dict())
        close(fresh(X), ours(X))
    ls.compact_(ours)
    close(ours(X), torchs(X))


def with_stale_biases():
    """Masked layers whose pruned biases have been trained since torch computed them last."""
    model = network()
    with_biases(model)
    torch_prune.l1_unstructured(model[0], "bias", 0.4)
    ls.sparsify_(model)
    model(X)
    with torch.no_grad():
        model[0].bias_orig += 1
        model[3].bias_orig += 1
        left = [model[i].bias_orig * model[i].bias_mask for i in (0, 3)]
        hidden = F.conv2d(X, model[0].effective_weight, left[0]).relu().flatten(1)
        expected = F.linear(hidden, model[3].effective_weight, left[1])
    assert not torch.equal(model[3].bias, left[1])
    return model, expected


FORMS = {
    "masked": lambda model: model,
    "compact": ls.compact_,
    "expanded": lambda model: ls.sparsify_(ls.compact_(model)),
    "dense": ls.densify_,
    "packed": lambda model: ls.pack_(model, report=None),
    "packed from compact": lambda model: ls.pack_(ls.compact_(model), report=None),
    "planned": lambda model: ls.plan(model, X, training=False, cache=False) and model,
    "one of two": lambda model: ls.ensemble.select(ls.ensemble.replicate([model, model]), 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_uses_the_biases_that_are_left(form):
    model, expected = with_stale_biases()
    close(FORMS[form](model)(X).detach(), expected)


def test_packed_layers_hold_plain_biases():
    model, expected = with_stale_biases()
    ls.pack_(model, report=None)
    assert {"0.bias", "3.bias"} < model.state_dict().keys()
    assert not any("orig" in name or "mask" in name for name in model.state_dict())
    assert not any(m._forward_pre_hooks for m in model)
    close(copy.deepcopy(model)(X), expected)


def test_the_dense_state_dict_has_the_biases_that_are_left():
    model, expected = with_stale_biases()
    dense = network()
    dense.load_state_dict(ls.dense_state_dict(model), strict=True)
    close(dense(X).detach(), expected)


def test_a_ticket_of_a_network_with_pruned_biases():
    model, _ = with_stale_biases()
    ticket = ls.find_ticket(model, lambda model, stop_at=None: None, 1, 0.5)
    again, _ = with_stale_biases()
    close(ticket.apply_(again)(X), model(X))


def test_a_pruned_weight_that_is_shared_is_left_to_torch():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.warns(UserWarning, match="sparsify_ skipped") as caught:
        ls.sparsify_(model)
    said = [str(w.message) for w in caught]
    assert len(said) == 2
    assert "skipped 0: torch.nn.utils.prune masks its weight, which another layer shares" in said[0]
    assert "skipped 1: its weight is shared with 0 (Linear), which has no mask" in said[1]
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, ls.nn.MaskedLinear]
    model(torch.randn(2, 3))


def test_a_layer_left_out_stays_as_torch_has_it():
    model = network()
    pruned_once(model)
    ls.sparsify_(model, lambda module, name: name == "0")
    assert len(model[3]._forward_pre_hooks) == 1
    assert "weight_orig" in dict(model[3].named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype(dtype):
    model = network().to(dtype)
    pruned_once(model)
    ls.sparsify_(model)
    assert model[0].weight.dtype == dtype
    assert model[0].weight_mask.dtype == torch.bool
    assert model(X.to(dtype)).dtype == dtype


@pytest.mark.parametrize("convert", [ls.sparsify_, lambda model: ls.compact_(ls.sparsify_(model))])
def test_a_masked_layer_is_not_pruned_by_torch(convert):
    """It would take away the mask, and the next forward would fail."""
    model = convert(nn.Sequential(nn.Linear(6, 5)))
    ls.set_masks_(model, {"0.weight": torch.rand(5, 6) < 0.5})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for prune in (torch_prune.l1_unstructured, torch_prune.random_unstructured):
        with pytest.raises(TypeError, match=r"which has a mask already; use ls\.prune"):
            prune(model[0], "weight", 0.5)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    torch_prune.l1_unstructured(model[0], "bias", 0.4)  # is none of ours
    assert model(torch.randn(2, 6)).shape == (2, 5)
