"""Forward-mode derivatives, which the ops do not have: one sentence, and no tangent is lost."""

from __future__ import annotations

import pytest
import torch
from test_compact_layers import pair
from tolerances import close
from torch import nn
from torch.autograd import forward_ad

import lottery_sparse as ls

# torch's own, as it loads its rules for tangents with torch.jit
pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

LAYERS = {"linear": (nn.Linear(7, 6), (3, 7)), "conv2d": (nn.Conv2d(2, 4, 3), (3, 2, 5, 5))}


def dual(layer, x):
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, x))


WAYS = {
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    "jacfwd": lambda layer, x: torch.func.jacfwd(layer)(x),
    "hessian": lambda layer, x: torch.func.hessian(lambda x: layer(x).sum())(x),
    "dual": dual,
    "dual without gradients": torch.no_grad()(dual),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", ["masked", "compact"])
def test_it_is_refused_in_one_sentence(form, kind, way):
    layer, shape = LAYERS[kind]
    made = pair(layer, density=0.2)[form == "compact"]
    with pytest.raises(NotImplementedError, match=rf"^{form}_{kind} has no forward-mode .*\.$"):
        WAYS[way](made, torch.randn(shape))


def test_learned_masks_refuse_it():
    layer = ls.supermask_(nn.Linear(7, 6))
    with pytest.raises(NotImplementedError, match=r"^supermask_linear has no forward-mode"):
        dual(layer, torch.randn(3, 7))


@pytest.mark.parametrize("form", ["masked", "compact"])
def test_a_level_without_tangents_disturbs_nothing(form):
    layer, shape = LAYERS["linear"]
    made = pair(layer)[form == "compact"]
    x = torch.randn(shape)
    wanted = made(x)
    with forward_ad.dual_level():
        close(made(x), wanted)
        with torch.no_grad():
            close(made(x), wanted)
        made(x).sum().backward()
    assert made.weight.grad is not None
