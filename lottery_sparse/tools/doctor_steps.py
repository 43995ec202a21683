"""Whether optimizers and train_step do here what torch's do: a few steps of a small network."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lottery_sparse.nn.forms.convert import set_masks_
from lottery_sparse.nn.forms.densify import dense_state_dict
from lottery_sparse.nn.forms.verbs import compact_, sparsify_
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.random.reference import random_uniform
from lottery_sparse.optim import optimizers
from lottery_sparse.optim.train_step import train_step

# name -> ours, torch's, and the options of both
OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "SGD": (optimizers.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (optimizers.Adam, torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (optimizers.AdamW, torch.optim.AdamW, {"lr": 0.01}),
}
STEPS, BATCH, SIZES, DENSITY = 3, 7, (65, 33, 10), 0.2
FAILED = "FAILED"
TOLERANCE = 1e-4  # of weights of order one


def verdicts(device: str) -> dict[str, str]:
    """Optimizer, or train_step with it where it runs -> "ok" or "FAILED: " and what is wrong."""
    found = {f"optim.{name}": _verdict(name, device, by_modules) for name in OPTIMIZERS}
    if device == "cpu" and dispatch.built("cpu") and dispatch.forced() in (None, "cpu"):
        found |= {f"train_step, {name}": _verdict(name, device, in_one_call) for name in OPTIMIZERS}
    return found


def by_modules(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def in_one_call(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    return train_step(model, optimizer)


def _verdict(name: str, device: str, way: Callable[..., Callable[..., Any]]) -> str:
    ours, theirs, options = OPTIMIZERS[name]
    try:
        compact, plain = compact_(_network(device)), _network(device)
        take_ours = way(compact, ours(compact.parameters(), **options))
        take_theirs = by_modules(plain, theirs(plain.parameters(), **options))
        x = _uniform(BATCH, SIZES[0], stream=5).to(device)
        y = (torch.arange(BATCH) % SIZES[-1]).to(device)
        for _ in range(STEPS):
            take_ours(x, y)
            take_theirs(x, y)
        got, expected = dense_state_dict(compact), dense_state_dict(plain)
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    except Exception as error:  # a self-check reports whatever goes wrong, it must not stop at it
        return f"{FAILED}: {' '.join(str(error).split())}"
    return "ok"


def _network(device: str) -> nn.Module:
    """The same every time: masked layers whose pruned weights hold zero."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(SIZES):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for stream, parameter in enumerate(model.parameters()):
            parameter.copy_(_uniform(*parameter.shape, stream=stream))
    masks = {
        name: parameter.detach().abs() > 1 - DENSITY
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
    }
    return set_masks_(sparsify_(model), masks).to(device)


def _uniform(*shape: int, stream: int) -> torch.Tensor:
    """In [-1, 1), straight from the reference, so that a broken kernel cannot stop the doctor."""
    count = torch.Size(shape).numel()
    return random_uniform(count, 0, stream, 0).view(shape) * 2 - 1
