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
from experiments.store.checkpoints import Checkpoints, InFlight
from experiments.store.records import Made, Recorder, Say, load
from experiments.store.remakes import has_snapshots, rounds_there
from experiments.store.store import Lease, Store
from experiments.study import studies
from experiments.study.runs import Run, rounds_of
from experiments.train.data import Dataset
from experiments.train.heading import Counts, towards_zero
from experiments.train.learned import learn
from experiments.train.lottery import (
    Round,
    dense_round,
    next_start,
    tensors_at,
    together,
    train_rounds,
    untrained,
)
from experiments.train.models import dense_start
from lottery_sparse.tickets.round import Began


def execute(
    runs: Sequence[Run], rounds: int, store: Store, lease: Lease, dataset: Dataset, say: Say
) -> None:
    """Bring each run of a group (see `groups`) to `rounds` rounds; add rows as they are there."""
    out, kind = Recorder(store, lease, dataset, say), runs[0]
    if kind == kind.dense:
        for run in runs:
            run_dense(run, out)
    elif kind.schedule == "iterative":
        run_chains(runs, rounds, out)
    elif kind.schedule == "one_shot":
        for run in runs:
            run_untrained(run, rounds, out)
    else:
        run_learned(runs, out)


def line(run: Run, this: Round) -> str:
    row = this.row
    return (
        f"{run.id} round {this.number:2}: density {row['density']:7.2%}, test accuracy "
        f"{row['test_accuracy']:.2%} at iteration {row['early_stop_iteration']:,}"
    )


# ---- the dense run of a seed --------------------------------------------------------------------


def run_dense(run: Run, out: Recorder) -> None:
    """Round 0: one row, and the weights at its end and at iterations that studies ask for."""
    if out.store.rounds_done(run.id):
        out.say(f"{run.id}: its weights are not here; trained again, and compared with its row")
    began = time.time()
    flight = InFlight(run, 0, out)
    this, found = dense_round(run, out.dataset, studies.snapshots(run), midway=flight)
    out.add([Made(run, [this.row], this.evaluations)], began, this.seconds)
    tensors = {f"final.{name}": value for name, value in this.w_final.items()}
    out.save(run, tensors | tensors_at(found), {"row": this.row, "at": sorted(found)})
    flight.end()
    out.say(line(run, this))


def has_dense(run: Run, store: Store) -> bool:
    """Whether the store holds what runs that start from this dense one need."""
    found = store.load(run.id)
    return found is not None and has_snapshots(run, found[1])


def dense_of(run: Run, store: Store, device: torch.device) -> tuple[Round, dict[int, Any]]:
    """The dense round that a run starts from, as its first masks see it, and dense weights.

    Its end is iteration run.final_at. The weights are those at iteration 0, at the last one and at
    those between that are kept.
    """
    found = load(run.dense.id, store, str(device))
    if found is None:
        raise ValueError(f"{run.id} starts from {run.dense.id}, which is not in {store.folder}.")
    parts, metadata = divided(found[0], device), found[1]
    start = dense_start(run.net, run.seed, device)
    snapshots = {at: parts[f"at_{at}"] for at in metadata["at"]}
    snapshots |= {0: start.weights, run.iterations: parts["final"]}
    last = run.iterations if run.final_at is None else run.final_at
    return Round(0, metadata["row"], start, snapshots[last]), snapshots


# ---- chains of rounds ----------------------------------------------------------------------------


def run_chains(runs: Sequence[Run], rounds: int, out: Recorder) -> None:
    """Lotteries side by side: always the ones with the fewest rounds done."""
    device = out.dataset.device
    origins: dict[Run, Any] = {}
    scored: dict[Run, Round] = {}
    for run in runs:
        dense, snapshots = dense_of(run, out.store, device)
        origins[run] = snapshots[run.rewind_to]
        scored[run] = resumed(run, dense, rounds, out)
    [stride] = {run.stride for run in runs}
    while todo := [run for run in runs if scored[run].number + stride <= rounds]:
        number = stride + min(scored[run].number for run in todo)
        now = [run for run in todo if scored[run].number == number - stride]
        starts = {run: next_start(run, number, scored[run], origins[run]) for run in now}
        company = [run for run in now if together(run, starts[run], device)]
        for some in [company] * bool(company) + [[run] for run in now if run not in company]:
            began = time.time()
            flight = InFlight(some[0], number, out)
            begins = [starts[run] for run in some]
            done = train_rounds(some, number, begins, out.dataset, midway=flight)
            pairs = list(zip(some, done, strict=True))
            made = [
                Made(run, [this.row], this.evaluations, moved(scored[run], this.start))
                for run, this in pairs
            ]
            out.add(made, began, done[0].seconds)
            for run, this in pairs:
                scored[run] = this
                out.save(run, *packed(this))
                out.say(line(run, this))
            flight.end()


def moved(scored: Round, start: Began) -> Counts:
    """Of the weights that the masks of a start prune and keep, how many were heading to zero."""
    return towards_zero(scored.start.weights, scored.w_final, scored.start.masks, start.masks)


def resumed(run: Run, dense: Round, rounds: int, out: Recorder) -> Round:
    """The last round that the store holds all of; the dense one, with its row, if none.

    A checkpoint behind which rows are missing (a damaged line is not read) is of no use: the chain
    is done again, which adds them. So it is where there is none; rows that are there are compared.
    """
    found, there = out.load(run), out.store.rounds_done(run.id)
    if found is not None and found[1]["round"] <= rounds:
        if rounds_of(run, found[1]["round"]) <= there:
            return unpacked(*found, out.dataset.device)
        out.say(f"{run.id}: rows before round {found[1]['round']} are missing; done again")
    elif there - {0}:
        out.say(
            f"{run.id}: its weights are not here; done again from the dense run, and compared with "
            f"its rows to round {max(there)}"
        )
    out.copy(Made(run, [dense.row]))
    return dense


def packed(this: Round) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A round as tensors and metadata for a checkpoint."""
    start = this.start
    parts = {
        "final": this.w_final, "start": start.weights, "mask": start.masks, "frozen": start.frozen
    }  # fmt: skip
    tensors = {f"{part}.{name}": t for part, its in parts.items() for name, t in its.items()}
    return tensors, {"round": this.number, "row": this.row, "masked": not start.released}


def unpacked(tensors: dict[str, Tensor], metadata: dict[str, Any], device: torch.device) -> Round:
    """The round of `packed`."""
    parts = divided(tensors, device)
    frozen = parts.get("frozen", {})
    start = Began(ls.Masks(parts["mask"]), parts["start"], frozen, not metadata["masked"])
    return Round(metadata["round"], metadata["row"], start, parts["final"])


def divided(tensors: dict[str, Tensor], device: torch.device) -> dict[str, dict[str, Tensor]]:
    """{"final.fc1.weight": w} as {"final": {"fc1.weight": w}}."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value.to(device)
    return parts


# ---- masks on untrained networks, and learned ones -----------------------------------------------


def run_untrained(run: Run, rounds: int, out: Recorder) -> None:
    """One-shot masks on the initial weights, over density: all rows of a run at once."""
    began = time.time()
    dense, _ = dense_of(run, out.store, out.dataset.device)
    curve = [(run.criterion, run.weights)]
    found = list(untrained(run.net, out.dataset, run.seed, dense.w_final, curve, range(rounds + 1)))
    rows = [point.row for point in found]
    made = Made(run, rows, [p.validation for p in found], [p.heading for p in found])
    out.add([made], began, time.time() - began)
    top = max(rows, key=lambda row: row["test_accuracy"])
    out.say(f"{run.id}: best {top['test_accuracy']:.2%} at density {top['density']:.2%}")


def run_learned(runs: Sequence[Run], out: Recorder) -> None:
    """One row each, of ten masks drawn from what was learned."""
    kept = Checkpoints(out)
    for this in learn(runs, out.dataset, kept):
        run, row, group = this.run, this.row, this.company
        seconds = kept.share(run.id, len(group)) * len(group)
        out.add([Made(run, [row])], kept.began, seconds, group)
        accuracy = f"test accuracy {row['test_accuracy']:.2%}"
        out.say(f"{run.id}: density {row['density']:.2%}, {accuracy}")


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
        for size in [most if members[0].net.goes_in_company else 1]
        for at in range(0, len(members), size)
    ]
