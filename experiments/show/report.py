"""The report: one self-contained HTML page. First what came out, then figures, claims, costs.

It is made of rows and records alone, so the same store gives the same page.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.findings import words
from experiments.findings.claim import DECIDING
from experiments.findings.judging import Verdict
from experiments.findings.selection import ACCURACY, Row, Selection, select
from experiments.findings.tables import (
    ITERATION,
    Table,
    bits,
    differences,
    heading_shares,
    masks,
    seven,
    summary,
    summary_of_tests,
    ways,
)
from experiments.show import figures, how, overview, page
from experiments.study.networks import NETWORKS
from experiments.study.profiles import PROFILES
from experiments.study.studies import Study

TITLE = "Zeros, signs and the supermask: a reproduction"
PAPER = (
    'The studies of "Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask" '
    "(Zhou, Lan, Liu, Yosinski, NeurIPS 2019), run with lottery_sparse."
)
# others are tested against it
REFERENCES = ("rewind", "zero", "large_final", "large_final, init", "rewind_to 0")
RULES = (
    "A claim is decided by rows of the profiles that it names, from three seeds on (two for some "
    "learned masks), of the seeds that all its arms have. Its statistic and threshold were "
    "committed before its runs, unless claims.py says otherwise. Arms are compared by seed (a "
    "paired t test, p < 0.05, two-sided); Welch's p stands beside it. Masks on untrained networks "
    "are judged by the mean of each run's best density, as the published numbers are by all "
    "evidence; the other ways to choose a density are in the tables."
)


# rows, network, profile (None: those that can decide), study -> verdicts on its claims
Judge = Callable[[Sequence[Row], str, str | None, str | None], Sequence[Verdict]]


def build(
    studies: Sequence[Study],
    rows: Sequence[Row],
    records: Sequence[Mapping[str, Any]],
    judge: Judge,
    profiles: Sequence[str],
    networks: Sequence[str] = tuple(NETWORKS),
    weights: figures.Weights | None = None,
    points: figures.Points | None = None,
    named: Callable[[str], str] = lambda study: "",
) -> str:
    """The page.

    Args:
        rows, records: the store's.
        judge: verdicts on the claims of one study about one network.
        profiles: that are shown; claims are judged by the profiles that can decide them, or by
            the only one that is here.
        weights, points: see `figures.draw`.
        named: study -> its figure in words.
    """
    profile = None if set(profiles) <= set(DECIDING) else profiles[0]
    verdicts = [
        verdict
        for study in studies
        for network in networks
        if network in study.networks
        for verdict in judge(rows, network, profile, study.name)
    ]
    selections = [
        selection
        for study in studies
        for network in networks
        for name in profiles
        if network in study.networks and (selection := select(study, network, name, rows)).begun
    ]
    ran = [study for study in studies if any(s.study == study.name for s in selections)]
    parts = [
        "<header>",
        page.tag("h1", TITLE),
        page.tag("p", overview.sentence(verdicts), class_="lead", id="outcome"),
        page.table(overview.by_network(verdicts), "counts"),
        page.tag("p", PAPER),
        *(_banner(name) for name in profiles),
        "</header>",
        _contents(ran),
        "<main>",
        *(_section(study, selections, verdicts, records, weights, points, named) for study in ran),
        _claims(studies, verdicts),
        _table_1(networks, profiles, rows),
        _deviations(profiles, rows),
        _costs(selections, records, named),
        _failed(verdicts),
        _idle(studies, networks, selections, profiles),
        "</main>",
        page.box("footer", [page.tag("p", how.sources(records))]),
    ]
    return page.page(TITLE, parts)


# What holds in every profile; reasons in DECISIONS.md and the README's "Protocol".
CHOICES = (
    "Adam in torch's form, eps 1e-8 added after the bias correction",
    "5,000 validation images drawn by numpy seed 0, looked at every 100 iterations and held out of "
    "learned masks, too",
    "Order of batches a function of seed and epoch, equal in all rounds",
    "reinit draws anew from the layer's law, every round from the dense run's start",
    "Survivors by exact rank, ties by a seeded key",
    "Biases train and are never masked",
)


def _banner(profile: str) -> str:
    deviations = ", ".join(PROFILES[profile].deviations)
    if not deviations:
        return page.tag("p", "Profile paper: all iterations of the paper's protocol.")
    text = f"Profile {profile}, not the paper's protocol: {deviations}."
    return page.tag("p", text, class_="note")


def _contents(studies: Sequence[Study]) -> str:
    links = [
        f'<li><a href="#{study.name}">{page.escape(study.question)}</a></li>' for study in studies
    ]
    rest = [
        f'<li><a href="#{name}">{text}</a></li>'
        for name, text in (
            ("claims", "How claims are judged"),
            ("deviations", "Deviations"),
            ("costs", "Costs and power"),
            ("failed", "What failed"),
        )
    ]
    parts = page.folded("Contents", ["<ul>", *links, *rest, "</ul>"])
    return page.box("nav", [parts], aria_label="contents")


# ---- a study -------------------------------------------------------------------------------------


def _section(
    study: Study,
    selections: Sequence[Selection],
    verdicts: Sequence[Verdict],
    records: Sequence[Mapping[str, Any]],
    weights: figures.Weights | None,
    points: figures.Points | None,
    named: Callable[[str], str],
) -> str:
    where = named(study.name) or study.figure
    parts = [page.tag("p", f"Study {study.name}: {where}." if where else f"Study {study.name}.")]
    for selection in selections:
        if selection.study == study.name:
            mine = [
                v
                for v in verdicts
                if (v.claim.study, v.network) == (study.name, selection.network)
                and v.status != "not run"
                and v.profile == selection.profile
            ]
            parts += _network(selection, records, mine, weights, points)
    return page.section(study.question, study.name, *parts)


def _network(
    selection: Selection,
    records: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Verdict],
    weights: figures.Weights | None,
    points: figures.Points | None,
) -> list[str]:
    name = f"{selection.study}-{selection.network}-{selection.profile}"
    profile = "" if selection.paper else f", profile {selection.profile}"
    parts = [page.tag("h3", f"{selection.place}{profile}", id=name)]
    for stem, drawing in figures.draw(selection, weights, points):
        caption = f"Numbers: {page.download(f'{stem}.csv', drawing.numbers)}"
        caption = f"<figcaption class='download'>{caption}</figcaption>"
        parts.append(page.box("figure", [page.image(drawing.svg(), drawing.alt), caption]))
    if verdicts:
        parts.append(page.claims(verdicts))
    ran = [page.tag("h4", "How it was run"), page.facts(how.told(selection, records))]
    return [*parts, page.folded("Tables, and how it was run", [*_numbers(selection), *ran])]


def _numbers(selection: Selection) -> list[str]:
    """The tables of a study on a network: means and ranges, and tests against one curve."""
    kind = selection.curves[0].fields
    if kind["schedule"] == "learned":
        return [page.table(masks(selection)), page.table(bits(selection))]
    value = ITERATION if selection.study == "early-stop" else ACCURACY
    parts = [page.table(summary(selection, value))]
    if kind["schedule"] == "one_shot":
        parts += [page.table(ways(selection), "text"), page.table(bits(selection))]
    if (moved := heading_shares(selection)).rows:
        parts.append(page.table(moved))
    labels = {curve.label: curve for curve in selection.curves}
    against = next((labels[name] for name in REFERENCES if name in labels), None)
    if against is not None and len(labels) > 1:
        link = page.download(f"{selection.stem}-tests.csv", differences(selection, against, value))
        parts += [
            page.table(summary_of_tests(selection, against, value)),
            f'<p class="download">All levels: {link}</p>',
        ]
    return parts


# ---- all studies together ------------------------------------------------------------------------


def _claims(studies: Sequence[Study], verdicts: Sequence[Verdict]) -> str:
    """How claims are judged, and how many there are of each study: each stands by its figure."""
    lines = []
    for study in studies:
        mine = [v for v in verdicts if v.claim.study == study.name]
        counts = Counter(v.status for v in mine)
        if mine:
            told = [f"{counts[s]} {verb}" for s, verb in overview.STATUSES.items() if counts[s]]
            lines.append((study.name, len(mine), ", ".join(told)))
    table = Table(("study", "claims", "of them"), tuple(lines), "Claims by study")
    return page.section(
        "How claims are judged", "claims", page.tag("p", RULES), page.table(table, "text")
    )


def _table_1(networks: Sequence[str], profiles: Sequence[str], rows: Sequence[Row]) -> str:
    some = [
        (
            words.network(network) + ("" if profile == "paper" else f", profile {profile}"),
            [r for r in rows if r["network"] == network and r["profile"] == profile],
        )
        for network in networks
        for profile in profiles
    ]
    some = [(name, its_rows) for name, its_rows in some if its_rows]
    if not some:
        return ""
    table = seven(some).turned("network")
    return page.section("Table 1: supermasks", "table-1", page.table(table))


def _deviations(profiles: Sequence[str], rows: Sequence[Row]) -> str:
    told = (
        "What is not as in the paper or in the authors' code, and what it changes: ours minus "
        "theirs, in points of test accuracy, by seed."
    )
    choices = " ".join(f"{choice}." for choice in CHOICES)
    table = page.table(overview.deviations(rows), "text")
    choices = page.tag("p", f"Choices in every profile: {choices}")
    title = "Deviations and their effect"
    return page.section(title, "deviations", page.tag("p", told), table, choices)


def _costs(
    selections: Sequence[Selection],
    records: Sequence[Mapping[str, Any]],
    named: Callable[[str], str],
) -> str:
    total = overview.core_hours(records)
    parts = [
        page.tag("p", f"All runs of this store took {total:.1f} core-hours."),
        page.table(overview.costs(selections, records, named), "text"),
        page.facts(how.machines(records)),
    ]
    power = overview.power(selections, REFERENCES)
    if power.rows:
        parts.append(page.table(power))
    return page.section("Costs and power", "costs", *parts)


def _failed(verdicts: Sequence[Verdict]) -> str:
    """Negative results, as such."""
    failed = [verdict for verdict in verdicts if verdict.status == "fails"]
    if not failed:
        return page.section("What failed", "failed", page.tag("p", "No claim fails."))
    items = [
        page.item(
            words.said(v.claim.text, v.claim.study),
            f"{words.network(v.network)}, profile {v.profile}; the original: {v.claim.original}. "
            + words.said(v.numbers, v.claim.study),
        )
        for v in failed
    ]
    return page.section("What failed", "failed", "<ul>", *items, "</ul>")


def _idle(
    studies: Sequence[Study],
    networks: Sequence[str],
    selections: Sequence[Selection],
    profiles: Sequence[str],
) -> str:
    ran = {(selection.study, selection.network) for selection in selections}
    lines = []
    for study in studies:
        idle = [n for n in networks if n in study.networks and (study.name, n) not in ran]
        if idle:
            command = (
                f"python -m experiments run {study.name} --network {idle[0]} "
                f"--profile {profiles[0]}"
            )
            lines.append((study.name, ", ".join(map(words.network, idle)), command))
    if not lines:
        return ""
    table = Table(("study", "networks", "command of the first"), tuple(lines))
    return page.section("Not run", "not-run", page.table(table, "text"))


Load = Callable[[str], tuple[Mapping[str, Any], Mapping[str, Any]] | None]


def weights_from(load: Load) -> figures.Weights:
    """`figures.Weights` from `Store.load`."""

    def weights(row: Row) -> Mapping[str, Any] | None:
        found = load(row.get("stored_as", row["run_id"]))
        return None if found is None else found[0]

    return weights
