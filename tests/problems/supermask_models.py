"""Small models with learned masks, and how they are trained in tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lottery_sparse as ls

OPTIONS = [{}, {"rescale": True}, {"weights": "signed_constant"}]
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
rounded = pytest.mark.parametrize("round_mask", [False, True])


def dense(seed=0, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular", bias=bias),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 7, bias=bias),
            nn.ReLU(),
            nn.Linear(7, 5),
        )


def learning(seed=0, scatter=True, **changes):
    """A model with learned masks, its scores spread out."""
    model = ls.supermask_(dense(seed), **{"seed": seed, **changes})
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed + 100)
        for layer in layers(model):
            layer.score += scatter * torch.randn(layer.score.shape)
    return model


def layers(model):
    return [
        m for m in model.modules() if isinstance(m, ls.nn.SupermaskLinear | ls.nn.SupermaskConv2d)
    ]


def images(seed=0, batch=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 4, 4, generator=generator)


def train(model, steps, optimizer=None):
    scores = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(scores, lr=5.0, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        model(images(step)).square().sum(-1).mean().backward()
        optimizer.step()
    return optimizer
