"""The lottery loop: train, score, prune, act on kept and pruned weights, train again.

Round 0 is the dense network. Round r takes the weights that round r-1 started from and ended with,
keeps a share of each layer's kept weights by the criterion, and trains the result from the start
that the mask-1 action gives. Pruned weights hold what the mask-0 action says.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

import lottery_sparse as ls
from experiments.study.networks import Network, keep_by_parameter
from experiments.train.data import Dataset
from experiments.train.heading import towards_zero
from experiments.train.loop import Evaluation, Midway, Result, State, evaluation, train_together
from experiments.train.models import (
    Start,
    Weights,
    backend_of,
    dense_start,
    model_of,
    products_of,
    weights_of,
)
from lottery_sparse.tickets.round import Began, Rules, next_round


@dataclass(frozen=True)
class Lottery:
    """What the loop does: everything that decides its numbers. Defaults: the paper's protocol.

    Iterations, learning rate and the share that each round keeps are the network's; for others
    give `dataclasses.replace(network, iterations=1_000)`.
    """

    network: Network
    criterion: str = "large_final"
    mask1: str = "rewind"
    mask0: str = "zero"
    rounds: int = 24
    seed: int = 0
    scope: str = "layer"  # or "global": one ranking over all layers, by the share of hidden layers
    one_shot: bool = False  # prune the dense network to round r's share at once
    rewind_to: int = 0  # iteration of the dense run whose weights a ticket starts from
    compounding: bool = False  # mask-1 actions start from the last round's start (authors' code)
    stride: int = 1  # rounds from one training to the next, which prunes the shares of all
    patience: int | None = None  # iterations of a ticket without a lower validation loss
    evaluate_every: int = 100
    train_accuracy: bool = True  # evaluated at the end of each round

    def __post_init__(self) -> None:
        _check("criterion", self.criterion, ls.pruning.CRITERIA)
        _check("mask1", self.mask1, ls.pruning.MASK1_ACTIONS)
        _check("mask0", self.mask0, ls.pruning.MASK0_ACTIONS)
        _check("scope", self.scope, ("layer", "global"))
        if self.rounds < 0:
            raise ValueError(f"rounds must be 0 (dense only) or more, got {self.rounds}.")
        if self.network.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.network.iterations}.")
        for name in ("evaluate_every", "stride", "patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for kind, share in self.network.keep.items():
            if not 0 <= share <= 1:
                raise ValueError(f"keep is a fraction in [0, 1], got {share} for {kind} layers.")
        if not 0 <= self.rewind_to <= self.network.iterations:
            raise ValueError(
                "rewind_to must be an iteration of the dense run, 0 to "
                f"{self.network.iterations}; got {self.rewind_to}."
            )


@dataclass(frozen=True)
class Round:
    """What one round leaves: its row for a results file, and the tensors behind it."""

    number: int
    row: dict[str, Any]
    start: Start
    w_final: Weights
    seconds: float  # of all networks that were trained together
    evaluations: tuple[Evaluation, ...] = ()  # of the validation part; a checkpoint has none


@dataclass(frozen=True)
class Rewind:
    """What all rounds of a lottery go back to.

    Attributes:
        weights: what mask-1 actions modify: the dense run's weights at iteration rewind_to.
        std: parameter name -> population standard deviation of the dense run's initial weights.
    """

    weights: Weights
    std: dict[str, float]


OnStep = Callable[[int, int], None]  # (round number, iterations done in it)


def lottery(
    run: Lottery, dataset: Dataset, on_step: OnStep = lambda number, iteration: None
) -> Iterator[Round]:
    """Yield round 0 (dense), then each pruned round, as soon as it is trained.

    A function of `run` and `dataset` alone, the seconds apart: every draw is keyed by the seed, the
    round and the parameter name. `on_step` is called after every iteration.
    """
    device = dataset.train.images.device
    dense, snapshots = dense_round(run, dataset, [run.rewind_to], lambda i: on_step(0, i))
    yield dense
    rewind = Rewind(snapshots[run.rewind_to], spread(run.network, run.seed, device))
    scored = dense
    for number in range(run.stride, run.rounds + 1, run.stride):
        start = next_start(run, number, scored, rewind)
        [this] = train_rounds(
            [run], number, [start], dataset, lambda i, number=number: on_step(number, i)
        )
        yield this
        if not run.one_shot:
            scored = this


def dense_round(
    run: Lottery,
    dataset: Dataset,
    snapshots: Iterable[int] = (),
    on_step: Callable[[int], None] = lambda iteration: None,
    midway: Midway | None = None,
) -> tuple[Round, dict[int, Weights]]:
    """Round 0, and the dense network's weights at the iterations `snapshots`."""
    start = dense_start(run.network, run.seed, dataset.train.images.device)
    wanted = set(snapshots)
    found = {0: dict(start.weights)} if 0 in wanted else {}
    model = model_of(run.network, start, dataset.train.images.device)

    def watch(iteration: int) -> None:
        if iteration in wanted:
            found[iteration] = weights_of(model)
        on_step(iteration)

    whole = replace(run, patience=None)
    kept = midway and _WithSnapshots(midway, found)
    [result] = train_models(whole, [run.seed], model, dataset, watch, midway=kept)
    row = row_of(run, 0, model, start, result)
    return Round(0, row, start, weights_of(model), result.seconds, result.evaluations), found


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
    runs: Sequence[Lottery],
    number: int,
    starts: Sequence[Start],
    dataset: Dataset,
    on_step: Callable[[int], None] = lambda iteration: None,
    midway: Midway | None = None,
) -> list[Round]:
    """Round `number` of lotteries side by side, of one network and protocol, seeds apart.

    All starts have to be of one kind: pruned weights at zero, or at values, or free to train; and
    rewound to one iteration, from which they train to the dense run's last, as in Frankle et al.
    Each network gets what it would alone: on the CPU the same bits where `together` is true.
    """
    device = dataset.train.images.device
    models = [model_of(run.network, start, device) for run, start in zip(runs, starts, strict=True)]
    model = models[0] if len(models) == 1 else ls.ensemble.replicate(models)
    [first] = {run.rewind_to for run in runs}
    seeds = [run.seed for run in runs]
    results = train_models(runs[0], seeds, model, dataset, on_step, first, midway)
    rounds = []
    for e, (run, start, result) in enumerate(zip(runs, starts, results, strict=True)):
        one = model if len(models) == 1 else ls.ensemble.select(model, e)
        row = row_of(run, number, one, start, result)
        made = Round(number, row, start, weights_of(one), result.seconds, result.evaluations)
        rounds.append(made)
    return rounds


def together(run: Lottery, start: Start, device: torch.device) -> bool:
    """Whether a network is trained side by side with others.

    On the CPU only if all its products are our kernels': the bits of a dense library's depend on
    what else it computes, and there they gain nothing in company. Only in float32 and contiguous.
    """
    if not run.network.is_plain:
        return False
    model = model_of(run.network, start, device)
    return device.type != "cpu" or "dense" not in products_of(model)


def spread(network: Network, seed: int, device: torch.device | str) -> dict[str, float]:
    """Population standard deviation of each parameter's initial values: the signed constants."""
    weights = dense_start(network, seed, device).weights
    return {name: w.std(unbiased=False).item() for name, w in weights.items()}


def next_start(run: Lottery, number: int, scored: Round, rewind: Rewind) -> Start:
    """The start of round `number`, from how the round `scored` began and ended.

    Scores and mask-0 actions compare the weights that it really started from with its final ones.
    """
    last = scored.start
    names = list(last.masks)
    rules = Rules(
        run.criterion, run.mask1, run.mask0, run.scope, run.seed,
        std=rewind.std, keys={name: name for name in names},
    )  # fmt: skip
    began = next_round(
        rules,
        number,
        Began(last.masks, last.weights, {n: f for n, f in last.frozen.items() if f is not None}),
        effective={name: last.effective(name) for name in names},
        final=scored.w_final,
        # round 1 has nothing to compound: it starts from the dense run's weights either way
        origin=last.weights if run.compounding and scored.number else rewind.weights,
        keep=keep_of(run, rounds=number if run.one_shot else number - scored.number),
    )
    weights = rewind.weights | began.weights  # biases: never masked, always rewound
    frozen = dict.fromkeys(names) | began.frozen
    return Start(began.masks, weights, frozen, masked=not began.released)


def keep_of(run: Lottery, rounds: int) -> Fraction | dict[str, Fraction]:
    """What `rounds` rounds leave of the kept weights: by parameter, or one share if global."""
    if run.scope == "global":
        return run.network.keep["hidden"] ** rounds
    return keep_by_parameter(run.network, rounds)


def train_models(
    run: Lottery,
    seeds: Sequence[int],
    model: nn.Module,
    dataset: Dataset,
    on_step: Callable[[int], None] = lambda iteration: None,
    first: int = 0,
    midway: Midway | None = None,
) -> list[Result]:
    """Train one network, or several side by side, in place by the protocol of the run.

    From iteration `first` of it on, with the batches that follow there, and a fresh optimizer.
    """
    return train_together(
        model,
        dataset,
        iterations=run.network.iterations,
        first=first,
        lr=run.network.lr,
        batch_size=run.network.batch_size,
        seeds=seeds,
        evaluate_every=run.evaluate_every,
        patience=run.patience,
        train_accuracy=run.train_accuracy,
        on_step=on_step,
        midway=midway,
    )


def row_of(
    run: Lottery, number: int, model: nn.Module, start: Start, result: Result
) -> dict[str, Any]:
    """What a results file says of a round. The density is measured from the masks, not the plan."""
    return {
        "criterion": run.criterion,
        "mask1": run.mask1,
        "mask0": run.mask0,
        "seed": run.seed,
        "round": number,
        "density": start.masks.density,
        "kept": start.masks.kept,
        "iterations": result.iterations,
        "early_stop_iteration": result.early_stop_iteration,
        "early_stop_validation_loss": result.early_stop_validation_loss,
        "early_stop_validation_accuracy": result.early_stop_validation_accuracy,
        "test_accuracy": result.test_accuracy,
        "final_test_accuracy": result.final_test_accuracy,
        "final_validation_loss": result.final_validation_loss,
        "final_train_accuracy": result.final_train_accuracy,
        "engine": result.engine,
        **backend_of(model),
    }


def untrained(
    network: Network,
    dataset: Dataset,
    seed: int,
    w_final: Weights,
    curves: Iterable[tuple[str, str]],
    rounds: Iterable[int],
) -> Iterator[dict[str, Any]]:
    """The supermask effect: test accuracy without training, by criterion, weights and density.

    The dense network of `seed`, which ended at `w_final`, is pruned at once to what each of
    `rounds` rounds leaves (one-shot, as in the paper's figure). Pruned weights and biases are 0.

    Args:
        curves: pairs (criterion, weights). Weights are "init": what the kept ones were initially;
            or "signed_constant": the standard deviation of the layer's initial weights with the
            sign of each.
    """
    device = dataset.test.images.device
    dense = dense_start(network, seed, device)
    w_init = {name: dense.weights[name] for name in dense.masks}
    constants = dict(dense.weights)
    for name, w in w_init.items():
        std = w.std(unbiased=False).item()
        constants[name] = ls.pruning.MASK1_ACTIONS["signed_constant"](
            w, dense.masks[name], std, seed
        )
    weights = {"init": dense.weights, "signed_constant": constants}
    for criterion, kind in curves:
        for number in rounds:
            masks = ls.prune(
                w_init,
                w_final,
                dense.masks,
                criterion,
                keep_by_parameter(network, number),
                generator=ls.random.derive(seed, "prune", number),
            )
            model = model_of(network, Start(masks, weights[kind], dense.frozen), device)
            loss, right = evaluation(model, dataset.val)
            yield {
                "criterion": criterion,
                "weights": kind,
                "round": number,
                "density": masks.density,
                "kept": masks.kept,
                "accuracy": evaluation(model, dataset.test)[1],
                "validation": Evaluation(number, loss, right),
                "heading": towards_zero(w_init, w_final, dense.masks, masks),
                **backend_of(model),
            }


def _check(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
