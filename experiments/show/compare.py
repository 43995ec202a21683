"""Two profiles beside each other: what deviations from the protocol do to the same runs."""

from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

from experiments.findings.tables import Table
from experiments.store.remakes import readable
from experiments.study.networks import find
from experiments.study.profiles import profile_of
from experiments.study.runs import DEFAULTS, LITERALS, run_of

Row = Mapping[str, Any]
Key = tuple[Any, ...]

COLUMNS = (
    "run", "round", "density", "seeds", "accuracy", "of the other", "points more", "least",
    "most", "early stop", "of the other", "iterations", "of the other",
)  # fmt: skip


def compare(rows: Iterable[Row], profile: str, other: str, network: str | None) -> Table:
    """Means over the seeds that both profiles have of a run and round, and their differences.

    Raises:
        ValueError: no run is there under both profiles.
    """
    for name in (profile, other):
        profile_of(name)
    if network is not None:
        find(network)
    found: dict[str, dict[Key, Row]] = {profile: {}, other: {}}
    for name, its in found.items():
        mine = [row for row in rows if row["profile"] == name]
        its |= {key_of(row): row for row in readable(mine) if network in (None, row["network"])}
    pairs: dict[Key, list[tuple[Row, Row]]] = {}
    for key, row in found[profile].items():
        if key in found[other]:
            pairs.setdefault(key[:2], []).append((row, found[other][key]))
    if not pairs:
        raise ValueError(f"no run is there under both profiles, {profile} and {other}.")
    lines = [(name, number, *numbers(both)) for (name, number), both in pairs.items()]
    return Table(COLUMNS, tuple(lines), f"Profile {profile} beside {other}, means over seeds.")


def key_of(row: Row) -> Key:
    """The run but for profile and seed, in words; round; seed."""
    run = run_of(row)
    apart = ("network", "profile", "seed", "remake", *LITERALS)
    words = [f"{n}={v}" for n, v in run.changed.items() if n not in apart]
    if run.criterion == DEFAULTS["criterion"]:
        words.insert(0, f"criterion={run.criterion}")
    return " ".join([row["network"], *words]), row["round"], run.seed


def numbers(both: list[tuple[Row, Row]]) -> tuple[Any, ...]:
    def of(name: str, which: int) -> float | None:
        values = [pair[which][name] for pair in both]
        return None if None in values else mean(values)

    points = [100 * (a["test_accuracy"] - b["test_accuracy"]) for a, b in both]
    accuracies = [f"{of('test_accuracy', which):.2%}" for which in (0, 1)]
    return (
        f"{of('density', 0):.2%}",
        len(both),
        *accuracies,
        *(f"{value:+.2f}" for value in (mean(points), min(points), max(points))),
        *(
            None if (value := of(name, which)) is None else f"{value:,.0f}"
            for name in ("early_stop_iteration", "iterations")
            for which in (0, 1)
        ),
    )
