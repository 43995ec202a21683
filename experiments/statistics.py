"""Statistics of the figures: mean, range, interval, and the test of two curves. Pure functions.

A curve is summarised level by level: a level is one round, its values one per seed. The test is
Welch's, two-sided, as in the paper's figures starred at p < 0.05, with Holm's correction over the
levels of the figure beside it. Fewer than three runs on a side are not tested.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

ALPHA = 0.05
FEWEST = 3  # runs on each side of a test
TOO_FEW = "too few runs"


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample: n - 1 in the denominator."""
    center = mean(values)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The t-interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    center, n = mean(values), len(values)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * deviation(values) / math.sqrt(n)
    return center - half, center + half


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """p of equal means, variances not assumed equal, two-sided; None below three runs a side."""
    if min(len(a), len(b)) < FEWEST:
        return None
    if len(set(a)) == len(set(b)) == 1:  # no spread at all: t is 0 / 0 or infinite
        return 1.0 if a[0] == b[0] else 0.0
    # from moments: ttest_ind warns of cancellation where one side has no spread
    sides = [part for x in (a, b) for part in (mean(x), deviation(x), len(x))]
    return float(stats.ttest_ind_from_stats(*sides, equal_var=False).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; what was not tested (None) stays so and does not count."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted


def stars(p: float | None) -> str:
    """ "*" where p < 0.05, "" where not, "too few runs" where there was no test."""
    if p is None:
        return TOO_FEW
    return "*" if p < ALPHA else ""


@dataclass(frozen=True)
class Level:
    """One round of a curve: its values, one per seed, in the order of `seeds`."""

    round: int
    density: float  # mean over the seeds
    seeds: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        return interval(self.values)


def levels(rows: Iterable[Mapping[str, Any]], value: str = "test_accuracy") -> tuple[Level, ...]:
    """Rows of one curve -> its levels by round; rows where `value` is null are left out."""
    rounds: dict[int, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row.get(value) is None:
            continue
        seeds = rounds.setdefault(row["round"], {})
        if row["seed"] in seeds:
            raise ValueError(
                f"a curve has one row per seed and round; got two of seed {row['seed']}, round "
                f"{row['round']}: {seeds[row['seed']]['run_id']} and {row['run_id']}."
            )
        seeds[row["seed"]] = row
    return tuple(
        Level(
            round=number,
            density=mean([seeds[seed]["density"] for seed in sorted(seeds)]),
            seeds=tuple(sorted(seeds)),
            values=tuple(float(seeds[seed][value]) for seed in sorted(seeds)),
        )
        for number, seeds in sorted(rounds.items())
    )


@dataclass(frozen=True)
class Comparison:
    """Two curves at one level: difference of the means (a - b), p, and p corrected by Holm."""

    round: int
    density: float
    n_a: int
    n_b: int
    difference: float
    p: float | None
    p_holm: float | None

    @property
    def stars(self) -> str:
        return stars(self.p)


def compare(a: Sequence[Level], b: Sequence[Level]) -> list[Comparison]:
    """Welch's test at each pruned level that both curves have; Holm over these levels."""
    other = {level.round: level for level in b}
    pairs = [(x, other[x.round]) for x in a if x.round > 0 and x.round in other]
    p_values = [welch(x.values, y.values) for x, y in pairs]
    return [
        Comparison(x.round, x.density, x.n, y.n, x.mean - y.mean, p, p_holm)
        for (x, y), p, p_holm in zip(pairs, p_values, holm(p_values), strict=True)
    ]
