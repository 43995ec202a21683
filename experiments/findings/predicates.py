"""What decides a claim: tests of the statistic of its arms. Pure functions.

A test takes what was found, name of an arm -> seed -> its statistic, of the same seeds in all arms,
and says whether the claim holds, and why in numbers. Arms are compared by seed: runs of a seed
start from the same weights. Statistics are shares (accuracies, densities) but in the tests of the
last section, where they are iterations.
"""

from collections.abc import Callable
from functools import wraps
from statistics import fmean
from typing import Concatenate, NamedTuple, ParamSpec

from experiments.findings.statistics import ALPHA, detectable, paired, welch

INF = float("inf")

Found = dict[str, dict[int, float]]  # name of an arm -> seed -> its statistic


class Outcome(NamedTuple):
    """Whether a claim holds; why, in a sentence; what was found and how far it is, in short.

    gap: of two arms, what the first is above the second; where levels are compared.
    """

    holds: bool
    numbers: str
    ours: str
    difference: str
    gap: float = 0.0


Test = Callable[[Found], Outcome]
P = ParamSpec("P")


def predicate(decide: Callable[Concatenate[Found, P], Outcome]) -> Callable[P, Test]:
    """What makes tests: called without what was found, the function waits for it."""

    @wraps(decide)
    def make(*args: P.args, **kwargs: P.kwargs) -> Test:
        return lambda found: decide(found, *args, **kwargs)

    return make


@predicate
def beats(found: Found, a: str, b: str, least: float = -INF) -> Outcome:
    """Arm a is above arm b, significantly, and at `least` or above."""
    gap, p = _gap(found, a, b), _p(found, a, b)
    return Outcome(
        gap > 0 and p is not None and p < ALPHA and _mean(found, a) >= least,
        f"{_said(found, a)} against {_said(found, b)}, {_tested(found, a, b)}"
        + (f", at least {least:.0%} wanted" if least > -INF else ""),
        f"{_mean(found, a):.2%} against {_mean(found, b):.2%}",
        f"{_points(gap)}, {_p_said(p)}{_power(found, a, b)}",
    )


@predicate
def either_side(found: Found, a: str, middle: str, b: str) -> Outcome:
    """Arm a is above the arm in the middle, arm b below it, both significantly."""
    first, second = beats(a, middle)(found), beats(middle, b)(found)
    return Outcome(
        first.holds and second.holds,
        f"{first.numbers}; {second.numbers}",
        f"{_mean(found, a):.2%}, {_mean(found, middle):.2%}, {_mean(found, b):.2%}",
        f"above by {first.difference}; below by {second.difference}",
    )


@predicate
def no_worse(found: Found, a: str, b: str, by: float) -> Outcome:
    """Arm a is at most `by` below arm b."""
    gap = _gap(found, a, b)
    return Outcome(
        gap >= -by,
        f"{_said(found, a)} against {_said(found, b)}: {_points(gap)}, at least "
        f"{_points(-by)} wanted",
        f"{_mean(found, a):.2%} against {_mean(found, b):.2%}",
        f"{_points(gap)}{_power(found, a, b)}",
    )


@predicate
def no_drop(found: Found, a: str, b: str, by: float) -> Outcome:
    """Arm a is neither significantly below arm b nor by more than `by`."""
    gap, p = _gap(found, a, b), _p(found, a, b)
    lost = gap < 0 and p is not None and p < ALPHA
    return Outcome(
        gap >= -by and not lost,
        f"{_said(found, a)} against {_said(found, b)}: {_points(gap)}, {_tested(found, a, b)}",
        f"{_mean(found, a):.2%} against {_mean(found, b):.2%}",
        f"{_points(gap)}, {_p_said(p)}{_power(found, a, b)}",
        gap,
    )


@predicate
def near(found: Found, a: str, value: float, within: float) -> Outcome:
    """Arm a lies at a value that was published."""
    mean = _mean(found, a)
    return Outcome(
        abs(mean - value) <= within,
        f"{_said(found, a)}, {value:.1%} ± {within:.1%} wanted",
        f"{mean:.2%}",
        _points(mean - value),
    )


@predicate
def between(found: Found, low: float, high: float) -> Outcome:
    """Every arm lies in a range."""
    means = {arm: _mean(found, arm) for arm in found}
    least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    return Outcome(
        low <= means[least] and means[most] <= high,
        f"from {_said(found, least)} to {_said(found, most)}, {low:.1%} to {high:.1%} wanted",
        f"{means[least]:.2%} to {means[most]:.2%}",
        f"{_points(means[least] - low)} and {_points(means[most] - high)} from the ends",
    )


@predicate
def apart(found: Found, a: str, most: float, b: str, least: float) -> Outcome:
    """Arm a is at one value or below, arm b at another or above."""
    low, high = _mean(found, a), _mean(found, b)
    return Outcome(
        low <= most and high >= least,
        f"{_said(found, a)}, at most {most:.0%} wanted; {_said(found, b)}, at least {least:.0%}",
        f"{low:.1%} and {high:.1%}",
        f"{_points(low - most)} and {_points(high - least)}",
    )


@predicate
def fallen(
    found: Found, a: str, top: str, bottom: str, least: float = -INF, most: float = INF
) -> Outcome:
    """Of the way from arm `top` down to arm `bottom`, arm a has gone a share in [least, most].

    The share is negative where arm a is above `top`, and over 1 where it is below `bottom`.
    """
    upper, lower = _mean(found, top), _mean(found, bottom)
    share = (upper - _mean(found, a)) / (upper - lower) if upper > lower else 0.0
    wanted = f"at least {least:.0%}" if most == INF else f"at most {most:.0%}"
    return Outcome(
        upper > lower and least <= share <= most,
        f"{_said(found, a)}: {share:.0%} of the way from {_said(found, top)} to "
        f"{_said(found, bottom)}, {wanted} wanted",
        f"{_mean(found, a):.2%}, {share:.0%} of the way",
        f"{_points(_gap(found, a, top))} from {top}, "
        f"{_points(_gap(found, a, bottom))} from {bottom}",
    )


@predicate
def compressed(found: Found, a: str, dense: str, bits: str, by: float, share: float) -> Outcome:
    """Arm a is at most `by` below the dense one, of at most a share of its bits (arm `bits`)."""
    first, size = no_worse(a, dense, by)(found), _mean(found, bits)
    return Outcome(
        first.holds and size <= share,
        f"{first.numbers}; {size:.2%} of the bits, at most {share:.2%} wanted",
        f"{first.ours}, {size:.2%} of the bits",
        first.difference,
    )


# ---- of iterations -------------------------------------------------------------------------------


@predicate
def sooner(found: Found, a: str, b: str, times: float) -> Outcome:
    """Arm a needs fewer iterations than arm b, significantly, and half the published lead is there.

    times: what b needs as a multiple of what a does, as published.
    """
    least = 1 + (times - 1) / 2
    ratio, p = _mean(found, b) / _mean(found, a), _p(found, a, b)
    return Outcome(
        ratio >= least and p is not None and p < ALPHA,
        f"{_counted(found, a)} against {_counted(found, b)}: {ratio:.2f}x, "
        f"{_tested(found, a, b)}; at least {least:.2f}x wanted",
        f"{ratio:.2f} times",
        f"{ratio - times:+.2f} times, {_p_said(p)}",
    )


@predicate
def as_soon(found: Found, a: str, b: str, within: float) -> Outcome:
    """Arm a needs as many iterations as arm b, a share `within` more or fewer at most."""
    ratio = _mean(found, a) / _mean(found, b)
    return Outcome(
        abs(ratio - 1) <= within,
        f"{_counted(found, a)} against {_counted(found, b)}: {ratio - 1:+.0%}, "
        f"± {within:.0%} wanted",
        f"{ratio:.2f} times as many iterations",
        f"{ratio - 1:+.0%}",
    )


# ---- numbers -------------------------------------------------------------------------------------


def _mean(found: Found, arm: str) -> float:
    return fmean(found[arm].values())


def _differences(found: Found, a: str, b: str) -> list[float]:
    return [found[a][seed] - found[b][seed] for seed in found[a]]


def _gap(found: Found, a: str, b: str) -> float:
    return fmean(_differences(found, a, b))


def _p(found: Found, a: str, b: str) -> float | None:
    return paired(_differences(found, a, b))


def _said(found: Found, arm: str) -> str:
    return f"{arm} {_mean(found, arm):.2%} ({len(found[arm])} seeds)"


def _counted(found: Found, arm: str) -> str:
    return f"{arm} {_mean(found, arm):,.0f} iterations ({len(found[arm])} seeds)"


def _points(gap: float) -> str:
    return f"{100 * gap:+.2f} points"


def _p_said(p: float | None) -> str:
    if p is None:
        return "no test"
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def _tested(found: Found, a: str, b: str) -> str:
    """The paired p, which decides, and Welch's."""
    p, means_alone = _p(found, a, b), welch(list(found[a].values()), list(found[b].values()))
    return _p_said(p) if p is None else f"{_p_said(p)} (Welch: {means_alone:.2g})"


def _power(found: Found, a: str, b: str) -> str:
    """The difference that the test would find, where it found none."""
    p, seen = _p(found, a, b), detectable(_differences(found, a, b))
    if p is None or seen is None or p < ALPHA:
        return ""
    return f" (this test sees ±{100 * seen:.2f})"
