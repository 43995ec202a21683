"""Networks, data and steps by modules for the tests of train_step."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from tolerances import USUAL, close
from torch import nn

import lottery_sparse as ls

STEPS = 20
# of all steps; an eps keeps Adam from magnifying those of tiny gradients
ROUNDINGS = STEPS * USUAL
# widths around the tile and the blocks of the kernels, and one of everything
WIDTHS = [(40, 33, 31, 10), (1, 1, 2), (70, 5), (16, 100, 16, 8, 3)]
BATCHES = [1, 31, 33, 60]
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.2}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "eps": 1e-3}),
    "adam decay": (torch.optim.Adam, {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-3, "betas": (0.8, 0.99)}),
    "ls.adam": (ls.optim.Adam, {"lr": 0.01, "eps": 1e-3, "maximize": True}),
    "ls.sgd": (ls.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}


FROZEN = {
    "tensor": None,
    "constant": ls.frozen.Constant(),
    "seeded": ls.frozen.Seeded("normal", seed=3),
}


def network(
    widths=WIDTHS[0], density=0.3, seed=0, bias=True, compact=True, frozen="zero", plain=()
):
    """`frozen`: of every layer; `plain`: numbers of the layers that stay nn.Linear."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Flatten()]
        for k, n in itertools.pairwise(widths):
            layers += [nn.Linear(k, n, bias=bias), nn.ReLU()]
        model = ls.sparsify_(nn.Sequential(*layers[:-1]))
        for i in plain:
            model[2 * i + 1] = nn.Linear(widths[i], widths[i + 1], bias=bias)
        if len(plain) == len(widths) - 1:
            return model
        masks = {name: torch.rand(m.shape) < density for name, m in ls.masks_of(model).items()}
        sources = {
            name: torch.randn(mask.shape) / 4 if frozen is None else frozen
            for name, mask in masks.items()
        }
        ls.set_masks_(model, masks, frozen=sources)
    return ls.compact_(model) if compact else model


def batches(widths, batch, steps=STEPS, networks=(), seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(*networks, batch, widths[0], generator=generator)
        yield x, torch.randint(widths[-1], (*networks, batch), generator=generator)


def by_modules(model, optimizer, x, y):
    """The step that train_step stands for; returns the loss, per network if there are many."""
    dtype = next(model.parameters()).dtype
    out = model(x.to(dtype))
    optimizer.zero_grad()
    if out.dim() == 3:
        labels = y if y.dim() == 2 else y.expand(out.shape[0], -1)
        loss = torch.stack([F.cross_entropy(o, t) for o, t in zip(out, labels, strict=True)])
    else:
        loss = F.cross_entropy(out, y)
    loss.sum().backward()
    optimizer.step()
    return loss.detach()


def twin(model, kind, options):
    """The same network in float64, as masked layers, with torch's optimizer."""
    other = ls.sparsify_(copy.deepcopy(model)).double()
    kind = getattr(torch.optim, kind.__name__)
    return other, kind(other.parameters(), **options)


def assert_same(model, other):
    expected = other.state_dict()
    for name, value in model.state_dict().items():
        wanted = expected[name]
        close(value, wanted.to(value.dtype), ROUNDINGS, msg=name)
    for layer in model:
        if isinstance(layer, ls.nn.CompactLinear):
            stale = layer.weight_effective.clone()
            layer.refresh_()
            assert torch.equal(stale, layer.weight_effective), "effective weights were written"


def check(model, kind, options, data):
    other, other_optimizer = twin(model, kind, options)
    step = ls.train_step(model, optimizer := kind(model.parameters(), **options))
    for x, y in data:
        loss, expected = step(x, y), by_modules(other, other_optimizer, x, y)
        close(loss.double(), expected, ROUNDINGS, torch.float32)
    assert_same(model, other)
    return optimizer
