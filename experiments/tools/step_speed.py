"""What a step and an evaluation cost in each precision, layout and form, dense and pruned.

The profile `coarse` takes its literals from this table, once; no run asks the host.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import lottery_sparse as ls
from experiments.study.networks import NETWORKS, Network, keep_by_parameter
from experiments.timing import least
from experiments.train.data import Split
from experiments.train.loop import adam, evaluation, stepper
from experiments.train.models import dense_start, model_of
from lottery_sparse.tickets.round import Began

WAYS = {  # precision, layout, form
    "paper": ("float32", "contiguous", "compact"),
    "float32 last, compact": ("float32", "channels_last", "compact"),
    "float32 last, masked": ("float32", "channels_last", "masked"),
    "bfloat16 last, compact": ("bfloat16", "channels_last", "compact"),
    "coarse": ("bfloat16", "channels_last", "masked"),
}
ROUNDS = (0, 4, 8, 12, 16, 20)
IMAGES = 1_000  # of an evaluation
REPEATS = 3  # of each way, one after the other; the minimum is taken


def measure(networks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield for each network and round the least CPU seconds of one thread.

    They are of a training step, and of an evaluation of `IMAGES` images.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in networks:
            for number in ROUNDS:
                yield {"network": name, "round": number, **of(NETWORKS[name], number)}
    finally:
        torch.set_num_threads(threads)


def of(network: Network, number: int) -> dict[str, Any]:
    """The least seconds of each way, with the masks of so many rounds."""
    images = torch.rand(IMAGES, *network.input_shape, generator=torch.Generator().manual_seed(0))
    data = Split(images, torch.arange(IMAGES) % 10)
    calls: dict[str, Callable[[], object]] = {}
    for name, (precision, layout, form) in WAYS.items():
        way = replace(network, precision=precision, layout=layout, form=form)
        model = model_of(way, start_of(way, number), "cpu")
        _, step = stepper(model, adam(model.parameters(), network.lr))
        batch = images[: network.batch_size], data.labels[: network.batch_size]
        calls |= {f"{name} step": partial(step, *batch)}
        calls |= {f"{name} evaluation": partial(evaluation, model, data)}
    seconds = least(calls, REPEATS)
    found = {
        what: {name: seconds[f"{name} {what}"] for name in WAYS} for what in ("step", "evaluation")
    }
    return {"density": start_of(network, number).masks.density, **found}


def start_of(network: Network, number: int) -> Began:
    """The initial weights, the largest of which are kept."""
    dense = dense_start(network, 0, "cpu")
    weights = {name: dense.weights[name] for name in dense.masks}
    keep = keep_by_parameter(network, number)
    masks = ls.prune(weights, weights, dense.masks, "large_final", keep, generator=0)
    return dense._replace(masks=masks, released=number == 0)


HEAD = f"{'milliseconds':<16}{'density':>8}  " + "".join(f"{name:>24}" for name in WAYS)


def lines(row: dict[str, Any]) -> str:
    """A row for a terminal: a step, and an evaluation."""
    found = []
    for what in ("step", "evaluation"):
        times = "".join(f"{row[what][name] * 1e3:24.0f}" for name in WAYS)
        found.append(f"{row['network']:<6}{what:<10}{row['density']:8.2%}  {times}")
    return "\n".join(found)
