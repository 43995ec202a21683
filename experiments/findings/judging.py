"""What rows say to the claims. A claim holds or fails by rows of the profiles that it names; with
others the numbers are shown, and no verdict.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from experiments.findings import compression
from experiments.findings.claim import Changes, Claim
from experiments.findings.claims import CLAIMS
from experiments.findings.densities import NOT_RECORDED, WAYS, chosen
from experiments.findings.predicates import Found, Outcome
from experiments.study.profiles import PROFILES
from experiments.study.runs import rounds_of
from experiments.study.studies import Arm
from experiments.train import heading

Status = Literal["holds", "fails", "too few runs", "not run", "not a deciding profile"]
Row = Mapping[str, Any]
Runs = Mapping[str, Mapping[int, Row]]  # run id -> round -> row
Curves = dict[str, dict[int, dict[int, float]]]  # arm -> seed -> round -> value


@dataclass(frozen=True)
class Verdict:
    """What rows of one profile say to a claim about a network.

    Attributes:
        numbers: why, in words; "" where there is nothing to say.
        ours, difference: the same in short, beside `claim.original`.
        levels: of a claim that is judged level by level: round -> its outcome.
    """

    claim: Claim
    network: str
    profile: str
    status: Status
    numbers: str
    ours: str = ""
    difference: str = ""
    levels: Mapping[int, Outcome] | None = None


def judge(
    rows: Sequence[Row],
    network: str,
    profile: str | None = None,
    study: str | None = None,
) -> list[Verdict]:
    """What the rows say to each claim about a network.

    profile: None: of the profiles that can decide a claim the one that does; the first of them,
        where none does.
    """
    every = [
        claim for claim in CLAIMS if network in claim.networks and study in (None, claim.study)
    ]
    seeds = sorted({row["seed"] for row in rows})
    asked = (profile,) if profile else tuple(PROFILES)
    by_profile = {name: _by_run(rows, network, name) for name in asked}
    found = []
    for claim in every:
        names = (profile,) if profile else tuple(p for p in claim.profiles if p in PROFILES)
        verdicts = [verdict(claim, network, name, by_profile[name], seeds) for name in names]
        decided = [v for v in verdicts if v.status in ("holds", "fails")]
        begun = [v for v in verdicts if v.status != "not run"]
        found.append((decided or begun or verdicts)[0])
    return found


def _by_run(rows: Iterable[Row], network: str, profile: str) -> Runs:
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["network"] == network and row["profile"] == profile:
            found.setdefault(row["run_id"], {})[row["round"]] = row
    return found


def verdict(
    claim: Claim, network: str, profile: str, by_run: Runs, seeds: Sequence[int]
) -> Verdict:
    """What rows of a profile say to one claim."""
    curves = curves_of(claim, network, profile, by_run, seeds)
    count = len(next(iter(curves.values())))
    if count == 0:
        return Verdict(claim, network, profile, "not run", "")
    few = f"{count} of {claim.few} seeds"
    if count < claim.few and count < 2:
        return Verdict(claim, network, profile, "too few runs", few)
    levels = None
    if claim.by_level:
        numbers_there = sorted(
            {r for of in curves.values() for at in of.values() for r in at} - {0}
        )
        levels = {number: claim.test(at_level(curves, number)) for number in numbers_there}
        outcome = all_of(levels, network, by_run)
    else:
        outcome = claim.test(statistics(claim, curves))
    numbers = outcome.numbers
    if claim.best:
        numbers += other_ways(claim, network, profile, by_run, curves)
    status: Status = "holds" if outcome.holds else "fails"
    if profile not in claim.profiles:
        status = "not a deciding profile"
    elif count < claim.few:
        status, numbers = "too few runs", f"{numbers} ({few})"
    return Verdict(
        claim, network, profile, status, numbers, outcome.ours, outcome.difference, levels
    )


# ---- statistics ----------------------------------------------------------------------------------


def curves_of(
    claim: Claim, network: str, profile: str, by_run: Runs, seeds: Sequence[int]
) -> Curves:
    """The statistic of each arm, by seed and round, of the seeds that all arms have all rounds of.

    Of these alone, since seeds differ by more than some arms do: means over other seeds would
    compare networks, not arms.
    """
    curves: Curves = {}
    for name, changes in claim.arms.items():
        arm, column = Arm(tuple(changes.items())), claim.columns.get(name, claim.statistic)
        curves[name] = {}
        for seed in seeds:
            run = arm.run(network, profile, seed)
            wanted = asked(claim, changes, rounds_of(run, max(claim.rounds)))
            its_rows = by_run.get(run.id, {})
            values = {r: value_of(its_rows[r], column) for r in wanted if r in its_rows}
            known = {r: value for r, value in values.items() if value is not None}
            if wanted and len(known) == len(wanted):
                curves[name][seed] = known
    shared = [seed for seed in seeds if all(seed in by_seed for by_seed in curves.values())]
    return {name: {s: by_seed[s] for s in shared} for name, by_seed in curves.items()}


def asked(claim: Claim, changes: Changes, there: Iterable[int]) -> list[int]:
    """The rounds of an arm that a claim reads, of those that its runs have.

    A dense network has round 0 alone, a learned mask round 1.
    """
    there = sorted(there)
    return there if len(there) == 1 else [r for r in claim.rounds if r in there]


def value_of(row: Row, column: str) -> float | None:
    """A column of a row, or what follows from it: "bits", its share of the dense network's bits,
    "heading.pruned" and "heading.kept", the shares that moved towards zero.
    """
    if column == "bits":
        return compression.share(row)
    if column.startswith("heading."):
        counts = row.get("heading")
        return None if counts is None else heading.share(counts, column.partition(".")[2])
    return row.get(column)


def statistics(claim: Claim, curves: Curves) -> Found:
    """One number per arm and seed: the mean over the rounds; of a `best` claim the highest."""
    one = max if claim.best else fmean
    return {
        name: {seed: one(values.values()) for seed, values in by_seed.items()}
        for name, by_seed in curves.items()
    }


def at_level(curves: Curves, number: int) -> Found:
    """The arms at one round; an arm of one round, the dense network, at that."""
    return {
        name: {
            seed: values[number] if len(values) > 1 else next(iter(values.values()))
            for seed, values in by_seed.items()
        }
        for name, by_seed in curves.items()
    }


# ---- words ---------------------------------------------------------------------------------------


def all_of(levels: Mapping[int, Outcome], network: str, by_run: Runs) -> Outcome:
    """A claim of levels holds if it holds at each of them."""

    def kept(number: int) -> str:
        found = next(rows[number]["density"] for rows in by_run.values() if number in rows)
        return f"{found:.1%} kept"

    bad = {number: outcome for number, outcome in levels.items() if not outcome.holds}
    good = [number for number in levels if number not in bad]
    told = [f"round {number} ({kept(number)}): {bad[number].difference}" for number in bad]
    no_loss = f"at rounds {', '.join(map(str, good))}" if good else "at no round"
    if good and not bad:
        no_loss = f"at each of rounds {good[0]} to {good[-1]}"
    numbers = f"holds {no_loss}" + (f"; fails at {'; '.join(told)}" if told else "")
    worst = min(levels.values(), key=lambda outcome: outcome.gap)
    ours = f"holds at {len(good)} of {len(levels)} levels"
    return Outcome(not bad, numbers, ours, f"at worst {worst.difference}", worst.gap)


def other_ways(claim: Claim, network: str, profile: str, by_run: Runs, curves: Curves) -> str:
    """The other two statistics of untrained masks beside the one that judges (`densities`)."""
    told = ""
    for way in ("mean", "validation"):
        numbers = []
        for name, changes in claim.arms.items():
            if len(next(iter(curves[name].values()))) == 1:
                continue
            arm = Arm(tuple(changes.items()))
            rows = [
                by_run[arm.run(network, profile, seed).id][number]
                for seed, values in curves[name].items()
                for number in values
            ]
            found = chosen(rows, way)
            numbers.append(f"{name} {found.mean:.2%}" if found else NOT_RECORDED)
        told += f"; {WAYS[way]}: {', '.join(dict.fromkeys(numbers))}"
    return told
