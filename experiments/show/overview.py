"""What a report says of all studies together: counts, claims, deviations, costs, power.

Pure functions of verdicts, selections and records.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from experiments.findings import words
from experiments.findings.judging import Verdict
from experiments.findings.selection import ACCURACY, Row, Selection
from experiments.findings.statistics import detectable, mean, paired
from experiments.findings.tables import Table, p_value
from experiments.study.runs import Run
from experiments.study.studies import Arm

STATUSES = {  # of a verdict -> in a count of them
    "holds": "hold",
    "fails": "fail",
    "too few runs": "have too few runs",
    "not run": "are not run",
    "not a deciding profile": "are not judged",
}
Record = Mapping[str, Any]


def sentence(verdicts: Sequence[Verdict]) -> str:
    """What came out, in one sentence: "Of 146 claims 28 hold, 3 fail, ... ."."""
    counts = Counter(verdict.status for verdict in verdicts)
    told = [f"{counts[status]} {verb}" for status, verb in STATUSES.items() if counts[status]]
    listed = ", ".join(told[:-1]) + (" and " if len(told) > 1 else "") + "".join(told[-1:])
    return f"Of {len(verdicts)} claims {listed}."


def by_network(verdicts: Sequence[Verdict]) -> Table:
    """Networks down, counts of verdicts across, and the profiles that decided."""
    statuses = [status for status in STATUSES if any(v.status == status for v in verdicts)]
    lines = []
    for network in dict.fromkeys(verdict.network for verdict in verdicts):
        mine = [verdict for verdict in verdicts if verdict.network == network]
        counts = Counter(verdict.status for verdict in mine)
        by = sorted({v.profile for v in mine if v.status in ("holds", "fails")}, reverse=True)
        lines.append(
            (words.network(network), *(counts[status] for status in statuses), ", ".join(by))
        )
    return Table(("network", *statuses, "decided by profile"), tuple(lines), "Claims by network")


def claims_markdown(verdicts: Iterable[Verdict]) -> Table:
    """Every claim with its numbers, for results/claims.md."""
    lines = tuple(
        (
            verdict.claim.study,
            verdict.network,
            verdict.claim.text,
            verdict.claim.original,
            verdict.ours,
            verdict.difference,
            verdict.status,
            "" if verdict.status == "not run" else verdict.profile,
            verdict.numbers,
        )
        for verdict in verdicts
    )
    columns = (
        "study", "network", "claim", "original", "ours", "difference", "verdict", "by profile",
        "numbers",
    )  # fmt: skip
    return Table(columns, lines)


# ---- deviations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deviation:
    """A choice that differs from the paper's protocol or the authors' code.

    Attributes:
        theirs, ours: changes of `Run` of the two sides that measure it; None: nothing does.
        profiles: of the two sides, where they are of different ones.
        why: what is known besides.
    """

    choice: str
    network: str = "fc"
    theirs: Mapping[str, Any] | None = None
    ours: Mapping[str, Any] | None = None
    profiles: tuple[str, str] = ("paper", "paper")
    why: str = ""


DEVIATIONS = (
    Deviation(
        "mask-1 actions start from the dense run's weights every round (the authors' code: from "
        "the last round's, so that they compound)",
        theirs={"mask1": "reinit", "compounding": True},
        ours={"mask1": "reinit"},
    ),
    Deviation(
        "reinit draws anew from the layer's law (the authors' code: permutes the old values)",
        theirs={"mask1": "reinit_permute"},
        ours={"mask1": "reinit"},
    ),
    Deviation(
        "profile coarse: every fourth round, each pruned by four rounds at once, and trainings "
        "that end after a tenth of the iterations without a lower validation loss",
        theirs={},
        ours={},
        profiles=("paper", "coarse"),
        why="decides claims of the convolutional networks",
    ),
    Deviation(
        "such trainings alone, every round",
        theirs={},
        ours={},
        profiles=("paper", "patience"),
    ),
    Deviation(
        "profile coarse: convolutional networks in bfloat16, channels last, dense",
        network="conv2",
        theirs={"criterion": "none"},
        ours={"criterion": "none"},
        profiles=("paper", "coarse"),
    ),
    Deviation(
        "Adam in torch's form, eps 1e-8 added after the bias correction (TensorFlow: before)",
        why="expected to differ in the first steps alone",
    ),
    Deviation(
        "5,000 validation images are drawn by numpy seed 0, and held out of learned masks, too "
        "(the authors' code: learned masks see all images)",
    ),
    Deviation("the order of batches is a function of seed and epoch, equal in all rounds"),
    Deviation("survivors by exact rank (the authors' code: rounds down, one weight fewer)"),
)


def deviations(rows: Sequence[Row]) -> Table:
    """Each deviation with its measured effect: ours minus theirs, in points, by seed."""
    known = {(row["run_id"], row["round"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for deviation in DEVIATIONS:
        effect = _effect(deviation, known, seeds)
        lines.append((deviation.choice, "; ".join(filter(None, (effect, deviation.why)))))
    return Table(("choice", "measured effect"), tuple(lines))


def _effect(
    deviation: Deviation, known: Mapping[tuple[str, int], Row], seeds: Sequence[int]
) -> str:
    if deviation.theirs is None or deviation.ours is None:
        return "not measured"
    sides = tuple(zip((deviation.theirs, deviation.ours), deviation.profiles, strict=True))
    gaps: dict[int, float] = {}
    shared: set[int] = set()
    for seed in seeds:
        theirs, ours = (
            _curve(Arm(tuple(changes.items())).run(deviation.network, profile, seed), known)
            for changes, profile in sides
        )
        rounds = theirs.keys() & ours.keys()
        rounds = rounds - {0} or rounds
        if rounds:
            gaps[seed] = mean([ours[r] - theirs[r] for r in sorted(rounds)])
            shared |= rounds
    if not gaps:
        return f"not measured yet ({words.network(deviation.network)})"
    values = list(gaps.values())
    p, seen = paired(values), detectable(values)
    span = f"rounds {min(shared)} to {max(shared)}" if len(shared) > 1 else "one round"
    told = f"{100 * mean(values):+.2f} points ({words.network(deviation.network)}, "
    told += f"{len(values)} seed{'s' * (len(values) > 1)}, mean of {span}"
    if p is not None and seen is not None:
        sign = "" if p_value(p).startswith("<") else "= "
        told += f", p {sign}{p_value(p)}, sees ±{100 * seen:.2f}"
    return told + ")"


def _curve(run: Run, known: Mapping[tuple[str, int], Row]) -> dict[int, float]:
    found = {number: known.get((run.id, number)) for number in range(25)}
    return {number: row[ACCURACY] for number, row in found.items() if row is not None}


# ---- costs and power -----------------------------------------------------------------------------


def core_hours(records: Iterable[Record], run_ids: Iterable[str] | None = None) -> float:
    """Of what was done; run_ids: of these runs alone."""
    ids = None if run_ids is None else set(run_ids)
    return sum(
        (record.get("seconds") or 0) * (record.get("threads") or 1) / 3600
        for record in records
        if record.get("outcome") == "done" and (ids is None or record["run_id"] in ids)
    )


def run_ids(selection: Selection) -> set[str]:
    """The runs behind a figure, as they are stored, and the dense runs that they start from."""
    rows = [row for curve in selection.curves for row in (*curve.rows, *curve.dense)]
    return {row.get("stored_as", row["run_id"]) for row in rows}


def costs(
    selections: Sequence[Selection], records: Sequence[Record], named: Callable[[str], str]
) -> Table:
    """Per figure one command that makes its runs, and the core-hours that they took here.

    named: study -> its figure in words.
    """
    lines = []
    for selection in selections:
        ids = run_ids(selection)
        command = (
            f"python -m experiments run {selection.study} --network {selection.network} "
            f"--profile {selection.profile}"
        )
        part = f", without {len(selection.missing)} arms" if selection.missing else ""
        lines.append(
            (
                named(selection.study) or selection.study,
                command,
                f"{core_hours(records, ids):.2f}",
                f"{len(ids)}{part}",
            )
        )
    caption = (
        "What figures cost: core-hours as they were measured, on a machine that others loaded; "
        "runs that several figures share count in each"
    )
    return Table(("figure", "command", "core-hours", "runs"), tuple(lines), caption)


def power(selections: Sequence[Selection], references: Sequence[str]) -> Table:
    """Which differences the tests of each figure can find, in points, four times of five."""
    lines = []
    for selection in selections:
        labels = {curve.label: curve for curve in selection.curves}
        against = next((labels[name] for name in references if name in labels), None)
        if against is None or not against.trained or selection.study == "early-stop":
            continue
        found = [
            (c.n, c.seen)
            for curve in selection.curves
            if curve is not against
            for c in selection.compare(curve, against)
            if c.seen is not None
        ]
        if found:
            seen = sorted(100 * s for _, s in found)
            counts = {n for n, _ in found}
            n = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
            lines.append(
                (
                    f"{selection.study}, {selection.place}",
                    f"{against.words}",
                    n,
                    f"{median(seen):.2f}",
                    f"{seen[len(seen) // 10]:.2f} to {seen[-1 - len(seen) // 10]:.2f}",
                )
            )
    caption = (
        "Power: the true difference from a curve that the paired test (p < 0.05) finds four times "
        "of five, in points, at one level; smaller ones are mostly missed"
    )
    columns = ("figure", "against", "seeds", "median", "nine levels of ten")
    return Table(columns, tuple(lines), caption)
