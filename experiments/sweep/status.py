"""What of the studies is done, who is on the rest, and how long it will take."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.store.remakes import Remakes, numerics_of
from experiments.store.store import Store
from experiments.study.runs import DENSE, Run, rounds_of
from experiments.study.studies import Study, rounds_asked, seeds_asked, wanted

Kind = tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """One study on one network.

    Attributes:
        rounds: how many rounds each run is wanted to have, and which of them are there.
        running: run id -> host, pid and since of the worker that is on it.
    """

    study: str
    network: str
    rounds: Mapping[Run, tuple[frozenset[int], frozenset[int]]]
    running: Mapping[str, Mapping[str, Any]]

    @property
    def done(self) -> int:
        return sum(len(asked & there) for asked, there in self.rounds.values())

    @property
    def wanted(self) -> int:
        return sum(len(asked) for asked, _ in self.rounds.values())

    @property
    def left(self) -> dict[Run, frozenset[int]]:
        """The rounds that are missing of runs that are not done."""
        return {run: asked - there for run, (asked, there) in self.rounds.items() if asked - there}

    @property
    def pending(self) -> list[Run]:
        """Runs that are not done, and that nobody is on."""
        return [run for run in self.left if run.id not in self.running]


def progress(
    chosen: Iterable[Study],
    networks: Iterable[str],
    profile: str,
    seeds: int | None,
    store: Store,
) -> list[Progress]:
    """Each study on each network that it has; with the dense runs that its others start from.

    Args:
        seeds: how many; None: the study's.
    """
    remakes, numerics = Remakes(store), numerics_of(store.rows())
    holders = store.holders()
    networks = list(networks)
    found = []
    for study in chosen:
        most = rounds_asked(study, profile)
        for network in networks:
            if network not in study.networks:
                continue
            asked = seeds_asked(study, profile) if seeds is None else seeds
            runs = wanted(study, network, profile, asked)
            runs = [remakes.shown(replace(run, numerics=numerics), most) for run in runs]
            starts = [run.dense for run in runs if run.schedule != "learned"]
            rounds = {
                run: (frozenset(rounds_of(run, most)), frozenset(remakes.rounds(run)))
                for run in dict.fromkeys([*starts, *runs])
            }
            running = {run.id: holders[run.id] for run in rounds if run.id in holders}
            found.append(Progress(study.name, network, rounds, running))
    return found


# ---- time ----------------------------------------------------------------------------------------


class Times:
    """Seconds of rounds by kind of run, as they were measured in a store."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], records: Iterable[Mapping[str, Any]]):
        kinds = {row["run_id"]: kind_of(row) for row in rows}
        found: dict[Kind, dict[int, list[float]]] = {}
        for record in records:
            kind, seconds = kinds.get(record["run_id"]), record.get("seconds")
            if kind is not None and seconds is not None:
                found.setdefault(kind, {}).setdefault(record["round"], []).append(seconds)
        self._of = {
            kind: {number: statistics.mean(all_) for number, all_ in by_round.items()}
            for kind, by_round in found.items()
        }

    def seconds(self, run: Run, rounds: Iterable[int]) -> float | None:
        """What the rounds of a run will take; None: nothing like them was measured."""
        measured = self._of.get(kind_of(vars(run)))
        if not measured:
            return None
        if run.schedule != "iterative":  # all of it at once
            rounds = [max(rounds)]
        elif run != run.dense:
            rounds = set(rounds) - {0}  # a copy of the dense run's row
        return sum(
            measured[min(measured, key=lambda known: (abs(known - number), known))]
            for number in rounds
        )


def kind_of(run: Mapping[str, Any]) -> Kind:
    """Runs of one kind take about as long: by network, schedule and what pruned weights hold."""
    dense = run["schedule"] == "iterative" and run["criterion"] == DENSE
    mask0 = run["mask0"] if run["mask0"] in ("zero", "original") else "values"
    return run["network"], run["profile"], "dense" if dense else run["schedule"], mask0


def hours(left: Mapping[Run, Iterable[int]], times: Times, workers: int) -> str:
    """How long the rounds take on so many workers; in words where nothing was measured."""
    if not left:
        return "0"
    found = [times.seconds(run, rounds) for run, rounds in left.items()]
    known = [seconds for seconds in found if seconds is not None]
    if not known:
        return "unknown"
    text = f"{sum(known) / workers / 3600:.2f}"
    return text if len(known) == len(found) else f"more than {text}"


# ---- text ----------------------------------------------------------------------------------------


def as_text(found: Sequence[Progress], times: Times, workers: int) -> str:
    """A table by study and network, its total (shared runs count once), and who is at work."""
    rows = [
        (
            one.study,
            one.network,
            f"{one.done} / {one.wanted}",
            str(len(one.running)),
            str(len(one.pending)),
            hours(one.left, times, workers),
        )
        for one in found
    ]
    all_ = together(found)
    if len(found) > 1:
        done = f"{all_.done} / {all_.wanted}"
        left = hours(all_.left, times, workers)
        rows.append(("all", "", done, str(len(all_.running)), str(len(all_.pending)), left))
    header = ("study", "network", "rounds", "running", "pending", f"hours, {workers} workers")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    for run_id, owner in all_.running.items():
        lines.append(f"{run_id}: {owner['host']}, pid {owner['pid']}, since {owner['since']}")
    return "\n".join(lines)


def together(found: Sequence[Progress]) -> Progress:
    """All of them as one; of a run that several ask for, the most rounds."""
    rounds: dict[Run, tuple[frozenset[int], frozenset[int]]] = {}
    running: dict[str, Mapping[str, Any]] = {}
    for one in found:
        running |= one.running
        for run, (asked, there) in one.rounds.items():
            rounds[run] = (asked | rounds.get(run, (frozenset(), there))[0], there)
    return Progress("all", "", rounds, running)
