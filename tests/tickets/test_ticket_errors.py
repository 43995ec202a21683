"""What find_ticket refuses, when it does, and what it keeps of a training's metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_ticket import Trainer, network
from torch import nn

import lottery_sparse as ls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be a whole number, at least 1, got 0"),
        ({"rounds": 1.5}, "rounds must be a whole number"),
        ({"rewind_to": -1}, "rewind_to is an iteration, at least 0, got -1"),
        ({"keep": 80}, "keep is a fraction"),
        ({"keep": {"0.weight": 1.5}}, "keep is a fraction"),
        ({"keep": {"1.weight": 0.5}}, "keep names 1.weight, which has no mask; masks: 0.weight"),
        ({"keep": {"0.weight": 0.5}, "scope": "global"}, "one fraction for global scope"),
        ({"scope": "network"}, "scope must be"),
        ({"criterion": "big"}, "criterion must be one of large_final"),
        ({"mask1": "init"}, "mask1 must be one of rewind, reinit"),
        ({"mask0": "rewind"}, "mask0 must be one of zero, freeze_init"),
        ({"generator": "x"}, "generator must be an int seed"),
        ({"model": nn.ReLU()}, "model has no layer that can have a mask; it has no weights"),
    ],
    ids=str,
)
def test_errors_come_before_the_first_training(changes, message):
    train = Trainer()
    arguments = {"model": network(), "train_fn": train, "rounds": 1, "keep": 0.5}
    with pytest.raises((ValueError, TypeError), match=message):
        ls.find_ticket(**arguments | changes)
    assert train.stops == []


@pytest.mark.parametrize("some", [False, True], ids=["all layers", "one of two"])
def test_models_that_learn_their_masks_are_refused_before_anything_changes(some):
    model = ls.supermask_(network(), filter_fn=(lambda m, name: name == "3") if some else None)
    before, train = {n: v.clone() for n, v in model.state_dict().items()}, Trainer()
    ticket = ls.Ticket(ls.masks_of(ls.sparsify_(network())), network().state_dict())
    for call in (lambda: ls.find_ticket(model, train, 1, 0.5), lambda: ticket.apply_(model)):
        with pytest.raises(ValueError, match=r"masks are learned ones; call ls\.sparsify_"):
            call()
    assert train.stops == []
    assert type(model[0]) is (nn.Linear if some else ls.nn.SupermaskLinear)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_masked_layers_that_compute_their_weight_are_refused_by_name():
    model, train = ls.sparsify_(network()), Trainer()
    nn.utils.parametrizations.weight_norm(model[3])
    with pytest.raises(TypeError, match=r'^3\.weight is computed.*\(layer, "weight"\) first\.$'):
        ls.find_ticket(model, train, 1, 0.5)
    assert train.stops == []
    nn.utils.parametrize.remove_parametrizations(model[3], "weight")
    assert ls.find_ticket(model, train, 1, 0.5).masks["3.weight"].sum() == 16


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def other(*layers):
    """The network with other layers in place of the last ones."""
    return nn.Sequential(*list(network())[: 4 - len(layers)], *layers)


@pytest.mark.filterwarnings("ignore:sparsify_ skipped 3:UserWarning")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: other(nn.Linear(8, 5)),
            r"3\.weight has shape \(4, 8\) in the ticket, but \(5, 8\)",
        ),
        (lambda: other(nn.Identity()), r"ticket has 3\.weight, which this model has not; give a"),
        (lambda: other(nn.ReLU(), nn.Linear(8, 4, False)), r"ticket has 3\.bias, which this model"),
        (lambda: network().append(nn.PReLU()), r"model has 4\.weight, which the ticket has not"),
        (lambda: other(Doubled(8, 4)), r"a mask of 3\.weight, which is no weight of an nn\.Linear"),
    ],
    ids=["shape", "less", "no bias", "more", "cannot be masked"],
)
def test_a_model_that_a_ticket_does_not_fit_stays_as_it_is(model, message):
    ticket = ls.find_ticket(network(), Trainer(), 1, 0.5)
    model = model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ticket.apply_(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(isinstance(m, ls.nn.MaskedLinear) for m in model.modules())


def test_metrics_become_numbers_that_a_file_can_hold(tmp_path):
    shared = {}

    def train(model, stop_at=None):
        shared["loss"] = model[0].weight.sum() * 0 + 0.5  # of a graph
        shared["steps"] = shared.get("steps", np.int64(0)) + 1
        return {**shared, "each": (torch.tensor([1, 2]), np.float32(0.25), None), 3: True}

    ticket = ls.find_ticket(network(), train, 1, 0.5)
    assert [record["metrics"] for record in ticket.history] == [
        {"loss": 0.5, "steps": steps, "each": [[1, 2], 0.25, None], "3": True} for steps in (1, 2)
    ]
    assert type(ticket.history[0]["metrics"]["loss"]) is float
    ticket.save(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"net": [nn.ReLU()]}, r"metrics of train_fn\['net'\]\[0\] must be .*, got ReLU"),
        ({(1, 2): 3}, r"metrics of train_fn must have strings as keys, got \(1, 2\)"),
        (torch.ones(2, dtype=torch.complex64), "got complex"),
    ],
)
def test_metrics_that_no_file_can_hold_are_refused_after_the_first_training(metrics, message):
    trainings = []

    def train(model, stop_at=None):
        trainings.append(stop_at)
        return metrics

    with pytest.raises(TypeError, match=message):
        ls.find_ticket(network(), train, 3, 0.5)
    assert len(trainings) == 1


def test_a_training_that_diverged_names_the_layer():
    def diverge(model, stop_at=None):
        with torch.no_grad():
            model[3].weight[0, 0] = float("nan")

    with pytest.raises(ValueError, match=r"scores of 3\.weight hold NaN.*did the training diverge"):
        ls.find_ticket(network(), diverge, 1, 0.5, "large_final_same_sign")


def test_an_empty_layer_is_warned_about():
    with pytest.warns(UserWarning, match=r"3\.weight keeps no weight at all"):
        ticket = ls.find_ticket(network(), Trainer(), 1, {"3.weight": 0})
    assert ticket.masks["3.weight"].sum() == 0
