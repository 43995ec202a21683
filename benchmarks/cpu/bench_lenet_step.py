"""One training step of LeNet-300-100 with its optimizer, Adam, at the paper's batch of 60.

One network on one thread:

    torch, torch fused       dense; Adam as it comes and fused=True
    prune                    torch.nn.utils.prune, fused Adam
    ls masked                masked layers, fused Adam
    ls compact + torch       compact layers, fused Adam
    ls compact + ls.optim    compact layers, ls.optim.Adam
    ls.train_step            … as one call

and 45 networks on two threads:

    torch, torch fused       dense, one after another
    … processes              dense, in two processes of one thread
    ls together              ls.ensemble.replicate, compact, ls.optim.Adam
    ls.train_step            … as one call

and the same 45 through a chain of pruning, one step in each of its 20 rounds, 100% to 1.4% kept.
Dense costs the same at every density.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from benchmarks.cpu import lenet, steps
from benchmarks.cpu.layers import LENET_DENSITIES, LENET_NETWORKS, QUICK_LENET_DENSITIES

FUSED = {"fused": True}
DENSE = {"torch": lenet.dense, "torch fused": partial(lenet.dense, **FUSED)}
SPARSE = {
    "prune": lenet.pruned,
    "ls masked": lenet.masked,
    "ls compact + torch": partial(lenet.compact, adam="torch"),
    "ls compact + ls.optim": partial(lenet.compact, adam="ls"),
    "ls.train_step": lenet.whole_step,
}
DENSE_MANY = {
    "torch": lenet.one_by_one,
    "torch fused": partial(lenet.one_by_one, **FUSED),
    "torch processes": lambda density, networks: lenet.TwoProcesses(networks),
    "torch fused processes": lambda density, networks: lenet.TwoProcesses(networks, **FUSED),
}
CHAIN_ROUNDS = 20
CHAIN = {
    "torch": partial(lenet.repeated, CHAIN_ROUNDS),
    "torch fused": partial(lenet.repeated, CHAIN_ROUNDS, **FUSED),
    "ls.train_step": partial(lenet.chain, CHAIN_ROUNDS),
}
SPARSE_MANY = {"ls together": lenet.together, "ls.train_step": lenet.whole_step_together}


class Case(NamedTuple):
    network: str
    threads: int
    density: float
    contender: str


def cases(quick: bool) -> list[Case]:
    densities = QUICK_LENET_DENSITIES if quick else LENET_DENSITIES
    found = []
    for network, threads, dense, sparse in (
        ("LeNet", 1, DENSE, SPARSE),
        (f"{LENET_NETWORKS} LeNets", 2, DENSE_MANY, SPARSE_MANY),
    ):
        found += [Case(network, threads, densities[0], name) for name in dense]
        found += [Case(network, threads, d, name) for d in densities for name in sparse]
    chain = f"{LENET_NETWORKS} LeNets, {CHAIN_ROUNDS} rounds"
    return found + [Case(chain, 2, 1.0, name) for name in CHAIN]


def bench_lenet_step(benchmark, quick, case):
    torch.set_num_threads(case.threads)
    benchmark.extra_info.update(case._asdict())
    benchmark.group = case.network
    if case.threads == 1:
        step = (DENSE | SPARSE)[case.contender](case.density)
    elif "rounds" in case.network:
        step = CHAIN[case.contender](LENET_NETWORKS)
    else:
        step = (DENSE_MANY | SPARSE_MANY)[case.contender](case.density, LENET_NETWORKS)
    steps.measure(benchmark, step, quick)
    if isinstance(step, lenet.TwoProcesses):
        step.close()
