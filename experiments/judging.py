"""What rows say to the claims. A claim holds or fails by rows of the "paper" profile alone; with
other profiles the numbers are shown, and no verdict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from experiments.claims import CLAIMS, DENSE_ARM, Changes, Claim
from experiments.predicates import Found
from experiments.studies import Arm

Status = Literal["holds", "fails", "too few runs", "not run", "not the paper profile"]
Row = Mapping[str, Any]
Runs = Mapping[str, Mapping[int, Row]]  # run id -> round -> row


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    network: str
    status: Status
    numbers: str


def judge(
    rows: Sequence[Row], network: str, profile: str, study: str | None = None
) -> list[Verdict]:
    """What the rows say to each claim about a network."""
    by_run: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["network"] == network and row["profile"] == profile:
            by_run.setdefault(row["run_id"], {})[row["round"]] = row
    seeds = sorted({row["seed"] for row in rows})
    return [
        verdict(claim, network, profile, by_run, seeds)
        for claim in CLAIMS
        if network in claim.networks and study in (None, claim.study)
    ]


def verdict(
    claim: Claim, network: str, profile: str, by_run: Runs, seeds: Sequence[int]
) -> Verdict:
    """What rows say to one claim."""
    found = statistics(claim, network, profile, by_run, seeds)
    count = min(map(len, found.values()))
    if count == 0:
        return Verdict(claim, network, "not run", "")
    if count < claim.few and count < 2:
        return Verdict(claim, network, "too few runs", f"{count} of {claim.few} seeds")
    holds, numbers = claim.test(found)
    if profile != "paper":
        return Verdict(claim, network, "not the paper profile", numbers)
    if count < claim.few:
        return Verdict(claim, network, "too few runs", f"{numbers} ({count} of {claim.few} seeds)")
    return Verdict(claim, network, "holds" if holds else "fails", numbers)


def statistics(
    claim: Claim, network: str, profile: str, by_run: Runs, seeds: Sequence[int]
) -> Found:
    """The statistic of each arm, by seed, of the seeds that all arms have all rounds of.

    Of these alone, since seeds differ by more than some arms do: means over other seeds would
    compare networks, not arms.
    """
    curves: dict[str, dict[int, dict[int, float]]] = {}  # arm -> seed -> round -> value
    for name, changes in claim.arms.items():
        rounds, arm = rounds_of(claim, changes), Arm(tuple(changes.items()))
        curves[name] = {}
        for seed in seeds:
            its_rows = by_run.get(arm.run(network, profile, seed).id, {})
            values = {r: its_rows[r].get(claim.statistic) for r in rounds if r in its_rows}
            if len(values) == len(rounds) and None not in values.values():
                curves[name][seed] = values
    shared = [seed for seed in seeds if all(seed in by_seed for by_seed in curves.values())]
    found: Found = {}
    for name, changes in claim.arms.items():
        rounds = rounds_of(claim, changes)
        of = curves[name]
        if claim.best and shared:
            rounds = (max(rounds, key=lambda r: fmean(of[seed][r] for seed in shared)),)
        found[name] = {seed: fmean(of[seed][number] for number in rounds) for seed in shared}
    return found


def rounds_of(claim: Claim, changes: Changes) -> Sequence[int]:
    """The claim's; a dense network has round 0 alone, a learned mask round 1."""
    if changes == DENSE_ARM:
        return (0,)
    return (1,) if changes.get("schedule") == "learned" else claim.rounds
