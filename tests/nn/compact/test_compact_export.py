"""torch.export of compact layers: the graph computes with the weights that it is given later."""

from __future__ import annotations

import pytest
import torch
from test_compact_layers import pair
from tolerances import close
from torch import nn

import lottery_sparse as ls

CASES = [
    ("linear", "zero", 0.05, False),
    ("linear", "zero", 0.9, False),
    ("linear", "zero", 0.9, True),
    ("linear", "constant", 0.4, False),
    ("networks", "zero", 0.9, False),
    ("conv", "zero", 0.9, False),
]


@pytest.mark.parametrize(("kind", "frozen", "density", "strict"), CASES)
def test_an_exported_layer_computes_with_the_weights_it_is_given(kind, frozen, density, strict):
    layer = nn.Conv2d(2, 6, 3) if kind == "conv" else nn.Linear(20, 6)
    plain, compact = pair(layer, frozen, density)
    if kind == "networks":
        compact = ls.compact_(ls.ensemble.replicate(plain, 2))
    x = torch.randn(3, 2, 5, 5) if kind == "conv" else torch.randn(3, 20)
    exported = torch.export.export(compact, (x,), strict=strict).module()
    state = exported.state_dict()
    doubled = {name: 2 * value.detach() for name, value in exported.named_parameters()}
    exported.load_state_dict(state | doubled)
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter *= 2
    close(exported(x), compact(x))
    exported(x).sum().backward()
    compact(x).sum().backward()
    close(exported.weight.grad, compact.weight.grad)
