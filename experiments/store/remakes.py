"""Which remake of a run is worked on, and which one is read.

A chain of rounds is made as a whole by one arithmetic. Where it cannot go on, as its weights are
not here or were made by another one, it is made anew from its dense run on, under the next number
(`Run.remake`). Rows and weights that were stored before stay.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.store.arithmetic import is_ours
from experiments.store.store import Store
from experiments.study import parts, studies
from experiments.study.runs import Run, rounds_of, run_of

Row = Mapping[str, Any]

DIFFERS = "differs"  # outcome of an attempt that gave other numbers than the stored rows

# What the store holds of a run, for who wants to go on with it.
NEW, HERE, LOST, FOREIGN = "new", "here", "lost", "foreign"


def rounds_there(rows: Iterable[Row]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for row in rows:
        found.setdefault(row["run_id"], set()).add(row["round"])
    return found


class Remakes:
    """What there is of each run, as one look at the store has found it.

    Args:
        device: whose arithmetic goes on; None: that of workers elsewhere, who look for themselves.
        anew: make anew what cannot go on, or would have to be done again to be compared.
    """

    def __init__(self, store: Store, device: str | None = "cpu", anew: bool = False):
        self.store, self.device, self.anew = store, device, anew
        rows = store.rows()
        self.have = rounds_there(rows)
        self.highest: dict[Any, int] = {}  # by network, profile and seed
        for row in rows:
            key = row["network"], row["profile"], row["seed"]
            self.highest[key] = max(self.highest.get(key, 0), row.get("remake", 0))
        self.last = {  # run id -> how its last attempt ended
            record["run_id"]: record["outcome"]
            for record in store.records()
            if record.get("outcome", "started") != "started"
        }

    def remakes(self, run: Run) -> list[Run]:
        """Those that may be in the store, from 0 on: a seed's runs share the numbers."""
        highest = self.highest.get((run.network, run.profile, run.seed), 0)
        return [replace(run, remake=number) for number in range(highest + 1)]

    def is_done(self, run: Run, rounds: int) -> bool:
        """Whether one of its remakes has all rows."""
        wanted = rounds_of(run, rounds)
        return any(wanted <= self.rounds(one) for one in self.remakes(run))

    def rounds(self, run: Run) -> set[int]:
        return self.have.get(run.id, set())

    def shown(self, run: Run, rounds: int) -> Run:
        """The lowest remake that is done, or else the last one with rows."""
        wanted, known = rounds_of(run, rounds), self.remakes(run)
        done = [one for one in known if wanted <= self.rounds(one)]
        begun = [one for one in known if self.rounds(one)]
        return (done or begun[-1:] or known)[0]

    def current(self, run: Run) -> Run | None:
        """The remake to work on; None where none can be, without making the run anew.

        The lowest one that goes on from weights that are here, or that nothing was lost of; else
        the last one, done again; else, if asked, the next one.
        """
        known = self.remakes(run)
        for one in known:
            if self._goes_on(one):
                return one
        if self.anew:
            return replace(run, remake=len(known))
        return None if FOREIGN in self._states(known[-1]) else known[-1]

    def _goes_on(self, run: Run) -> bool:
        if self.anew and DIFFERS in (self.last.get(run.id), self.last.get(run.dense.id)):
            return False
        return set(self._states(run)) <= {NEW, HERE}

    def _states(self, run: Run) -> list[str]:
        """Of a run, and of the dense one that it starts from."""
        starts = run.schedule != "learned" and run != run.dense
        return [self.state(one) for one in ([run.dense, run] if starts else [run])]

    def state(self, run: Run) -> str:
        """What the store holds of the weights of a run."""
        if run.schedule == "one_shot":
            return HERE  # it has none of its own
        found = self.store.metadata(run.id)
        # the row of round 0 is a copy of the dense run's: nothing is lost of a chain without more
        begun = self.rounds(run) - ({0} if run != run.dense else set())
        if found is None:
            return LOST if begun else NEW
        if self.device is not None and not is_ours(found, self.device):
            return FOREIGN
        return HERE if run != run.dense or has_snapshots(run, found) else LOST


def has_snapshots(dense: Run, metadata: Mapping[str, Any]) -> bool:
    """Whether the checkpoint of a dense run has what runs that start from it need."""
    return set(studies.snapshots(dense)) <= set(metadata["at"])


def to_do(
    wanted: Iterable[Run], rounds: int, remakes: Remakes, say: Callable[[str], None]
) -> list[Run]:
    """Of each run that is not done the remake to work on, but of those that cannot go on here.

    Says what was found of those that are made anew, and of those that are left.
    """
    now: list[Run] = []
    anew: dict[int, list[Run]] = {}
    stuck: list[Run] = []
    for run in wanted:
        if remakes.is_done(run, rounds):
            continue
        one = remakes.current(run)
        if one is None:
            stuck.append(run)
            continue
        now.append(one)
        if one.remake > len(remakes.remakes(run)) - 1:
            anew.setdefault(one.remake, []).append(run)
    for number, runs in anew.items():
        say(
            f"{_named(runs)} cannot go on from what is in {remakes.store.folder} (no weights, or "
            f"another machine's, or other numbers came of them): made anew as remake {number}"
        )
    if stuck:
        say(
            f"{_named(stuck)} cannot go on here: {remakes.store.folder} has weights of another "
            "machine's arithmetic, and a chain never mixes two; go on there, or make it anew as a "
            "whole with --remake"
        )
    return now


def _named(runs: Sequence[Run]) -> str:
    return runs[0].id + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")


# ---- which one is read ---------------------------------------------------------------------------


def numerics_of(rows: Iterable[Row]) -> int:
    """The numerics of all rows; 1 if they are of several, or there are none."""
    found = {row.get("numerics", 1) for row in rows}
    return found.pop() if len(found) == 1 else 1


def readable(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows that claims, figures and reports read: of each run one remake, under the run's id.

    It is the lowest one that has all rounds of the run's study; while none has, the one with most
    rounds, the lowest of equals. `stored_as` is the id that a row has in the store. Rows are those
    of `numerics_of`, under the ids of numerics 1.
    """
    numerics = numerics_of(rows)
    chains: dict[str, dict[int, list[Row]]] = {}  # id that is read -> remake -> rows
    for row in rows:
        if row.get("numerics", 1) != numerics:
            continue
        plain = "numerics" not in row and "remake" not in row
        # reading imports nothing: what others named keeps its id
        plain = plain or any(map(parts.is_path, (row["network"], row["criterion"])))
        name = row["run_id"] if plain else replace(run_of(row), numerics=1, remake=0).id
        chains.setdefault(name, {}).setdefault(row.get("remake", 0), []).append(row)
    found = []
    for name, by_number in chains.items():
        for row in min(by_number.items(), key=_rank)[1]:
            found.append({**row, "run_id": name, "stored_as": row["run_id"]})
    return found


def _rank(remake: tuple[int, Sequence[Row]]) -> tuple[bool, int, int]:
    number, rows = remake
    there = {row["round"] for row in rows}
    return (False, 0, number) if _is_whole(rows[0], there) else (True, -len(there), number)


def _is_whole(row: Row, there: set[int]) -> bool:
    study = studies.STUDIES.get(row.get("study", ""))
    if study is None:
        return False
    return rounds_of(run_of(row), studies.rounds_asked(study, row["profile"])) <= there
