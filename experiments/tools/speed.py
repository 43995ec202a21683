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
from experiments.study.profiles import Profile
from experiments.study.runs import Run
from experiments.timing import least
from experiments.train.data import Dataset
from experiments.train.loop import EPS, evaluation, minibatches, step
from experiments.train.lottery import dense_round, next_start, train_rounds
from lottery_sparse.tickets.round import Began

ITERATIONS = 1_000  # of a round; validation every 100, as in the protocol
ROUNDS = range(21)
REPEATS = 2  # of each; the minimum is taken


def eager_round(run: Run, start: Began, dataset: Dataset, fused: bool) -> None:
    """A round in plain PyTorch."""
    model = build(run.net, run.seed)
    for name, mask in start.masks.items():
        if not start.released:
            layer = model.get_submodule(name.removesuffix(".weight"))
            prune.custom_from_mask(layer, "weight", mask)
    fit(model, run, dataset, fused)


def fit(model: nn.Module, run: Run, dataset: Dataset, fused: bool) -> None:
    options = {"fused": True} if fused else {}
    optimizer = torch.optim.Adam(model.parameters(), lr=run.net.lr, eps=EPS, **options)
    evaluation(model, dataset.val)
    for number, (images, labels) in enumerate(
        minibatches(dataset.train, run.net.iterations, run.net.batch_size, [run.seed]), 1
    ):
        step(model, optimizer, images, labels)
        if number % run.protocol.evaluate_every == 0:
            evaluation(model, dataset.val)
    for _ in ("best", "final"):  # as ours does
        evaluation(model, dataset.test)


def measure(dataset: Dataset, rounds: Sequence[int] = ROUNDS) -> dict[str, Any]:
    """Seconds of each round by each way, one thread, and how much faster a chain is in all."""
    torch.set_num_threads(1)
    network = replace(FC, iterations=ITERATIONS)
    run = Run(network=network, profile=Profile("speed", train_accuracy=False), seed=0)
    dense, found = dense_round(run, dataset, [0])
    rows = []
    for number in rounds:
        start = next_start(run, number, dense, found[0]) if number else dense.start
        ways = {
            "eager": lambda start=start: eager_round(run, start, dataset, fused=False),
            "eager_fused": lambda start=start: eager_round(run, start, dataset, fused=True),
            "ours": lambda start=start, n=number: train_rounds([run], n, [start], dataset),
        }
        best = least(ways, REPEATS, time.perf_counter)
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
