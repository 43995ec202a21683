"""State of optimizers that cannot move with kept weights is refused, before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from test_compact_layers import pair_of_networks
from test_compacting import rolled, snapshot, unchanged

import lottery_sparse as ls


def steps(model, optimizer, count=3):
    x = torch.linspace(-1, 1, 128).view(8, 1, 4, 4).cos()

    def loss():
        optimizer.zero_grad()
        value = model(x).square().mean()
        value.backward()
        return value

    for _ in range(count):
        optimizer.step(loss)
    return loss().item()


class Blocks(torch.optim.SGD):
    """As 8-bit optimizers do: a number per block of the state."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["absmax"] = torch.ones(p.numel() // 4 + 2)
        return loss


KINDS = {
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3),
    "Blocks": lambda model: Blocks(model.parameters(), lr=0.01),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_new_masks(kind, loaded):
    _, model = pair_of_networks(spare=0)
    optimizer = KINDS[kind](model)
    steps(model, optimizer)
    if loaded:  # it has not stepped, so it is known where it is given
        state, model = optimizer.state_dict(), copy.deepcopy(model)
        optimizer = KINDS[kind](model)
        optimizer.load_state_dict(state)
    masks, before = rolled(model), snapshot(model)
    for name in masks:
        for given in (optimizer,) if loaded else (None, optimizer):
            with pytest.raises(ValueError, match=rf"{kind} keeps state for {name} in a form that"):
                ls.set_masks_(model, {name: masks[name]}, optimizer=given)
    assert unchanged(before, snapshot(model))
    optimizer.state.clear()
    ls.set_masks_(model, masks, optimizer=optimizer)
    before = steps(model, optimizer, 0)
    assert steps(model, optimizer, 9) < before, "it trains on"


@pytest.mark.parametrize("kind", KINDS)
def test_compact_and_expand(kind):
    for i, change in enumerate((ls.compact_, ls.sparsify_)):
        model = pair_of_networks(spare=0)[i]
        optimizer = KINDS[kind](model)
        steps(model, optimizer)
        before, kinds = snapshot(model), [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=rf"{kind} keeps state for 0.weight in a form that"):
            change(model, optimizer=optimizer)
        assert unchanged(before, snapshot(model))
        assert kinds == [type(m) for m in model.modules()]


def test_an_lbfgs_that_has_not_stepped_trains_the_compact_model():
    model, _ = pair_of_networks()
    optimizer = KINDS["LBFGS"](model)
    ls.compact_(model, optimizer)
    before = model[0].weight.detach().clone()
    steps(model, optimizer)
    assert not torch.equal(model[0].weight, before)
