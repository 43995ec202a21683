"""Each verb gives its form from whatever form the model has."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lottery_sparse as ls
from lottery_sparse.old_names import OLD_NAMES, old_name

FORMS = {
    "dense": lambda model: model,
    "masked": lambda model: ls.set_masks_(ls.sparsify_(model), masks()),
    "compact": lambda model: ls.compact_(ls.set_masks_(ls.sparsify_(model), masks())),
    "supermask": lambda model: learned(ls.supermask_(model)),
    "packed": lambda model: ls.pack_(ls.set_masks_(ls.sparsify_(model), masks()), report=None),
}
VERBS = {
    "dense": (ls.densify_, nn.Linear, nn.Conv2d),
    "masked": (ls.sparsify_, ls.nn.MaskedLinear, ls.nn.MaskedConv2d),
    "compact": (ls.compact_, ls.nn.CompactLinear, ls.nn.CompactConv2d),
    "packed": (lambda model: ls.pack_(model, report=None), ls.nn.PackedLinear, nn.Conv2d),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 4))


def masks():
    torch.manual_seed(1)
    return {f"{i}.weight": torch.rand(network()[i].weight.shape) < 0.6 for i in (0, 2, 3)}


def learned(model):
    for name, mask in masks().items():
        layer = model[int(name[0])]
        with torch.no_grad():
            layer.score.copy_(mask.float() - 0.5)
    ls.learning.use_masks_(model, "threshold")
    return model.eval()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("form", FORMS)
def test_each_verb_gives_its_form_and_the_model_computes_the_same(form, verb):
    model, x = FORMS[form](network()), torch.randn(6, 1, 4, 4)
    wanted, layers = model(x), list(model)
    call, linear, conv = VERBS[verb]
    assert call(model) is model
    if (form, verb) == ("packed", "compact"):
        conv = nn.Conv2d  # it is dense when packed, and a model in one of our forms keeps those
    assert [type(m) for m in model] == [conv, nn.Flatten, linear, linear]
    assert all(a is b for a, b in zip(model, layers, strict=True))
    torch.testing.assert_close(model(x), wanted)
    if verb in ("masked", "compact") and form != "dense":
        kept = ls.masks_of(model)
        for name, mask in masks().items():
            if (form, name) != ("packed", "0.weight"):
                assert torch.equal(kept[name], mask)


@pytest.mark.parametrize("form", FORMS)
def test_supermask_freezes_what_the_model_computed_with(form):
    if form == "supermask":
        with pytest.raises(ValueError, match="no layer to learn a mask for"):
            ls.supermask_(FORMS[form](network()))
        return
    model = FORMS[form](network())
    dense = ls.dense_state_dict(model)
    convolutions = form != "packed"  # which are dense there, and so left out
    ls.supermask_(model)
    assert type(model[0]) is (ls.nn.SupermaskConv2d if convolutions else nn.Conv2d)
    assert type(model[3]) is ls.nn.SupermaskLinear
    for name in ("0.weight", "2.weight", "3.weight"):
        assert torch.equal(model.state_dict()[name], dense[name])


def test_layers_that_the_filter_leaves_out_keep_their_form():
    model = ls.compact_(ls.sparsify_(network()))
    ls.supermask_(model, filter_fn=lambda m, name: name == "3")
    ls.sparsify_(model, lambda m, name: name == "2")
    assert [type(m) for m in model] == [
        ls.nn.CompactConv2d, nn.Flatten, ls.nn.MaskedLinear, ls.nn.SupermaskLinear,
    ]  # fmt: skip


def test_optimizer_state_moves_through_the_forms():
    model = ls.compact_(ls.set_masks_(ls.sparsify_(network()), masks()))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(6, 1, 4, 4)).square().sum().backward()
    optimizer.step()
    before = optimizer.state[model[2].weight]["exp_avg"].clone()
    ls.sparsify_(model, optimizer=optimizer)
    after = optimizer.state[model[2].weight]["exp_avg"]
    assert torch.equal(after[masks()["2.weight"]], before)
    assert not after[~masks()["2.weight"]].any()


def test_sparsify_sets_masks_at_the_end():
    model = ls.sparsify_(network(), masks=masks())
    assert ls.masks_of(model) == ls.Masks(masks())
    learning = ls.supermask_(network(), seed=3)
    sample = ls.learning.use_masks_(learning, 2)
    drawn = ls.masks_of(sample)
    assert ls.masks_of(ls.sparsify_(learning, learned=2)) == drawn


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: ls.sparsify_(m, torch.optim.SGD(m.parameters(), 1.0)), TypeError, "by name"),
        (lambda m: ls.sparsify_(m, learned="sample"), ValueError, "the model has none"),
        (lambda m: ls.compact_(nn.ReLU()), ValueError, "no masked layer"),
        (lambda m: ls.pack_(nn.ReLU()), ValueError, "no masked layer"),
        (lambda m: ls.Ticket.of(m), ValueError, "no masked layer"),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    model = network()
    with pytest.raises(error, match=message):
        call(model)
    assert [type(m) for m in model] == [type(m) for m in network()]


def test_tied_layers_cannot_learn_masks_and_stay_as_they_are():
    model = ls.sparsify_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model[1].weight = model[0].weight
    with pytest.raises(TypeError, match="shared with another layer"):
        ls.supermask_(model)
    assert type(model[0]) is ls.nn.MaskedLinear


@pytest.mark.parametrize("frozen", ["zero", ls.frozen.Constant(0.5)], ids=str)
def test_the_ticket_of_a_masked_model_gives_it_back(frozen, tmp_path):
    model = ls.set_masks_(ls.sparsify_(network()), masks(), frozen)
    ls.Ticket.of(model).save(tmp_path / "t.safetensors")
    torch.manual_seed(5)
    other = ls.Ticket.load(tmp_path / "t.safetensors").verify().apply_(network())
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(other(x), model(x))
    assert ls.masks_of(other) == ls.masks_of(model)


def test_few_names_at_the_top():
    callables = [n for n in ls.__all__ if callable(getattr(ls, n))]
    assert len(callables) <= 24


@pytest.mark.parametrize("name", OLD_NAMES)
def test_old_names_work_and_warn_once(name):
    old_name.cache_clear()
    with pytest.warns(FutureWarning, match=rf"lottery_sparse\.{name} is now ls\."):
        found = getattr(ls, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(ls, name) is found


def test_old_conversions_do_what_they_did():
    old_name.cache_clear()
    with pytest.warns(FutureWarning):
        model = ls.expand_(ls.compact_(ls.sparsify_(network(), lambda m, name: name != "0")))
    assert [type(m) for m in model[:1]] == [nn.Conv2d]
    with pytest.warns(FutureWarning):
        fixed = ls.masked_(ls.supermask_(network()), "threshold")
    assert type(fixed[0]) is ls.nn.MaskedConv2d
    with pytest.warns(FutureWarning):
        ticket = ls.supermask_ticket(ls.supermask_(network()))
    assert set(ticket.masks) == set(masks())
