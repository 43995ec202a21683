"""From rows of the store to what figures and tables show: the curves of a study on one network."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from experiments.findings import words
from experiments.findings.statistics import Comparison, Level, compare, levels
from experiments.study.networks import find
from experiments.study.profiles import PROFILES
from experiments.study.runs import DENSE
from experiments.study.studies import Study

Row = dict[str, Any]

ACCURACY = "test_accuracy"


@dataclass(frozen=True)
class Curve:
    """The rows of one arm, and the dense rows that its chains start from.

    Attributes:
        rows: of the arm's runs.
        dense: round 0 of the trained dense network, for the arm's seeds; they start the curves of
            networks that are trained.
    """

    label: str
    rows: tuple[Row, ...]
    dense: tuple[Row, ...] = ()

    @property
    def fields(self) -> Row:
        """A row to ask for the fields that all rows of an arm share, such as `criterion`."""
        return self.rows[0]

    @property
    def words(self) -> str:
        """The label in the paper's words."""
        return words.arm(self.label, self.fields)

    @property
    def trained(self) -> bool:
        return self.fields["trained"] and self.fields["schedule"] != "learned"

    @property
    def seeds(self) -> set[int]:
        """Those that have all rounds which any of the rows has."""
        rounds = {row["round"] for row in self.rows}
        by_seed: dict[int, set[int]] = {}
        for row in self.rows:
            by_seed.setdefault(row["seed"], set()).add(row["round"])
        return {seed for seed, there in by_seed.items() if there == rounds}

    def of(self, seeds: set[int]) -> "Curve":
        """The curve of these seeds alone."""
        rows, dense = (
            tuple(row for row in some if row["seed"] in seeds) for some in (self.rows, self.dense)
        )
        return replace(self, rows=rows, dense=dense)

    def levels(self, value: str = ACCURACY) -> tuple[Level, ...]:
        rows = self.rows
        if self.trained:
            # a remade chain has another dense run, of which its own round 0 is a copy
            remade = {row["seed"] for row in rows if row.get("remake")}
            dense = tuple(row for row in self.dense if row["seed"] not in remade)
            starts = {row["seed"] for row in dense}
            rows = dense + tuple(
                row for row in rows if row["round"] > 0 or row["seed"] not in starts
            )
        return levels(rows, value)


def caveat_of(profile: str) -> str:
    """What a profile leaves out of the paper's protocol; "" for the paper profile."""
    deviations = ", ".join(PROFILES[profile].deviations)
    return deviations and f"profile {profile}, not the paper's protocol: {deviations}"


@dataclass(frozen=True)
class Selection:
    """The curves of a study on one network under one profile, in the order of the study's arms.

    Attributes:
        dense: round 0 of the trained dense networks.
        rows: all of the network and the profile, of other studies too.
        missing: labels of the arms without a row.
        data: the data set, where it is not the network's.
    """

    study: str
    question: str
    network: str
    profile: str
    curves: tuple[Curve, ...]
    dense: tuple[Row, ...]
    rows: tuple[Row, ...] = ()
    missing: tuple[str, ...] = ()
    data: str = ""

    @property
    def begun(self) -> bool:
        """Whether it is whole, or has runs that no study before it asks for."""
        own = any(curve.fields.get("study") == self.study for curve in self.curves)
        return bool(self.curves) and (own or not self.missing)

    @property
    def paper(self) -> bool:
        return self.profile == "paper"

    @cached_property
    def seeds(self) -> str:
        """How many seeds there are per curve, in words; a range where curves or levels differ."""
        counts = {level.n for curve in self.curves for level in curve.levels()}
        if not counts:
            return "no runs"
        if counts == {1}:
            return "1 seed per curve"
        low, high = min(counts), max(counts)
        return f"{low} seeds per curve" if low == high else f"{low} to {high} seeds per curve"

    @property
    def place(self) -> str:
        """Network and data set: "FC on MNIST"."""
        dataset = self.data or PROFILES[self.profile].dataset(find(self.network).dataset)
        return f"{words.network(self.network)} on {words.DATA.get(dataset, dataset)}"

    @property
    def caveat(self) -> str:
        """What the profile leaves out of the paper's protocol; "" for the paper profile."""
        return caveat_of(self.profile)

    @property
    def stem(self) -> str:
        """Name of the files: "mask-criteria-fc-paper"."""
        words = filter(None, (self.study, self.network, self.data, self.profile))
        return "-".join(words).replace(":", ".")

    @property
    def shared(self) -> "Selection":
        """The seeds that all curves have, so that curves, and their dense line, can be compared.

        Itself where fewer than two are shared.
        """
        if not self.curves:
            return self
        seeds = set.intersection(*(curve.seeds for curve in self.curves))
        if len(seeds) < 2:
            return self
        return replace(
            self,
            curves=tuple(curve.of(seeds) for curve in self.curves),
            dense=tuple(row for row in self.dense if row["seed"] in seeds),
        )

    def only(self, keep: Callable[[Curve], bool]) -> "Selection":
        """The curves that `keep` chooses."""
        return replace(self, curves=tuple(filter(keep, self.curves)))

    def find(self, **fields: Any) -> Curve | None:
        """The first curve whose rows have these fields."""
        for curve in self.curves:
            if all(curve.fields.get(name) == value for name, value in fields.items()):
                return curve
        return None

    def compare(self, a: Curve, b: Curve, value: str = ACCURACY) -> list[Comparison]:
        return compare(a.levels(value), b.levels(value))


def select(study: Study, network: str, profile: str, rows: Iterable[Row]) -> Selection:
    """The rows of the arms of a study; whatever seeds the rows have."""
    mine = [row for row in rows if row["network"] == network and row["profile"] == profile]
    seeds = sorted({row["seed"] for row in mine})
    by_run: dict[str, list[Row]] = {}
    for row in mine:
        by_run.setdefault(row["run_id"], []).append(row)
    dense = tuple(row for row in mine if is_dense(row) and row["permuted"] == "none")
    missing = []
    curves: dict[tuple[str, ...], Curve] = {}
    for arm in study.arms():
        runs = arm.runs(network, profile, seeds)
        ids = tuple(run.id for run in runs)
        found = tuple(row for run in runs for row in by_run.get(run.id, ()))
        label = "dense" if found and is_dense(found[0]) else arm.label
        if not found:
            missing.append(label)
            continue
        if ids in curves:  # in a short profile two moments may be one iteration: one curve
            before = curves[ids].label
            told = before.replace(" = ", ", ").split(", ")
            apart = [word for word in label.split(", ") if word not in told]
            curves[ids] = replace(curves[ids], label=f"{before} = {', '.join(apart)}")
            continue
        starts = {run.dense.id for run in runs if run.id in by_run}
        before = tuple(
            row for start in sorted(starts) for row in by_run.get(start, ()) if row["round"] == 0
        )
        curves[ids] = Curve(label, found, before)
    return Selection(
        study.name,
        study.question,
        network,
        profile,
        tuple(curves.values()),
        dense,
        tuple(mine),
        tuple(missing),
        next((row.get("data", "") for curve in curves.values() for row in curve.rows), ""),
    )


def is_dense(row: Row) -> bool:
    """Whether a row is round 0 of the trained dense network."""
    return (
        row["round"] == 0
        and row["criterion"] == DENSE
        and row["schedule"] == "iterative"
        and row["trained"]
    )
