"""The registry of layers by Parameter."""

from __future__ import annotations

import torch
from torch import nn

import lottery_sparse as ls
from lottery_sparse.nn import registry


def test_a_layer_that_takes_another_form_is_forgotten():
    """A new Parameter may have the id of one that is gone, which a stale entry would answer to."""
    layer = ls.sparsify_(nn.Linear(6, 4))
    ls.set_masks_(layer, {"weight": torch.arange(24).view(4, 6) % 3 == 0})

    def entries(layers):
        return [key for key, found in layers._by_id.items() if layer in found]

    assert (len(entries(registry.masked)), len(entries(registry.compact))) == (1, 0)
    ls.compact_(layer)
    assert (len(entries(registry.masked)), len(entries(registry.compact))) == (0, 1)
    ls.sparsify_(layer)
    assert (len(entries(registry.masked)), len(entries(registry.compact))) == (1, 0)
    ls.densify_(layer)
    assert (entries(registry.masked), entries(registry.compact)) == ([], [])
