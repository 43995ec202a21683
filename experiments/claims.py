"""The paper's claims as predicates: which statistic, over which rounds, against which threshold.

Committed before the runs that judge them. A claim holds or fails by rows of the "paper" profile
alone; with other profiles the numbers are shown, and no verdict.

The statistic of an arm is `test_accuracy` averaged over the rounds that the claim names, one number
per seed. A comparison "beats" is settled by Welch's two-sided t-test at p = 0.05.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from experiments import studies
from experiments.runs import DENSE, Run
from experiments.statistics import welch

P = 0.05
FEW = 3  # seeds, below which nothing is judged
CHANCE = 0.10

Status = Literal["holds", "fails", "too few runs", "not run", "not the paper profile"]
Row = Mapping[str, Any]
Changes = Mapping[str, Any]  # what an arm's runs change of the defaults of Run
Found = dict[str, dict[int, float]]  # name of an arm -> seed -> its statistic


@dataclass(frozen=True)
class Claim:
    """A statement, and how rows decide it.

    Attributes:
        arms: name -> the runs compared.
        rounds: over which the accuracy is averaged; for a `best` claim, those it is sought in.
        test: from the statistic of each arm by seed, whether the claim holds, and why in numbers.
        few: seeds of each arm that a verdict needs.
        best: the statistic is the accuracy in the one round where the mean over seeds is highest.
    """

    study: str
    text: str
    networks: tuple[str, ...]
    arms: Mapping[str, Changes]
    rounds: Sequence[int]
    test: Callable[[Found], tuple[bool, str]]
    few: int = FEW
    best: bool = False


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    network: str
    status: Status
    numbers: str


# ---- tests ---------------------------------------------------------------------------------------


def beats(a: str, b: str) -> Callable[[Found], tuple[bool, str]]:
    """Arm a is above arm b, significantly."""

    def test(found: Found) -> tuple[bool, str]:
        first, second = _values(found, a), _values(found, b)
        p = welch(first, second)
        up = fmean(first) > fmean(second) and p is not None and p < P
        return up, f"{_said(found, a)} against {_said(found, b)}, p = {_p(p)}"

    return test


def no_worse(a: str, b: str, by: float) -> Callable[[Found], tuple[bool, str]]:
    """Arm a is at most `by` below arm b."""

    def test(found: Found) -> tuple[bool, str]:
        gap = fmean(_values(found, a)) - fmean(_values(found, b))
        return gap >= -by, (
            f"{_said(found, a)} against {_said(found, b)}: {gap:+.2%}, at least {-by:.2%} wanted"
        )

    return test


def near(a: str, value: float, within: float) -> Callable[[Found], tuple[bool, str]]:
    """Arm a lies at a value that was published."""

    def test(found: Found) -> tuple[bool, str]:
        mean = fmean(_values(found, a))
        return abs(mean - value) <= within, f"{_said(found, a)}, {value:.1%} ± {within:.1%} wanted"

    return test


def fallen(
    a: str, top: str, bottom: str, least: float = 0.0, most: float = float("inf")
) -> Callable[[Found], tuple[bool, str]]:
    """Of the way from arm `top` down to arm `bottom`, arm a has gone a share in [least, most]."""

    def test(found: Found) -> tuple[bool, str]:
        upper, lower = (fmean(_values(found, name)) for name in (top, bottom))
        share = (upper - fmean(_values(found, a))) / (upper - lower) if upper > lower else 0.0
        wanted = f"at least {least:.0%}" if most == float("inf") else f"at most {most:.0%}"
        return upper > lower and least <= share <= most, (
            f"{_said(found, a)}: {share:.0%} of the way from {_said(found, top)} to "
            f"{_said(found, bottom)}, {wanted} wanted"
        )

    return test


def _values(found: Found, arm: str) -> list[float]:
    return list(found[arm].values())


def _said(found: Found, arm: str) -> str:
    values = _values(found, arm)
    return f"{arm} {fmean(values):.2%} ({len(values)} seeds)"


def _p(p: float | None) -> str:
    return "none" if p is None else f"{p:.2g}"


# ---- the claims ----------------------------------------------------------------------------------

TICKET: Changes = {}
DENSE_ARM: Changes = {"criterion": DENSE}
RANDOM: Changes = {"criterion": "random"}
UNTRAINED, LEARNED = studies.UNTRAINED, studies.LEARNED
FEW_PRUNED = range(4, 11)  # FC: 41% to 10.8% of the weights are left, sparsities of 59% to 89%
MANY_PRUNED = range(14, 21)  # FC: 4.5% to 1.2%
BETWEEN = range(8, 17)  # FC: 16.9% to 2.9%
CURVE = range(1, 21)
ABOVE_RANDOM = ("large_final", "magnitude_increase", "movement", "large_init_large_final")
BELOW_RANDOM = ("small_final", "small_init_small_final")

CLAIMS: tuple[Claim, ...] = (
    *(
        Claim(
            "first-bars",
            "an untrained network is at chance, " + words,
            studies.ALL,
            {"untrained": {**UNTRAINED, "criterion": "random"}},
            rounds,
            near("untrained", CHANCE, 0.05),
        )
        for words, rounds in (("unmasked", (0,)), ("under a random mask", CURVE))
    ),
    Claim(
        "mask-criteria",
        "tickets of 59% to 89% sparsity beat the dense network",
        studies.ALL,
        {"ticket": TICKET, "dense": DENSE_ARM},
        FEW_PRUNED,
        beats("ticket", "dense"),
    ),
    Claim(
        "mask-criteria",
        "tickets of 95% sparsity and more lose nothing (0.5 points at most)",
        studies.ALL,
        {"ticket": TICKET, "dense": DENSE_ARM},
        MANY_PRUNED,
        no_worse("ticket", "dense", by=0.005),
    ),
    *(
        Claim(
            "mask-criteria",
            f"{name} beats random",
            studies.ALL,
            {name: {"criterion": name}, "random": RANDOM},
            BETWEEN,
            beats(name, "random"),
        )
        for name in ABOVE_RANDOM
    ),
    *(
        Claim(
            "mask-criteria",
            f"{name} is below random",
            studies.ALL,
            {name: {"criterion": name}, "random": RANDOM},
            BETWEEN,
            beats("random", name),
        )
        for name in BELOW_RANDOM
    ),
    Claim(
        "mask-criteria",
        "magnitude_increase is at least level with large_final (0.2 points at most below)",
        ("conv4",),
        {"magnitude_increase": {"criterion": "magnitude_increase"}, "large_final": TICKET},
        BETWEEN,
        no_worse("magnitude_increase", "large_final", by=0.002),
    ),
    *(
        Claim(
            "mask-1",
            f"{name}, without the sign, falls to about random pruning",
            studies.ALL,
            {name: {"mask1": name}, "rewind": TICKET, "random": RANDOM},
            BETWEEN,
            fallen(name, "rewind", "random", least=0.5),
        )
        for name in studies.MASK1
    ),
    *(
        Claim(
            "mask-1",
            f"{name}, with the sign, matches rewinding",
            studies.ALL,
            {name: {"mask1": name}, "rewind": TICKET, "random": RANDOM},
            BETWEEN,
            fallen(name, "rewind", "random", most=0.25),
        )
        for name in studies.SIGNED_MASK1
    ),
    Claim(
        "mask-0",
        "pruned weights at their initial values are worse than at zero",
        studies.ALL,
        {"zero": TICKET, "freeze_init": {"mask0": "freeze_init"}},
        BETWEEN,
        beats("zero", "freeze_init"),
    ),
    Claim(
        "mask-0",
        "Variant 1 is as good as zero at high sparsity, or better (0.2 points at most below)",
        studies.ALL,
        {"zero": TICKET, "Variant 1": {"mask0": studies.VARIANT_1}},
        MANY_PRUNED,
        no_worse("Variant 1", "zero", by=0.002),
    ),
    Claim(
        "mask-0",
        "Variant 2 is as good as Variant 1 at high sparsity, or better (0.2 points at most below)",
        studies.ALL,
        {"Variant 2": {"mask0": studies.VARIANT_2}, "Variant 1": {"mask0": studies.VARIANT_1}},
        MANY_PRUNED,
        no_worse("Variant 2", "Variant 1", by=0.002),
    ),
    *(
        Claim(
            "supermasks",
            f"{criterion} on untrained {weights} weights reaches about {value:.0%}",
            (network,),
            {criterion: {**UNTRAINED, "criterion": criterion, "weights": weights}},
            CURVE,
            near(criterion, value, within),
            best=True,
        )
        for network, criterion, weights, value, within in (
            ("fc", "large_final", "init", 0.40, 0.10),
            ("fc", "large_final_same_sign", "init", 0.80, 0.05),
            ("conv4", "large_final_same_sign", "init", 0.24, 0.05),
            ("fc", "large_final_same_sign", "signed_constant", 0.86, 0.05),
            ("conv4", "large_final_same_sign", "signed_constant", 0.41, 0.05),
        )
    ),
    *(
        Claim(
            "learned",
            f"a mask learned on the initial weights, not rescaled, reaches about {value:.0%}",
            (network,),
            {"learned": {**LEARNED, "weights": "init"}},
            (1,),
            near("learned", value, within),
            few=2,
        )
        for network, value, within in (("fc", 0.953, 0.02), ("conv4", 0.654, 0.03))
    ),
    *(
        Claim(
            "learned",
            f"learned masks on {weights} weights are better with rescaling",
            studies.ALL,
            {
                "rescaled": {**LEARNED, "weights": weights, "rescale": True},
                "not rescaled": {**LEARNED, "weights": weights},
            },
            (1,),
            beats("rescaled", "not rescaled"),
        )
        for weights in studies.WEIGHTS
    ),
)


# ---- judging -------------------------------------------------------------------------------------


def judge(
    rows: Sequence[Row], network: str, profile: str, study: str | None = None
) -> list[Verdict]:
    """What the rows say to each claim about a network."""
    by_run: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["network"] == network and row["profile"] == profile:
            by_run.setdefault(row["run_id"], {})[row["round"]] = row["test_accuracy"]
    seeds = sorted({row["seed"] for row in rows})
    return [
        _verdict(claim, network, profile, by_run, seeds)
        for claim in CLAIMS
        if network in claim.networks and study in (None, claim.study)
    ]


def _verdict(
    claim: Claim,
    network: str,
    profile: str,
    by_run: Mapping[str, Mapping[int, float]],
    seeds: Sequence[int],
) -> Verdict:
    found: Found = {}
    for name, changes in claim.arms.items():
        rounds = (0,) if changes == DENSE_ARM else claim.rounds
        curves = {}
        for seed in seeds:
            run = Run(network=network, profile=profile, seed=seed, **changes)
            curve = by_run.get(run.id, {})
            if all(number in curve for number in rounds):
                curves[seed] = curve
        if claim.best and curves:
            rounds = (max(rounds, key=lambda r: fmean(curve[r] for curve in curves.values())),)
        found[name] = {
            seed: fmean(curve[number] for number in rounds) for seed, curve in curves.items()
        }
    least = min(map(len, found.values()))
    if least == 0:
        return Verdict(claim, network, "not run", "")
    if least < claim.few and least < 2:
        return Verdict(claim, network, "too few runs", f"{least} of {claim.few} seeds")
    holds, numbers = claim.test(found)
    if profile != "paper":
        return Verdict(claim, network, "not the paper profile", numbers)
    if least < claim.few:
        return Verdict(claim, network, "too few runs", f"{numbers} ({least} of {claim.few} seeds)")
    return Verdict(claim, network, "holds" if holds else "fails", numbers)
