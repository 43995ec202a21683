"""Statistics of the figures: mean, range, interval, and the test of two curves. Pure functions.

A curve is summarised level by level: a level is one round, its values one per seed. Runs of a seed
start from the same weights and see the same batches, so two arms are tested by the differences of
each seed (a paired t test, two-sided); Welch's test, of means alone, stands beside it. As in the
paper p < 0.05 is starred, with Holm's correction over the levels of the figure beside it. Fewer
than three seeds are not tested.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean as mean
from typing import Any

from scipy import stats

ALPHA = 0.05
FEWEST = 3  # runs on each side of a test
TOO_FEW = "too few runs"


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


def paired(differences: Sequence[float]) -> float | None:
    """p of a mean difference of zero, two-sided, of one difference per seed; None below three."""
    if len(differences) < FEWEST:
        return None
    spread = deviation(differences)
    if spread == 0:  # t is 0 / 0 or infinite
        return 1.0 if differences[0] == 0 else 0.0
    t = mean(differences) * math.sqrt(len(differences)) / spread
    return float(2 * stats.t.sf(abs(t), len(differences) - 1))


def detectable(differences: Sequence[float]) -> float | None:
    """The least true difference that `paired` finds at p < 0.05 four times of five.

    By the noncentral t distribution, of as many seeds, if the differences scatter as these do. None
    below three.
    """
    n = len(differences)
    return None if n < FEWEST else _shift(n) * deviation(differences) / math.sqrt(n)


@cache
def _shift(n: int, power: float = 0.8) -> float:
    """Of a t of n - 1 degrees of freedom, so that it is beyond its limits this often."""
    limit = float(stats.t.ppf(1 - ALPHA / 2, n - 1))
    low, high = 0.0, 20.0  # n = 3 needs 6.6
    for _ in range(40):
        middle = (low + high) / 2
        law = stats.nct(n - 1, middle)
        low, high = (middle, high) if law.sf(limit) + law.cdf(-limit) < power else (low, middle)
    return high


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
    """Two curves at one level, over the seeds that both have.

    Attributes:
        n: number of these seeds.
        difference: mean of a - b by seed.
        p: of the paired test.
        p_holm: the same, corrected by Holm over the levels.
        p_welch: of Welch's test.
        seen: the least difference that the paired test would find four times of five.
    """

    round: int
    density: float
    n: int
    difference: float
    p: float | None
    p_holm: float | None
    p_welch: float | None
    seen: float | None

    @property
    def stars(self) -> str:
        return stars(self.p)


def compare(a: Sequence[Level], b: Sequence[Level]) -> list[Comparison]:
    """Two curves at each pruned level that both have, by seed; Holm over these levels.

    A curve of one level, that of the dense network, is compared with every level of the other.
    """
    other = {level.round: level for level in b}
    if set(other) == {0}:
        other = {x.round: b[0] for x in a}
    found: list[tuple[Level, list[float], list[float]]] = []
    for x in a:
        y = other.get(x.round)
        if x.round == 0 or y is None:
            continue
        ours, theirs = (dict(zip(z.seeds, z.values, strict=True)) for z in (x, y))
        shared = [seed for seed in x.seeds if seed in theirs]
        if shared:
            found.append((x, [ours[s] for s in shared], [theirs[s] for s in shared]))
    gaps = [[p - q for p, q in zip(ours, theirs, strict=True)] for _, ours, theirs in found]
    p_values = [paired(gap) for gap in gaps]
    return [
        Comparison(
            x.round, x.density, len(gap), mean(gap), p, p_holm, welch(*sides), detectable(gap)
        )
        for (x, *sides), gap, p, p_holm in zip(found, gaps, p_values, holm(p_values), strict=True)
    ]
