"""The main results in under a minute: tickets against their controls, supermasks, and time.

A short version of the protocol of networks.py on one seed: 600 iterations a round instead of
50,380, and a larger step from round to round. It shows the effects; it is no measurement of them.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lottery_sparse as ls
from experiments.study.networks import FC
from experiments.study.profiles import Profile
from experiments.study.runs import Run
from experiments.sweep.progress import Progress
from experiments.timing import least
from experiments.train.data import Dataset
from experiments.train.loop import adam, evaluation, step
from experiments.train.lottery import Round, lottery, train_models, untrained
from experiments.train.models import dense_start, model_of
from lottery_sparse.tickets.round import Began

ITERATIONS = 600  # per training run
ROUNDS = 6
SHARES = {"hidden": Fraction("0.5"), "output": Fraction("0.7")}  # kept per round
SUPERMASK_ROUNDS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20)  # of the paper's shares
SUPERMASKS = {  # curve -> (criterion, weights)
    "random": ("random", "init"),
    "large_final": ("large_final", "init"),
    "large_final_same_sign": ("large_final_same_sign", "init"),
    "large_final_same_sign_signed_constant": ("large_final_same_sign", "signed_constant"),
}
REPEATS = 60  # of each timing; the minimum is reported


def quickstart(dataset: Dataset, seed: int = 0, iterations: int = ITERATIONS) -> dict[str, Any]:
    """Train, prune, compare, time; print as it goes, and return the numbers.

    Accuracies are test accuracies as fractions; those of trained networks are taken at the
    iteration of the lowest validation loss.
    """
    began = time.perf_counter()
    torch.set_num_threads(1)  # LeNet at batch 60 gains nothing from a second one
    network = replace(FC, keep=SHARES, iterations=iterations)
    run = Run(network=network, profile=Profile("quick", train_accuracy=False), seed=seed)
    parts = " / ".join(f"{len(part):,}" for part in (dataset.train, dataset.val, dataset.test))
    with Progress(total=iterations * (1 + 3 * ROUNDS)) as progress:
        progress.line(
            f"LeNet-300-100 on {dataset.name} ({parts} images to train / validate / test), "
            f"seed {seed}, {iterations} iterations a round"
        )
        rounds, curves = tickets(run, dataset, progress)
        best = winning(rounds)
        progress.line(describe(rounds[0], best))
        supermask = supermasks(run, dataset, rounds[0], progress)
        timings = measure(run, rounds[0], best, dataset, progress)
    return {
        "dataset": dataset.name,
        "network": network.name,
        "seed": seed,
        "iterations": iterations,
        **curves,
        "supermask": supermask,
        "timings": timings,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
    }


def tickets(run: Run, dataset: Dataset, progress: Progress) -> tuple[list[Round], dict[str, Any]]:
    """Every round of the lottery loop, each beside its two controls with as many weights per layer.

    reinit: the ticket's masks, weights drawn anew. random: the initial weights, masks at random.
    """
    progress.line("\nTest accuracy after training")
    progress.line(f"{'density':>9}{'weights':>10}{'ticket':>9}{'reinit':>9}{'random':>9}")
    rounds: list[Round] = []
    dense: dict[str, Any] = {}
    curves: dict[str, list[dict[str, Any]]] = {"ticket": [], "reinit": [], "random": []}

    def on_step(number: int, iteration: int) -> None:
        progress.advance()

    progress.describe("dense")
    for this in lottery(run, ROUNDS, dataset, on_step):
        rounds.append(this)
        row = this.row
        point = {key: row[key] for key in ("density", "early_stop_iteration", "kept")}
        if len(rounds) == 1:
            dense = {**point, "accuracy": row["test_accuracy"]}
        else:
            curves["ticket"].append({**point, "accuracy": row["test_accuracy"]})
            for name, start in (
                ("reinit", reinitialised(run, this)),
                ("random", randomly_masked(run, this)),
            ):
                progress.describe(f"round {row['round']}, {name}")
                model = model_of(run.net, start, dataset.device)
                [result] = train_models([run], model, dataset, lambda i: progress.advance())
                at, accuracy = result.early_stop_iteration, result.test_accuracy
                curves[name].append({**point, "early_stop_iteration": at, "accuracy": accuracy})
        cells = [f"{points[-1]['accuracy']:9.1%}" for points in curves.values() if points]
        if not cells:
            cells = [f"{dense['accuracy']:9.1%}  (dense)"]
        progress.line(f"{row['density']:9.1%}{row['kept']:10,}{''.join(cells)}")
        progress.describe(f"round {row['round'] + 1}, ticket")
    return rounds, {"dense": dense, **curves}


def reinitialised(run: Run, this: Round) -> Began:
    """The same masks on weights drawn anew from the initial law."""
    seed = ls.random.derive(run.seed, "reinit", this.row["round"])
    return this.start._replace(weights=dense_start(run.net, seed, "cpu").weights)


def randomly_masked(run: Run, this: Round) -> Began:
    """The same start under masks that keep as many weights of each layer, chosen at random."""
    kept = {
        name: Fraction(int(mask.sum()), mask.numel()) for name, mask in this.start.masks.items()
    }
    weights = {name: this.start.weights[name] for name in kept}
    everything = dense_start(run.net, run.seed, "cpu").masks
    seed = ls.random.derive(run.seed, "random mask", this.row["round"])
    masks = ls.prune(weights, weights, everything, "random", kept, generator=seed)
    return this.start._replace(masks=masks)


def winning(rounds: list[Round]) -> Round:
    """The ticket with the fewest weights that is at least as good as dense; else the best one."""
    dense, *pruned = rounds
    good = [this for this in pruned if this.row["test_accuracy"] >= dense.row["test_accuracy"]]
    return good[-1] if good else max(pruned, key=lambda this: this.row["test_accuracy"])


def describe(dense: Round, best: Round) -> str:
    ticket, whole = best.row["test_accuracy"], dense.row["test_accuracy"]
    return (
        f"\nThe ticket with {best.row['density']:.1%} of the weights reaches {ticket:.1%}, "
        f"the dense network {whole:.1%}."
    )


def supermasks(
    run: Run, dataset: Dataset, dense: Round, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy of masked but untrained networks, over density. The masks come from `dense`."""
    network = replace(FC, iterations=run.net.iterations)  # the paper's shares
    start = model_of(network, dense.start, "cpu")
    curves: dict[str, list[dict[str, Any]]] = {
        "init": [{"density": 1.0, "accuracy": evaluation(start, dataset.test)[1]}]
    }
    progress.describe("supermasks")
    points = list(
        untrained(network, dataset, run.seed, dense.w_final, SUPERMASKS.values(), SUPERMASK_ROUNDS)
    )
    for curve, kind in SUPERMASKS.items():
        curves[curve] = [
            {"density": point.row["density"], "accuracy": point.row["test_accuracy"]}
            for point in points
            if (point.criterion, point.weights) == kind
        ]
    progress.line("\nTest accuracy without training: initial weights under a mask (supermask)")
    progress.line(f"  no mask{curves['init'][0]['accuracy']:33.1%}")
    progress.line(f"  {'mask':<30}{'best':>10}{'at density':>13}")
    for curve in SUPERMASKS:
        top = max(curves[curve], key=lambda point: point["accuracy"])
        progress.line(f"  {curve:<40}{top['accuracy']:.1%}{top['density']:13.1%}")
    return curves


def measure(
    run: Run, dense: Round, ticket: Round, dataset: Dataset, progress: Progress
) -> dict[str, Any]:
    """Milliseconds of a training step, per layer and whole: nn.Linear against the ticket, compact.

    A layer's step is forward and backward at the run's batch size; the whole step adds loss and
    Adam. One thread; dense and compact alternate; the minimum of many is reported.
    """
    progress.describe("time")
    models = {
        "dense_ms": model_of(run.net, dense.start, "cpu"),
        "compact_ms": model_of(run.net, ticket.start, "cpu"),
    }
    batch = run.net.batch_size
    rows = []
    for layer in (name.removesuffix(".weight") for name in ticket.start.masks):
        mask = ticket.start.masks[f"{layer}.weight"]
        x = torch.rand(batch, mask.shape[1], requires_grad=layer != "fc1")  # fc1 sees the images
        dy = torch.rand(batch, mask.shape[0])
        times = milliseconds(
            {
                key: partial(layer_step, model.get_submodule(layer), x, dy)
                for key, model in models.items()
            }
        )
        density = mask.float().mean().item()
        rows.append({"layer": layer, "shape": list(mask.shape), "density": density, **times})
    images, labels = dataset.train.images[:batch], dataset.train.labels[:batch]
    whole = milliseconds(
        {
            key: partial(step, model, adam(model.parameters(), run.net.lr), images, labels)
            for key, model in models.items()
        }
    )
    progress.line(
        f"\nMilliseconds of a training step at batch {batch}, one thread, minimum of many"
    )
    progress.line(f"{'':>8}{'density':>9}{'nn.Linear':>11}{'CompactLinear':>14}{'speed-up':>10}")
    for row in [*rows, {"layer": "network", "density": ticket.row["density"], **whole}]:
        progress.line(
            f"{row['layer']:>8}{row['density']:9.1%}{row['dense_ms']:11.3f}{row['compact_ms']:14.3f}"
            f"{row['dense_ms'] / row['compact_ms']:9.2f}x"
        )
    if whole["compact_ms"] > whole["dense_ms"]:
        progress.line("A compact step is slower than a dense one here.")
    return {
        "threads": 1,
        "batch": batch,
        "density": ticket.row["density"],
        "layers": rows,
        "step": whole,
    }


def layer_step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    x.grad = None
    layer(x).backward(dy)


def milliseconds(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    return {name: 1e3 * s for name, s in least(calls, REPEATS, time.perf_counter).items()}
