"""LeNet-300-100 by each contender of bench_lenet_step.py, as a function that makes one step."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import lottery_sparse as ls

RATE = 1.2e-3  # the paper's, for LeNet
BATCH = 60
# the paper keeps 80% per round of the hidden layers and 90% of the output layer
OUTPUT = 0.472  # log(0.9) / log(0.8)


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def masks_of(model: nn.Module, density: float) -> dict[str, Tensor]:
    """Random masks of the network that round log(density) / log(0.8) has."""
    weights = {n: p for n, p in model.named_parameters() if n.endswith("weight")}
    output = list(weights)[-1]
    return {
        name: torch.rand(weight.shape) < (density**OUTPUT if name == output else density)
        for name, weight in weights.items()
    }


def data(*networks: int) -> tuple[Tensor, Tensor]:
    return torch.rand(*networks, BATCH, 784), torch.randint(0, 10, (*networks, BATCH))


def eager(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable:
    x, labels = data()

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


# ---- one network ---------------------------------------------------------------------------------


def dense(density: float, **options: Any) -> Callable:
    model = lenet()
    return eager(model, torch.optim.Adam(model.parameters(), RATE, **options))


def pruned(density: float) -> Callable:
    model = lenet()
    for name, mask in masks_of(model, density).items():
        prune.custom_from_mask(model[int(name.split(".")[0])], "weight", mask)
    return eager(model, torch.optim.Adam(model.parameters(), RATE, fused=True))


def masked_model(density: float) -> nn.Module:
    model = lenet()
    masks = masks_of(model, density)
    return ls.set_masks_(ls.sparsify_(model), masks)


def masked(density: float) -> Callable:
    model = masked_model(density)
    return eager(model, torch.optim.Adam(model.parameters(), RATE, fused=True))


def compact(density: float, adam: str) -> Callable:
    """adam: "torch" (fused), or "ls"."""
    model = ls.compact_(masked_model(density))
    if adam == "ls":
        return eager(model, ls.optim.Adam(model.parameters(), RATE))
    return eager(model, torch.optim.Adam(model.parameters(), RATE, fused=True))


def whole_step(density: float) -> Callable:
    model = ls.compact_(masked_model(density))
    step = ls.train_step(model, ls.optim.Adam(model.parameters(), RATE))
    x, labels = data()
    return lambda: step(x, labels)


# ---- many networks -------------------------------------------------------------------------------


def one_by_one(density: float, networks: int, **options: bool) -> Callable:
    steps = [dense(density, **options) for _ in range(networks)]

    def step():
        for of_one in steps:
            of_one()

    return step


def replicated(density: float, networks: int) -> tuple[nn.Module, Any]:
    """A compact model of `networks` networks with masks of their own, and its optimizer."""
    model = ls.ensemble.replicate(ls.sparsify_(lenet()), networks, list(range(networks)))
    ls.set_masks_(model, masks_of(model, density))
    model = ls.compact_(model)
    return model, ls.optim.Adam(model.parameters(), RATE)


def together(density: float, networks: int) -> Callable:
    model, optimizer = replicated(density, networks)
    x, labels = data(networks)

    def step():
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x).flatten(0, 1), labels.flatten(), reduction="sum") / BATCH
        losses.backward()
        optimizer.step()

    return step


def whole_step_together(density: float, networks: int) -> Callable:
    step = ls.train_step(*replicated(density, networks))
    x, labels = data(networks)
    return lambda: step(x, labels)


def repeated(rounds: int, networks: int, **options: bool) -> Callable:
    step = one_by_one(1.0, networks, **options)

    def steps():
        for _ in range(rounds):
            step()

    return steps


def chain(rounds: int, networks: int) -> Callable:
    """One step of each round of pruning a fifth of what the hidden layers keep."""
    steps_of_rounds = [whole_step_together(0.8**r, networks) for r in range(rounds)]

    def steps():
        for step in steps_of_rounds:
            step()

    return steps


class TwoProcesses:
    """Half of the networks in each of two processes of one thread; a call is one step of all."""

    def __init__(self, networks: int, **options: bool):
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for count in (networks // 2, networks - networks // 2):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(there, count, options), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        self()  # until both are ready

    def __call__(self) -> None:
        for pipe in self.pipes:
            pipe.send(True)
        for pipe in self.pipes:
            pipe.recv()

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(False)
            process.join()


def _serve(pipe: Any, networks: int, options: dict[str, bool]) -> None:
    torch.set_num_threads(1)
    step = one_by_one(1.0, networks, **options)
    while pipe.recv():
        step()
        pipe.send(True)
