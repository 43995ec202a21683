"""ls.optim.param_groups: weight decay is for what was a matrix, in every form of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lottery_sparse as ls


class Network(nn.Module):
    """Weights of two and more dimensions that decay is for, and others that it is not for."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 6)
        self.norm = nn.LayerNorm([3, 6])  # a weight of two dimensions
        self.conv = nn.Conv1d(3, 2, 1)
        self.batch = nn.BatchNorm1d(2)
        self.rnn = nn.GRU(6, 4, batch_first=True)
        self.gain = nn.Parameter(torch.ones(()))
        self.position_bias = nn.Parameter(torch.zeros(2, 4))
        self.last = nn.Linear(4, 5)
        self.last_again = nn.Linear(4, 5)
        self.last_again.weight = self.last.weight

    def forward(self, x):
        x = self.norm(self.first(self.embedding(x)))
        x, _ = self.rnn(self.batch(self.conv(x)))
        return self.last((x + self.position_bias) * self.gain) + self.last_again(x)


MATRICES = {
    "embedding.weight", "first.weight", "conv.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0",
    "last.weight",
}  # fmt: skip
X = torch.tensor([[0, 3, 6]])


def names_of(groups):
    return [(set(group["param_names"]), group["weight_decay"]) for group in groups]


def masked(model):
    ls.sparsify_(model)
    return ls.set_masks_(model, {"first.weight": torch.rand(6, 6) < 0.3})


FORMS = {
    "dense": lambda model: model,
    "masked": masked,
    "compact": lambda model: ls.compact_(masked(model)),
    "compact, of a copy": lambda model: copy.deepcopy(ls.compact_(masked(model))),
    "expanded": lambda model: ls.sparsify_(ls.compact_(masked(model))),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_sorted_as_the_dense_model(form):
    model = FORMS[form](Network())
    if "compact" in form:
        assert model.first.weight.dim() == 1
    groups = ls.optim.param_groups(model, 0.1)
    parameters = dict(model.named_parameters())
    others = parameters.keys() - MATRICES
    assert names_of(groups) == [(MATRICES, 0.1), (others, 0.0)]
    for group in groups:
        assert group["param_names"] == [n for n in parameters if n in group["param_names"]]
        named = zip(group["param_names"], group["params"], strict=True)
        assert all(parameters[name] is parameter for name, parameter in named)


def test_a_step_decays_the_kept_weights_and_nothing_else():
    model = FORMS["compact"](Network())
    model.requires_grad_()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(ls.optim.param_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in MATRICES else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, ls.optim.AdamW, ls.optim.SGD])
def test_names_are_in_the_state_of_optimizers(kind):
    model = Network()
    optimizer = kind(ls.optim.param_groups(model, 0.1), lr=1e-3)
    model(X).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert {name for group in state["param_groups"] for name in group["param_names"]} == {
        name for name, _ in model.named_parameters()
    }
    kind(ls.optim.param_groups(model, 0.1), lr=1e-3).load_state_dict(state)


def test_an_optimizer_that_was_built_before_keeps_its_groups():
    model = masked(Network())
    optimizer = ls.optim.AdamW(ls.optim.param_groups(model, 0.1))
    ls.compact_(model, optimizer)
    after = ls.optim.param_groups(model, 0.1)
    for group, again in zip(optimizer.param_groups, after, strict=True):
        assert {*map(id, group["params"])} == {*map(id, again["params"])}
        assert group["weight_decay"] == again["weight_decay"]


def test_scores_are_matrices_and_what_is_frozen_is_left_out():
    model = ls.supermask_(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)))
    assert names_of(ls.optim.param_groups(model, 0.1)) == [({"0.score", "2.score"}, 0.1)]


@pytest.mark.parametrize("form", [lambda m: m, ls.compact_], ids=["masked", "compact"])
def test_biases_of_networks_side_by_side_are_no_matrices(form):
    model = ls.ensemble.replicate(form(ls.sparsify_(nn.Sequential(nn.Linear(3, 4)))), 2)
    assert model[0].bias.shape == (2, 4)
    assert names_of(ls.optim.param_groups(model, 1)) == [({"0.weight"}, 1.0), ({"0.bias"}, 0.0)]


@pytest.mark.parametrize(
    ("decay", "error", "message"),
    [
        (-0.1, ValueError, r"weight_decay must be finite and at least 0, got -0\.1"),
        (float("nan"), ValueError, r"weight_decay must be finite"),
        ("0.1", TypeError, r"weight_decay must be a number, got str"),
    ],
)
def test_a_decay_that_is_none(decay, error, message):
    with pytest.raises(error, match=message):
        ls.optim.param_groups(nn.Linear(2, 2), decay)


def test_nothing_to_train():
    with pytest.raises(ValueError, match=r"no Parameter that requires grad; call model\.requires"):
        ls.optim.param_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
