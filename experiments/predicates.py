"""What decides a claim: tests of the statistic of its arms. Pure functions.

A test takes what was found, name of an arm -> seed -> its statistic, and says whether the claim
holds, and why in numbers. Statistics are shares (accuracies, densities) but in the tests of the
last section, where they are iterations.
"""

from collections.abc import Callable
from statistics import fmean

from experiments.statistics import welch

P = 0.05
INF = float("inf")

Found = dict[str, dict[int, float]]  # name of an arm -> seed -> its statistic
Test = Callable[[Found], tuple[bool, str]]


def beats(a: str, b: str) -> Test:
    """Arm a is above arm b, significantly."""

    def test(found: Found) -> tuple[bool, str]:
        first, second = _values(found, a), _values(found, b)
        p = welch(first, second)
        up = fmean(first) > fmean(second) and p is not None and p < P
        return up, f"{_said(found, a)} against {_said(found, b)}, {_p(p)}"

    return test


def no_worse(a: str, b: str, by: float) -> Test:
    """Arm a is at most `by` below arm b."""

    def test(found: Found) -> tuple[bool, str]:
        gap = fmean(_values(found, a)) - fmean(_values(found, b))
        return gap >= -by, (
            f"{_said(found, a)} against {_said(found, b)}: {gap:+.2%}, at least {-by:.2%} wanted"
        )

    return test


def near(a: str, value: float, within: float) -> Test:
    """Arm a lies at a value that was published."""

    def test(found: Found) -> tuple[bool, str]:
        mean = fmean(_values(found, a))
        return abs(mean - value) <= within, f"{_said(found, a)}, {value:.1%} ± {within:.1%} wanted"

    return test


def between(low: float, high: float) -> Test:
    """Every arm lies in a range."""

    def test(found: Found) -> tuple[bool, str]:
        means = {arm: fmean(_values(found, arm)) for arm in found}
        least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        return low <= means[least] and means[most] <= high, (
            f"from {_said(found, least)} to {_said(found, most)}, {low:.1%} to {high:.1%} wanted"
        )

    return test


def apart(a: str, most: float, b: str, least: float) -> Test:
    """Arm a is at one value or below, arm b at another or above."""

    def test(found: Found) -> tuple[bool, str]:
        low, high = fmean(_values(found, a)), fmean(_values(found, b))
        return low <= most and high >= least, (
            f"{_said(found, a)}, at most {most:.0%} wanted; {_said(found, b)}, at least {least:.0%}"
        )

    return test


def fallen(a: str, top: str, bottom: str, least: float = -INF, most: float = INF) -> Test:
    """Of the way from arm `top` down to arm `bottom`, arm a has gone a share in [least, most].

    The share is negative where arm a is above `top`, and over 1 where it is below `bottom`.
    """

    def test(found: Found) -> tuple[bool, str]:
        upper, lower = (fmean(_values(found, name)) for name in (top, bottom))
        share = (upper - fmean(_values(found, a))) / (upper - lower) if upper > lower else 0.0
        wanted = f"at least {least:.0%}" if most == INF else f"at most {most:.0%}"
        return upper > lower and least <= share <= most, (
            f"{_said(found, a)}: {share:.0%} of the way from {_said(found, top)} to "
            f"{_said(found, bottom)}, {wanted} wanted"
        )

    return test


# ---- of iterations -------------------------------------------------------------------------------


def sooner(a: str, b: str, times: float) -> Test:
    """Arm a needs fewer iterations than arm b, significantly, and half the published lead is there.

    times: what b needs as a multiple of what a does, as published.
    """
    least = 1 + (times - 1) / 2

    def test(found: Found) -> tuple[bool, str]:
        first, second = _values(found, a), _values(found, b)
        ratio, p = fmean(second) / fmean(first), welch(first, second)
        return ratio >= least and p is not None and p < P, (
            f"{_counted(found, a)} against {_counted(found, b)}: {ratio:.2f}x, {_p(p)}; at "
            f"least {least:.2f}x wanted"
        )

    return test


def as_soon(a: str, b: str, within: float) -> Test:
    """Arm a needs as many iterations as arm b, a share `within` more or fewer at most."""

    def test(found: Found) -> tuple[bool, str]:
        ratio = fmean(_values(found, a)) / fmean(_values(found, b))
        return abs(ratio - 1) <= within, (
            f"{_counted(found, a)} against {_counted(found, b)}: {ratio - 1:+.0%}, "
            f"± {within:.0%} wanted"
        )

    return test


# ---- numbers -------------------------------------------------------------------------------------


def _values(found: Found, arm: str) -> list[float]:
    return list(found[arm].values())


def _said(found: Found, arm: str) -> str:
    values = _values(found, arm)
    return f"{arm} {fmean(values):.2%} ({len(values)} seeds)"


def _counted(found: Found, arm: str) -> str:
    values = _values(found, arm)
    return f"{arm} {fmean(values):,.0f} iterations ({len(values)} seeds)"


def _p(p: float | None) -> str:
    return "no test" if p is None else f"p = {p:.2g}"
