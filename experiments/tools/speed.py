"""What a chain of rounds costs, beside eager PyTorch that trains one network after another.

Both train the same masks for the same iterations and evaluate the validation part as often. Eager
PyTorch is what a user of torch.nn.utils.prune writes: dense weights times a mask, torch.optim.Adam.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from experiments.store.provenance import provenance
from experiments.study.networks import FC, build
from experiments.train.data import Dataset
from experiments.train.loop import EPS, evaluation, minibatches, step
from experiments.train.lottery import (
    Lottery,
    Rewind,
    Start,
    dense_round,
    next_start,
    spread,
    train_rounds,
)

ITERATIONS = 1_000  # of a round; validation every 100, as in the protocol
ROUNDS = range(21)
REPEATS = 2  # of each; the minimum is taken


def eager_round(run: Lottery, start: Start, dataset: Dataset, fused: bool) -> None:
    """A round in plain PyTorch."""
    model = build(run.network, run.seed)
    for name, mask in start.masks.items():
        if start.masked:
            prune.custom_from_mask(
                model.get_submodule(name.removesuffix(".weight")), "weight", mask
            )
    fit(model, run, dataset, fused)


def fit(model: nn.Module, run: Lottery, dataset: Dataset, fused: bool) -> None:
    options = {"fused": True} if fused else {}
    optimizer = torch.optim.Adam(model.parameters(), lr=run.network.lr, eps=EPS, **options)
    evaluation(model, dataset.val)
    for number, (images, labels) in enumerate(
        minibatches(dataset.train, run.network.iterations, run.network.batch_size, [run.seed]), 1
    ):
        step(model, optimizer, images, labels)
        if number % run.evaluate_every == 0:
            evaluation(model, dataset.val)
    for _ in ("best", "final"):  # as ours does
        evaluation(model, dataset.test)


def measure(dataset: Dataset, rounds: Sequence[int] = ROUNDS) -> dict[str, Any]:
    """Seconds of each round by each way, one thread, and how much faster a chain is in all."""
    torch.set_num_threads(1)
    network = replace(FC, iterations=ITERATIONS)
    run = Lottery(network, rounds=max(rounds), train_accuracy=False)
    dense, found = dense_round(run, dataset, [0])
    rewind = Rewind(found[0], spread(network, run.seed, "cpu"))
    rows = []
    for number in rounds:
        one_shot = replace(run, one_shot=True)
        start = next_start(one_shot, number, dense, rewind) if number else dense.start
        ways = {
            "eager": lambda start=start: eager_round(run, start, dataset, fused=False),
            "eager_fused": lambda start=start: eager_round(run, start, dataset, fused=True),
            "ours": lambda start=start, n=number: train_rounds([run], n, [start], dataset),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(REPEATS):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                best[name] = min(best[name], time.perf_counter() - began)
        rows.append({"round": number, "density": start.masks.density, **best})
    total = {name: sum(row[name] for row in rows) for name in ("eager", "eager_fused", "ours")}
    return {
        "iterations": ITERATIONS,
        "threads": 1,
        "rounds": rows,
        "seconds": total,
        "speedup": {name: total[name] / total["ours"] for name in ("eager", "eager_fused")},
        **provenance(),
    }
