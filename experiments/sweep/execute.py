"""Runs in a store, executed: groups of them together, round by round, resumed where they stopped.

What a round needs of the last one lies in the store as a checkpoint, written after its rows. The
dense run of a seed is a run of its own, which all others of that seed start from. A round that is
done again is compared with the row that is there: other numbers are an error.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import lottery_sparse as ls
from experiments.store.arithmetic import marked
from experiments.store.checkpoints import Checkpoints, InFlight, device_of, load
from experiments.store.records import Say, base_row, curve_of, line, record, row_of
from experiments.store.remakes import has_snapshots, rounds_there
from experiments.store.store import Lease, Store
from experiments.study import studies
from experiments.study.runs import DENSE, Run, rounds_of
from experiments.train.data import Dataset
from experiments.train.heading import Counts, towards_zero
from experiments.train.learned import learn
from experiments.train.lottery import (
    Lottery,
    Rewind,
    Round,
    Start,
    dense_round,
    dense_start,
    next_start,
    spread,
    tensors_at,
    together,
    train_rounds,
    untrained,
)


def lottery_of(run: Run, rounds: int) -> Lottery:
    """The loop that a run asks for."""
    return Lottery(
        run.net,
        run.criterion if run.criterion != DENSE else "large_final",
        run.mask1,
        run.mask0,
        rounds,
        run.seed,
        one_shot=run.schedule == "one_shot",
        rewind_to=run.rewind_to,
        compounding=run.compounding,
        stride=run.stride,
        patience=run.patience,
        evaluate_every=run.evaluate_every,
    )


def execute(
    runs: Sequence[Run], rounds: int, store: Store, lease: Lease, dataset: Dataset, say: Say
) -> None:
    """Bring each run of a group (see `groups`) to `rounds` rounds; add rows as they are there."""
    kind = runs[0]
    if kind == kind.dense:
        for run in runs:
            run_dense(run, store, lease, dataset, say)
    elif kind.schedule == "iterative":
        run_chains(runs, rounds, store, lease, dataset, say)
    elif kind.schedule == "one_shot":
        for run in runs:
            run_untrained(run, rounds, store, lease, dataset, say)
    else:
        run_learned(runs, store, lease, dataset, say)


# ---- the dense run of a seed --------------------------------------------------------------------


def run_dense(run: Run, store: Store, lease: Lease, dataset: Dataset, say: Say) -> None:
    """Round 0: one row, and the weights at its end and at iterations that studies ask for."""
    if store.rounds_done(run.id):
        say(f"{run.id}: its weights are not here; trained again, and compared with its row")
    began = time.time()
    at = studies.snapshots(run)
    flight = InFlight(run, 0, store, lease, device_of(dataset), say)
    this, found = dense_round(lottery_of(run, 0), dataset, at, midway=flight)
    made = record(run, 0, began, [run], this.seconds, dataset, this.row["engine"])
    store.add(lease, [row_of(run, this)], [made], curve_of(run, 0, this.evaluations))
    tensors = {f"final.{name}": value for name, value in this.w_final.items()}
    tensors |= tensors_at(found)
    metadata = {"row": this.row, "at": sorted(found)}
    store.save(lease, run.id, tensors, marked(metadata, device_of(dataset)))
    flight.end()
    say(line(run, this))


def has_dense(run: Run, store: Store) -> bool:
    """Whether the store holds what runs that start from this dense one need."""
    found = store.load(run.id)
    return found is not None and has_snapshots(run, found[1])


def dense_of(run: Run, store: Store, device: torch.device) -> tuple[Round, dict[int, Any]]:
    """The dense round that a run starts from, and the dense weights at earlier iterations."""
    found = load(run.dense.id, store, str(device))
    if found is None:
        raise ValueError(f"{run.id} starts from {run.dense.id}, which is not in {store.folder}.")
    parts, metadata = divided(found[0], device), found[1]
    start = dense_start(run.net, run.seed, device)
    round_ = Round(0, metadata["row"], start, parts["final"], 0.0)
    snapshots = {at: parts[f"at_{at}"] for at in metadata["at"]}
    return round_, {0: start.weights, run.iterations: parts["final"], **snapshots}


# ---- chains of rounds ----------------------------------------------------------------------------


def run_chains(
    runs: Sequence[Run], rounds: int, store: Store, lease: Lease, dataset: Dataset, say: Say
) -> None:
    """Lotteries side by side: always the ones with the fewest rounds done."""
    device = dataset.train.images.device
    scored = {run: resumed(run, rounds, store, lease, dataset, say) for run in runs}
    rewinds = {
        run: Rewind(
            dense_of(run, store, device)[1][run.rewind_to], spread(run.net, run.seed, device)
        )
        for run in runs
    }
    [stride] = {run.stride for run in runs}
    while todo := [run for run in runs if scored[run].number + stride <= rounds]:
        number = stride + min(scored[run].number for run in todo)
        now = [run for run in todo if scored[run].number == number - stride]
        starts = {
            run: next_start(lottery_of(run, rounds), number, scored[run], rewinds[run])
            for run in now
        }
        company = [r for r in now if together(lottery_of(r, rounds), starts[r], device)]
        for some in [company] * bool(company) + [[run] for run in now if run not in company]:
            began = time.time()
            plans = [lottery_of(run, rounds) for run in some]
            flight = InFlight(some[0], number, store, lease, str(device), say)
            begins = [starts[run] for run in some]
            done = train_rounds(plans, number, begins, dataset, midway=flight)
            pairs = list(zip(some, done, strict=True))
            store.add(
                lease,
                [row_of(run, this) for run, this in pairs],
                [
                    record(run, number, began, some, this.seconds, dataset, this.row["engine"])
                    for run, this in pairs
                ],
                [
                    curve | {"heading": moved(scored[run], this.start)}
                    for run, this in pairs
                    for curve in curve_of(run, number, this.evaluations)
                ],
            )
            for run, this in pairs:
                scored[run] = this
                tensors, metadata = packed(this)
                store.save(lease, run.id, tensors, marked(metadata, str(device)))
                say(line(run, this))
            flight.end()


def moved(scored: Round, start: Start) -> Counts:
    """Of the weights that the masks of a start prune and keep, how many were heading to zero."""
    return towards_zero(scored.start.weights, scored.w_final, scored.start.masks, start.masks)


def resumed(run: Run, rounds: int, store: Store, lease: Lease, dataset: Dataset, say: Say) -> Round:
    """The last round that the store holds all of; the dense one, with its row, if none.

    A checkpoint behind which rows are missing (a damaged line is not read) is of no use: the chain
    is done again, which adds them. So it is where there is none; rows that are there are compared.
    """
    device = dataset.train.images.device
    found = load(run.id, store, str(device))
    there = store.rounds_done(run.id)
    if found is not None and found[1]["round"] <= rounds:
        if rounds_of(run, found[1]["round"]) <= there:
            return unpacked(*found, device)
        say(f"{run.id}: rows before round {found[1]['round']} are missing; done again")
    elif there - {0}:
        say(
            f"{run.id}: its weights are not here; done again from the dense run, and compared with "
            f"its rows to round {max(there)}"
        )
    dense, snapshots = dense_of(run, store, device)
    dense = scored_at(run, dense, snapshots)
    store.add(lease, [row_of(run, dense)], [])
    return dense


def scored_at(run: Run, dense: Round, snapshots: dict[int, Any]) -> Round:
    """The dense round as the first masks see it: its end is iteration run.final_at."""
    if run.final_at is None:
        return dense
    return Round(0, dense.row, dense.start, snapshots[run.final_at], dense.seconds)


def packed(this: Round) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A round as tensors and metadata for a checkpoint."""
    tensors = {f"final.{name}": value for name, value in this.w_final.items()}
    tensors |= {f"start.{name}": value for name, value in this.start.weights.items()}
    for name, mask in this.start.masks.items():
        tensors[f"mask.{name}"] = mask
        frozen = this.start.frozen[name]
        if frozen is not None:
            tensors[f"frozen.{name}"] = frozen
    return tensors, {"round": this.number, "row": this.row, "masked": this.start.masked}


def unpacked(tensors: dict[str, Tensor], metadata: dict[str, Any], device: torch.device) -> Round:
    """The round of `packed`."""
    parts = divided(tensors, device)
    masks = parts["mask"]
    frozen = {name: parts.get("frozen", {}).get(name) for name in masks}
    start = Start(ls.Masks(masks), parts["start"], frozen, metadata["masked"])
    return Round(metadata["round"], metadata["row"], start, parts["final"], 0.0)


def divided(tensors: dict[str, Tensor], device: torch.device) -> dict[str, dict[str, Tensor]]:
    """{"final.fc1.weight": w} as {"final": {"fc1.weight": w}}."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value.to(device)
    return parts


# ---- masks on untrained networks -----------------------------------------------------------------


def run_untrained(
    run: Run, rounds: int, store: Store, lease: Lease, dataset: Dataset, say: Say
) -> None:
    """One-shot masks on the initial weights, over density: all rows of a run at once."""
    began = time.time()
    device = dataset.train.images.device
    dense = scored_at(run, *dense_of(run, store, device))
    points = untrained(
        run.net, dataset, run.seed, dense.w_final, [(run.criterion, run.weights)], range(rounds + 1)
    )
    rows, curve, counts = [], [], []
    for number, point in enumerate(points):
        curve.append(point["validation"])
        counts.append(point["heading"])
        rows.append(
            base_row(run)
            | {
                "round": number,
                "density": point["density"],
                "kept": point["kept"],
                "test_accuracy": point["accuracy"],
                "iterations": 0,
            }
            | {key: point[key] for key in ("backend", "products")}
        )
    seconds = time.time() - began
    made = record(run, rounds, began, [run], seconds, dataset)
    curves = [entry | {"heading": counts} for entry in curve_of(run, rounds, curve)]
    store.add(lease, rows, [made], curves)
    top = max(rows, key=lambda row: row["test_accuracy"])
    say(f"{run.id}: best {top['test_accuracy']:.2%} at density {top['density']:.2%}")


# ---- learned masks -------------------------------------------------------------------------------


def run_learned(
    runs: Sequence[Run], store: Store, lease: Lease, dataset: Dataset, say: Say
) -> None:
    """One row each, of ten masks drawn from what was learned."""
    kept = Checkpoints(store, lease, device_of(dataset))
    for this in learn(runs, dataset, kept):
        row, group = base_row(this.run) | this.row, this.company
        seconds = kept.share(this.run.id, len(group)) * len(group)
        made = record(this.run, 1, kept.began, group, seconds, dataset, this.engine)
        store.add(lease, [row], [made])
        say(
            f"{this.run.id}: density {row['density']:.2%}, test accuracy {row['test_accuracy']:.2%}"
        )


# ---- what is to do -------------------------------------------------------------------------------


def kind_of(run: Run) -> tuple[object, ...]:
    """Runs of one kind can be trained side by side."""
    pruned = run.mask0 if run.mask0 in ("zero", "original") else "values"
    protocol = run.network, run.profile, run.schedule, run.trained, run.permuted
    return *protocol, pruned, run.rescale, run.rewind_to


def groups(
    wanted: Iterable[Run], rounds: int, store: Store, most: int, across_seeds: bool
) -> tuple[list[tuple[Run, ...]], list[tuple[Run, ...]]]:
    """What is still to do, as groups of at most `most` runs of one kind: dense runs, then others.

    Args:
        across_seeds: whether networks of different seeds are trained side by side. On the CPU that
            gains nothing and costs a copy of the images for each.
    """
    have = rounds_there(store.rows())
    todo = [
        run
        for run in dict.fromkeys(wanted)
        if not rounds_of(run, rounds) <= have.get(run.id, set())
    ]
    others = [run for run in todo if run != run.dense]
    dense = {run: None for run in todo if run == run.dense}
    for run in others:
        if run.schedule != "learned" and not has_dense(run.dense, store):
            dense[run.dense] = None
    kinds: dict[tuple[object, ...], list[Run]] = {}
    for run in others:
        kinds.setdefault((*kind_of(run), None if across_seeds else run.seed), []).append(run)
    return [(run,) for run in dense], [
        tuple(members[at : at + size])
        for members in kinds.values()
        # what has no company is done chain after chain, so that one is whole before the next begins
        for size in [most if members[0].net.is_plain else 1]
        for at in range(0, len(members), size)
    ]
