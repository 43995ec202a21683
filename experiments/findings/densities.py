"""At which density an untrained network is judged: three ways to choose it.

"each": the best density of each run on test data, as the published numbers are by all evidence.
"mean": the density where the mean over the runs is best on test data. "validation": of each run
the density that is best on validation data, which is what a user could do. The first two are
optimistic, the first one more: by 1.7 and 3.7 points on FC.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

Row = Mapping[str, Any]
Way = Literal["each", "mean", "validation"]
WAYS: dict[Way, str] = {
    "each": "mean of each run's best density",
    "mean": "best density of the mean curve",
    "validation": "density chosen on validation data",
}
NOT_RECORDED = "not recorded"  # rows before 2026-11-30 have no validation accuracy


@dataclass(frozen=True)
class Chosen:
    """Test accuracy and density at the round that was chosen, by seed."""

    accuracy: Mapping[int, float]
    density: Mapping[int, float]

    @property
    def mean(self) -> float:
        return fmean(self.accuracy.values())


def chosen(rows: Sequence[Row], way: Way) -> Chosen | None:
    """The pruned rounds of one curve at its chosen densities; None without what chooses.

    Of seeds that have all rounds which any has. "validation": the lowest round of the highest
    accuracy; all of these rows have to have one.
    """
    rounds = {row["round"] for row in rows if row["round"] > 0}
    by_seed: dict[int, dict[int, Row]] = {}
    for row in rows:
        if row["round"] > 0:
            by_seed.setdefault(row["seed"], {})[row["round"]] = row
    by_seed = {seed: found for seed, found in sorted(by_seed.items()) if set(found) == rounds}
    if not by_seed:
        return None
    if way == "mean":
        best = max(
            sorted(rounds),
            key=lambda r: fmean(found[r]["test_accuracy"] for found in by_seed.values()),
        )
        picked = {seed: found[best] for seed, found in by_seed.items()}
    else:
        column = "test_accuracy" if way == "each" else "validation_accuracy"
        if any(row.get(column) is None for found in by_seed.values() for row in found.values()):
            return None
        picked = {
            seed: max((found[r] for r in sorted(rounds)), key=lambda row: row[column])
            for seed, found in by_seed.items()
        }
    return Chosen(
        {seed: row["test_accuracy"] for seed, row in picked.items()},
        {seed: row["density"] for seed, row in picked.items()},
    )
