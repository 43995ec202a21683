"""The lottery loop: train, score, prune, act on kept and pruned weights, train again.

Round 0 is the dense network. Round r takes the weights that round r-1 started from and ended with,
keeps a share of each layer's kept weights by the criterion, and trains the result from the start
that the mask-1 action gives. Pruned weights hold what the mask-0 action says.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor, nn

import lottery_sparse as ls
from experiments.data import Dataset
from experiments.networks import Network, build, keep_by_parameter, skeleton
from experiments.train import Result, evaluation, train

Weights = dict[str, Tensor]  # parameter name -> value, biases included


@dataclass(frozen=True)
class Run:
    """One line of a figure: everything that decides its numbers. Defaults: the paper's protocol.

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
    evaluate_every: int = 100
    train_accuracy: bool = True  # evaluated at the end of each round

    def __post_init__(self) -> None:
        _check("criterion", self.criterion, ls.CRITERIA)
        _check("mask1", self.mask1, ls.MASK1_ACTIONS)
        _check("mask0", self.mask0, ls.MASK0_ACTIONS)
        _check("scope", self.scope, ("layer", "global"))
        if self.rounds < 0:
            raise ValueError(f"rounds must be 0 (dense only) or more, got {self.rounds}.")
        if self.network.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.network.iterations}.")
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1, got {self.evaluate_every}.")
        for kind, share in self.network.keep.items():
            if not 0 <= share <= 1:
                raise ValueError(f"keep is a fraction in [0, 1], got {share} for {kind} layers.")
        if not 0 <= self.rewind_to <= self.network.iterations:
            raise ValueError(
                "rewind_to must be an iteration of the dense run, 0 to "
                f"{self.network.iterations}; got {self.rewind_to}."
            )


@dataclass(frozen=True)
class Start:
    """What a round trains: which weights are kept, where they start, what the pruned ones hold."""

    masks: ls.Masks
    weights: Weights
    frozen: dict[str, Tensor | None]  # weight name -> values of the pruned weights; None: zero
    masked: bool = True  # False: all weights train (dense; mask-0 action "original")


@dataclass(frozen=True)
class Round:
    """What one round leaves: its row for a results file, and the tensors behind it."""

    row: dict[str, object]
    start: Start
    w_final: Weights


OnStep = Callable[[int, int], None]  # (round number, iterations done in it)


def lottery(
    run: Run, dataset: Dataset, on_step: OnStep = lambda number, iteration: None
) -> Iterator[Round]:
    """Yield round 0 (dense), then each pruned round, as soon as it is trained.

    A function of `run` and `dataset` alone, the seconds apart: every draw is keyed by the seed, the
    round and the parameter name. `on_step` is called after every iteration.
    """
    device = dataset.train.images.device
    start = dense_start(run.network, run.seed, device)
    w_rewind = dict(start.weights)
    std = {name: w.std(unbiased=False).item() for name, w in start.weights.items()}

    def watch(number: int, model: nn.Module, iteration: int) -> None:
        if number == 0 and iteration == run.rewind_to:
            w_rewind.update(weights_of(model))
        on_step(number, iteration)

    scored: Round | None = None  # the round whose weights decide the next masks
    for number in range(run.rounds + 1):
        if scored is not None:
            start = next_start(run, number, scored, w_rewind, std)
        model = model_of(run.network, start, device)
        result = train_model(run, model, dataset, partial(watch, number, model))
        this = Round(row_of(run, number, dataset, start, result), start, weights_of(model))
        yield this
        if scored is None or not run.one_shot:
            scored = this


def dense_start(network: Network, seed: int, device: torch.device | str) -> Start:
    """All weights kept, at the initial values of `seed`."""
    weights = weights_of(build(network, seed, device))
    prunable = keep_by_parameter(network)
    everything = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in prunable}
    return Start(ls.Masks(everything), weights, dict.fromkeys(prunable), masked=False)


def next_start(
    run: Run, number: int, scored: Round, w_rewind: Weights, std: dict[str, float]
) -> Start:
    """The start of round `number`, from how the round `scored` began and ended.

    Scores and mask-0 actions compare the weights that it really started from with its final ones.

    Args:
        w_rewind: what mask-1 actions modify: the dense run's weights at iteration run.rewind_to.
        std: parameter name -> population standard deviation of the dense run's initial weights.
    """
    last, w_final = scored.start, scored.w_final
    masks = ls.prune(
        last.weights,
        w_final,
        last.masks,
        run.criterion,
        keep_of(run, rounds=number if run.one_shot else 1),
        scope=run.scope,
        generator=ls.random.derive(run.seed, "prune", number),
    )
    # round 1 has nothing to compound: it starts from the dense run's (rewind) weights either way
    base = last.weights if run.compounding and scored.row["round"] else w_rewind
    weights = dict(w_rewind)  # biases: never masked, always rewound
    frozen: dict[str, Tensor | None] = {}
    masked = True
    for name, mask in masks.items():
        gen = ls.random.Stream(ls.random.derive(run.seed, "mask-1", number), name)
        weights[name] = ls.MASK1_ACTIONS[run.mask1](base[name], mask, std[name], gen)
        gen = ls.random.Stream(ls.random.derive(run.seed, "mask-0", number), name)
        action = ls.MASK0_ACTIONS[run.mask0](
            last.weights[name], w_final[name], mask, last.masks[name], last.frozen[name], gen
        )
        frozen[name], masked = action.frozen, not action.released
        if action.start_at_zero is not None:
            weights[name] = weights[name].masked_fill(action.start_at_zero, 0)
    return Start(masks, weights, frozen, masked)


def keep_of(run: Run, rounds: int) -> Fraction | dict[str, Fraction]:
    """What `rounds` rounds leave of the kept weights: by parameter, or one share if global."""
    if run.scope == "global":
        return run.network.keep["hidden"] ** rounds
    return keep_by_parameter(run.network, rounds)


def model_of(network: Network, start: Start, device: torch.device | str) -> nn.Module:
    """The network holding a start: with compact layers, or with plain ones if all weights train."""
    model = skeleton(network).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start.weights[name])
    if start.masked:
        ls.sparsify_(model)
        frozen = {name: "zero" if f is None else f for name, f in start.frozen.items()}
        ls.set_masks_(model, start.masks, frozen=frozen)
        ls.compact_(model)  # the same numbers; time and memory of the kept weights only
    return model


def train_model(
    run: Run, model: nn.Module, dataset: Dataset, on_step: Callable[[int], None]
) -> Result:
    """Train in place by the protocol of the run."""
    return train(
        model,
        dataset,
        iterations=run.network.iterations,
        lr=run.network.lr,
        batch_size=run.network.batch_size,
        seed=run.seed,
        evaluate_every=run.evaluate_every,
        train_accuracy=run.train_accuracy,
        on_step=on_step,
    )


def weights_of(model: nn.Module) -> Weights:
    """Copies of the weights the network computes with, dense, and of its biases."""
    return {name: value.clone() for name, value in ls.dense_state_dict(model).items()}


def row_of(
    run: Run, number: int, dataset: Dataset, start: Start, result: Result
) -> dict[str, object]:
    """One line of a results file. The density is measured from the masks, not from the plan."""
    return {
        "network": run.network.name,
        "dataset": dataset.name,
        "criterion": run.criterion,
        "mask1": run.mask1,
        "mask0": run.mask0,
        "scope": run.scope,
        "one_shot": run.one_shot,
        "rewind_to": run.rewind_to,
        "compounding": run.compounding,
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
        "seconds": round(result.seconds, 3),
        "torch": torch.__version__,
        # auto: the dispatch table chooses per layer, a kernel of ours or the dense library
        "engine": result.engine,
        "backend": ls.backends.forced() or "auto",
        "kernels_built": ls.backends.built("cpu"),
        "device": str(dataset.train.images.device),
        "threads": torch.get_num_threads(),
    }


def untrained(
    network: Network,
    dataset: Dataset,
    seed: int,
    w_final: Weights,
    curves: Iterable[tuple[str, str]],
    rounds: Iterable[int],
) -> Iterator[dict[str, object]]:
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
        constants[name] = ls.MASK1_ACTIONS["signed_constant"](w, dense.masks[name], std, seed)
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
            yield {
                "criterion": criterion,
                "weights": kind,
                "density": masks.density,
                "accuracy": evaluation(model, dataset.test)[1],
            }


def _check(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
