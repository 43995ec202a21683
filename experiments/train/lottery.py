"""The lottery loop: train, score, prune, act on kept and pruned weights, train again.

Round 0 is the dense network. Round r takes the weights that round r-1 started from and ended with,
keeps a share of each layer's kept weights by the criterion, and trains the result from the start
that the mask-1 action gives. Pruned weights hold what the mask-0 action says.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import lottery_sparse as ls
from experiments.study import parts
from experiments.study.networks import Network, keep_by_parameter
from experiments.study.runs import Run
from experiments.train.data import Dataset
from experiments.train.heading import Counts, towards_zero
from experiments.train.loop import Evaluation, Midway, Result, State, evaluation, train_together
from experiments.train.models import (
    Weights,
    backend_of,
    dense_start,
    model_of,
    products_of,
    weights_of,
)
from lottery_sparse.tickets.round import Began, Rules, next_round


@dataclass(frozen=True)
class Round:
    """What one round leaves: what its row says beside the run, and the tensors behind it."""

    number: int
    row: dict[str, Any]
    start: Began
    w_final: Weights
    seconds: float = 0.0  # of all networks that were trained together
    evaluations: tuple[Evaluation, ...] = ()  # of the validation part; a checkpoint has none


OnStep = Callable[[int, int], None]  # (round number, iterations done in it)


def lottery(
    run: Run, rounds: int, dataset: Dataset, on_step: OnStep = lambda number, iteration: None
) -> Iterator[Round]:
    """Yield round 0 (dense), then each pruned round up to `rounds`, as soon as it is trained.

    A function of `run` and `dataset` alone, the seconds apart: every draw is keyed by the seed, the
    round and the parameter name. `on_step` is called after every iteration.
    """
    last, snapshots = dense_round(run, dataset, [run.rewind_to], lambda i: on_step(0, i))
    yield last
    for number in range(run.stride, rounds + 1, run.stride):
        start = next_start(run, number, last, snapshots[run.rewind_to])
        [last] = train_rounds(
            [run], number, [start], dataset, lambda i, number=number: on_step(number, i)
        )
        yield last


def dense_round(
    run: Run,
    dataset: Dataset,
    snapshots: Iterable[int] = (),
    on_step: Callable[[int], None] = lambda iteration: None,
    midway: Midway | None = None,
) -> tuple[Round, dict[int, Weights]]:
    """Round 0, and the dense network's weights at the iterations `snapshots`."""
    start = dense_start(run.net, run.seed, dataset.device)
    wanted = set(snapshots)
    found = {0: dict(start.weights)} if 0 in wanted else {}
    model = model_of(run.net, start, dataset.device)

    def watch(iteration: int) -> None:
        if iteration in wanted:
            found[iteration] = weights_of(model)
        on_step(iteration)

    kept = midway and _WithSnapshots(midway, found)
    [result] = train_models([run.dense], model, dataset, watch, midway=kept)
    return round_of(0, model, start, result), found


class _WithSnapshots(Midway):
    """Keeps the weights of earlier iterations too."""

    def __init__(self, kept: Midway, found: dict[int, Weights]):
        self.kept, self.found = kept, found
        self.is_due = kept.is_due

    def load(self) -> State | None:
        state = self.kept.load()
        if state is None:
            return None
        tensors, metadata = state
        for key in [key for key in tensors if key.startswith("at_")]:
            at, _, name = key.removeprefix("at_").partition(".")
            self.found.setdefault(int(at), {})[name] = tensors.pop(key)
        return tensors, metadata

    def save(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        self.kept.save(tensors | tensors_at(self.found), metadata)


def tensors_at(snapshots: Mapping[int, Weights]) -> dict[str, Tensor]:
    """Weights of several iterations as tensors for a file: {"at_100.fc1.weight": w}."""
    return {
        f"at_{iteration}.{name}": value
        for iteration, weights in snapshots.items()
        for name, value in weights.items()
    }


def train_rounds(
    runs: Sequence[Run],
    number: int,
    starts: Sequence[Began],
    dataset: Dataset,
    on_step: Callable[[int], None] = lambda iteration: None,
    midway: Midway | None = None,
) -> list[Round]:
    """Round `number` of lotteries side by side, of one network and protocol, seeds apart.

    All starts have to be of one kind: pruned weights at zero, or at values, or free to train; and
    rewound to one iteration, from which they train to the dense run's last, as in Frankle et al.
    Each network gets what it would alone: on the CPU the same bits where `together` is true.
    """
    models = [
        model_of(run.net, start, dataset.device) for run, start in zip(runs, starts, strict=True)
    ]
    model = models[0] if len(models) == 1 else ls.ensemble.replicate(models)
    [first] = {run.rewind_to for run in runs}
    results = train_models(runs, model, dataset, on_step, first, midway)
    return [
        round_of(number, model if len(models) == 1 else ls.ensemble.select(model, e), start, result)
        for e, (start, result) in enumerate(zip(starts, results, strict=True))
    ]


def together(run: Run, start: Began, device: torch.device) -> bool:
    """Whether a network is trained side by side with others.

    On the CPU only if all its products are our kernels': the bits of a dense library's depend on
    what else it computes, and there they gain nothing in company. Only in float32 and contiguous.
    """
    if not run.net.goes_in_company:
        return False
    return device.type != "cpu" or "dense" not in products_of(model_of(run.net, start, device))


@cache
def spread(network: Network, seed: int, device: torch.device) -> dict[str, float]:
    """Population standard deviation of each layer's initial weights: the signed constants."""
    start = dense_start(network, seed, device)
    return {name: start.weights[name].std(unbiased=False).item() for name in start.masks}


def next_start(run: Run, number: int, scored: Round, origin: Weights) -> Began:
    """The start of round `number`, from how the round `scored` began and ended.

    Scores and mask-0 actions compare the weights that it really started from with its final ones.

    Args:
        origin: what mask-1 actions modify: the dense run's weights at iteration rewind_to.
    """
    last = scored.start
    names = list(last.masks)
    std = spread(run.net, run.seed, origin[names[0]].device)
    score, keys = parts.criterion(run.criterion), {name: name for name in names}
    rules = Rules(score, run.mask1, run.mask0, "layer", run.seed, std, keys)
    began = next_round(
        rules,
        number,
        last,
        effective={name: last.effective(name) for name in names},
        final=scored.w_final,
        # round 1 has nothing to compound: it starts from the dense run's weights either way
        origin=last.weights if run.compounding and scored.number else origin,
        keep=keep_by_parameter(run.net, number - scored.number),
    )
    return began._replace(weights=origin | began.weights)  # biases: never masked, always rewound


def train_models(
    runs: Sequence[Run],
    model: nn.Module,
    dataset: Dataset,
    on_step: Callable[[int], None] = lambda iteration: None,
    first: int = 0,
    midway: Midway | None = None,
) -> list[Result]:
    """Train one network, or several side by side, in place by the protocol of the runs.

    From iteration `first` of it on, with the batches that follow there, and a fresh optimizer.
    """
    run = runs[0]
    return train_together(
        model,
        dataset,
        iterations=run.iterations,
        first=first,
        lr=run.net.lr,
        batch_size=run.net.batch_size,
        seeds=[run.seed for run in runs],
        evaluate_every=run.protocol.evaluate_every,
        patience=run.patience,
        train_accuracy=run.protocol.train_accuracy,
        on_step=on_step,
        midway=midway,
    )


def round_of(number: int, model: nn.Module, start: Began, result: Result) -> Round:
    """The density is measured from the masks, not the plan."""
    row = {
        "round": number,
        "density": start.masks.density,
        "kept": start.masks.kept,
        "iterations": result.iterations,
        **result.numbers,
        "engine": result.engine,
        **backend_of(model),
    }
    return Round(number, row, start, weights_of(model), result.seconds, result.evaluations)


@dataclass(frozen=True)
class Untrained:
    """A masked network that was not trained: what its row says beside the run."""

    criterion: str
    weights: str
    row: dict[str, Any]
    validation: Evaluation  # at which its round stands for the iteration
    heading: Counts


def untrained(
    network: Network,
    dataset: Dataset,
    seed: int,
    w_final: Weights,
    curves: Iterable[tuple[str, str]],
    rounds: Iterable[int],
) -> Iterator[Untrained]:
    """The supermask effect: test accuracy without training, by criterion, weights and density.

    The dense network of `seed`, which ended at `w_final`, is pruned at once to what each of
    `rounds` rounds leaves (one-shot, as in the paper's figure). Pruned weights and biases are 0.

    Args:
        curves: pairs (criterion, weights). Weights are "init": what the kept ones were initially;
            or "signed_constant": the standard deviation of the layer's initial weights with the
            sign of each.
    """
    device = dataset.device
    dense = dense_start(network, seed, device)
    w_init = {name: dense.weights[name] for name in dense.masks}
    constants = dict(dense.weights)
    for name, std in spread(network, seed, device).items():
        constants[name] = ls.pruning.MASK1_ACTIONS["signed_constant"](
            w_init[name], dense.masks[name], std, seed
        )
    weights = {"init": dense.weights, "signed_constant": constants}
    for criterion, kind in curves:
        for number in rounds:
            masks = ls.prune(
                w_init, w_final, dense.masks, parts.criterion(criterion),
                keep_by_parameter(network, number),
                generator=ls.random.derive(seed, "prune", number),
            )  # fmt: skip
            model = model_of(network, Began(masks, weights[kind], {}), device)
            loss, right = evaluation(model, dataset.val)
            row = {
                "round": number,
                "density": masks.density,
                "kept": masks.kept,
                "test_accuracy": evaluation(model, dataset.test)[1],
                "iterations": 0,
                **backend_of(model),
            }
            heading = towards_zero(w_init, w_final, dense.masks, masks)
            yield Untrained(criterion, kind, row, Evaluation(number, loss, right), heading)
