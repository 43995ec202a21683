"""A claim as data: which statistic, over which rounds, against which threshold; its usual arms.

The statistic of an arm is one number per seed: a column of its rows, averaged over the rounds that
the claim names. A profile decides a claim only if the claim names it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.findings.predicates import Test
from experiments.study import studies
from experiments.study.runs import DENSE

FEW = 3  # seeds, below which nothing is judged
PAPER = ("paper",)
# `coarse` trains every fourth round, and stops where the validation loss has: it decides what is
# read from retrained tickets' accuracies, and from full-length dense networks.
DECIDING = ("paper", "coarse")

Changes = Mapping[str, Any]  # what an arm's runs change of the defaults of Run, as in studies.Arm


@dataclass(frozen=True)
class Claim:
    """A statement, and how rows decide it.

    Attributes:
        arms: name -> the runs compared.
        rounds: over which the statistic is averaged; for a `best` claim, those it is sought in.
            A dense network has round 0 alone, a learned mask round 1.
        test: from the statistic of each arm by seed, whether the claim holds, and why in numbers.
        few: seeds that a verdict needs.
        best: the statistic is that of each run's best round, as the published numbers of untrained
            networks are; the verdict's numbers say the other two ways, too (`densities`).
        statistic: the column of the rows, see `judging.value_of`.
        columns: name of an arm -> its column, where arms are read by different ones.
        by_level: the test is asked of each round alone, and has to hold at all of them.
        profiles: those whose rows can decide it, the first that has the seeds before the others.
        original: what the article found, in short.
    """

    study: str
    text: str
    networks: tuple[str, ...]
    arms: Mapping[str, Changes]
    rounds: Sequence[int]
    test: Test
    few: int = FEW
    best: bool = False
    statistic: str = "test_accuracy"
    columns: Mapping[str, str] = field(default_factory=dict)
    by_level: bool = False
    profiles: tuple[str, ...] = DECIDING
    original: str = ""


def of(
    study: str, networks: Sequence[str], rounds: Sequence[int], **common: Any
) -> Callable[..., Claim]:
    """What makes claims of a study with these in common: (text, arms, test, original, ...)."""

    def claim(
        text: str, arms: Mapping[str, Changes], test: Test, original: str, **own: Any
    ) -> Claim:
        fields = {"networks": tuple(networks), "rounds": rounds, **common, **own}
        return Claim(study, text, arms=arms, test=test, original=original, **fields)

    return claim


def each(field: str, *values: Any, **others: Any) -> dict[str, Changes]:
    """Arms named after the values of one field of `Run`, which share the others."""
    return {str(value): {**others, field: value} for value in values}


# ---- arms and rounds -----------------------------------------------------------------------------

TICKET: Changes = {}
DENSE_ARM: Changes = {"criterion": DENSE}
RANDOM: Changes = {"criterion": "random"}
UNTRAINED, LEARNED = studies.UNTRAINED, studies.LEARNED
FEW_PRUNED = range(4, 11)  # FC: 41% to 10.8% of the weights are left, sparsities of 59% to 89%
MANY_PRUNED = range(14, 21)  # FC: 4.5% to 1.2%
MOST_PRUNED = range(21, 25)  # FC: 1.0% to 0.5%, where the paper's scripts end
FIRST_PRUNED = range(1, 5)  # FC: 80% to 41%
BETWEEN = range(8, 17)  # FC: 16.9% to 2.9%
CURVE = range(1, 21)
ABOVE_RANDOM = ("large_final", "magnitude_increase", "movement", "large_init_large_final")
BELOW_RANDOM = ("small_final", "small_init_small_final")
PAIRS = (
    ("large_final", "small_final"),
    ("large_init", "small_init"),
    ("large_init_large_final", "small_init_small_final"),
)
# The round of each network that Frankle & Carbin name, and how many times as many iterations as its
# ticket the dense network needs there. Their 38% earlier is 1 / (1 - 0.38) times.
SOONER = (
    ("fc", 7, "21%", 1.61),
    ("conv2", 11, "8.8%", 3.5),
    ("conv4", 12, "9.2%", 3.5),
    ("conv6", 10, "15%", 2.5),
)
ITERATION = "early_stop_iteration"
