"""Layers by their Parameter, and the one hook that has them follow the steps of optimizers."""

import gc

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import lottery_sparse as ls
from lottery_sparse.nn.registry import Layers


def layer():
    made = ls.sparsify_(nn.Linear(6, 5))
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[:, ::2] = True
    return ls.set_masks_(made, {"weight": mask}, ls.frozen.Constant(0.5))


def test_one_hook_serves_masked_and_compact_layers():
    masked, compact = layer(), ls.compact_(layer())
    parameters = [*masked.parameters(), *compact.parameters()]
    for p in parameters:
        p.grad = torch.ones_like(p)
    before = masked.weight.detach().clone(), compact.weight_effective.clone()
    torch.optim.SGD(parameters, lr=0.25, fused=True).step()  # which counts no version
    for got, start in zip((masked.weight, compact.weight_effective), before, strict=True):
        assert torch.equal(got, torch.where(masked.weight_mask, start - 0.25, start))
    hooks = _global_optimizer_post_hooks.values()
    assert sum(hook.__module__.startswith("lottery_sparse.") for hook in hooks) == 1


def test_layers_are_found_by_the_parameter_that_they_have_now():
    known, one, two = Layers(), nn.Linear(2, 2), nn.Linear(2, 2)
    two.weight = first = one.weight
    for made in (one, two):
        known.add(made)
    assert set(known.of(first)) == {one, two} == set(known.all())
    one.weight = nn.Parameter(torch.zeros(2, 2))
    assert known.of(first) == [two] == known.all()
    assert known.of(one.weight) == []
    before = known.count
    known.add(one)
    assert known.of(one.weight) == [one]
    assert known.count > before


def test_entries_without_a_layer_are_dropped():
    known, kept = Layers(), nn.Linear(2, 2)
    known.add(kept)
    for _ in range(1000):
        known.add(nn.Linear(2, 2))
    gc.collect()
    known.add(nn.Linear(2, 2))
    assert len(known) < 200
    assert known.of(kept.weight) == [kept]
