"""The report: one self-contained HTML page with each study's question, figure, claims and numbers.

It is made of rows and records alone, so the same store gives the same page.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from experiments import figures, page
from experiments.networks import NETWORKS
from experiments.runs import PROFILES, Run
from experiments.selection import ACCURACY, Row, Selection, Study, select
from experiments.tables import (
    ITERATION,
    Table,
    differences,
    masks,
    seven,
    summary,
    summary_of_tests,
)

TITLE = "Zeros, signs and the supermask: a reproduction"
PAPER = (
    'The studies of "Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask" '
    "(Zhou, Lan, Liu, Yosinski, NeurIPS 2019), run with lottery_sparse."
)
STATUSES = {  # of a verdict -> in a count of them
    "holds": "hold",
    "fails": "fail",
    "too few runs": "with too few runs",
    "not run": "not run",
    "not a deciding profile": "not judged",
}
# others are tested against it
REFERENCES = ("rewind", "zero", "large_final", "large_final, init", "rewind_to 0")


class Claim(Protocol):
    @property
    def study(self) -> str: ...

    @property
    def text(self) -> str: ...


class Verdict(Protocol):
    """What rows say to a claim about a network, see `judging.judge`."""

    @property
    def claim(self) -> Claim: ...

    @property
    def status(self) -> str: ...

    @property
    def numbers(self) -> str: ...


class Judge(Protocol):
    def __call__(
        self, rows: Sequence[Row], network: str, profile: str, study: str
    ) -> Sequence[Verdict]: ...


class ReportedStudy(Study, Protocol):
    @property
    def networks(self) -> Sequence[str]: ...

    @property
    def figure(self) -> str: ...


def build(
    studies: Sequence[ReportedStudy],
    rows: Sequence[Row],
    records: Sequence[Mapping[str, Any]],
    judge: Judge,
    profile: str,
    networks: Sequence[str] = tuple(NETWORKS),
    weights: figures.Weights | None = None,
) -> str:
    """The page.

    Args:
        rows, records: the store's.
        judge: verdicts on the claims of one study about one network.
        weights: see `figures.draw`.
    """
    verdicts = {
        (study.name, network): judge(rows, network, profile, study.name)
        for study in studies
        for network in networks
        if network in study.networks
    }
    sections = [
        _section(study, networks, profile, rows, records, verdicts, weights) for study in studies
    ]
    parts = [
        "<header>",
        page.tag("h1", TITLE),
        page.tag("p", PAPER, class_="lead"),
        _banner(profile),
        "</header>",
        _contents(studies),
        "<main>",
        _overview(studies, networks, profile, rows, verdicts),
        *sections,
        "</main>",
        page.box("footer", [page.tag("p", _sources(records))]),
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
        choices = " ".join(f"{choice}." for choice in CHOICES)
        return page.tag(
            "p",
            f"Profile paper: all iterations of the paper's protocol, with these choices. {choices}",
        )
    text = f"Profile {profile}, not the paper's protocol: {deviations}. No claim is judged by it."
    return page.tag("p", text, class_="note")


def _contents(studies: Sequence[Study]) -> str:
    links = [f'<li><a href="#{study.name}">{page.escape(study.name)}</a></li>' for study in studies]
    return page.box("nav", ["<ul>", *links, "</ul>"], aria_label="studies")


def _overview(
    studies: Sequence[ReportedStudy],
    networks: Sequence[str],
    profile: str,
    rows: Sequence[Row],
    verdicts: Mapping[tuple[str, str], Sequence[Verdict]],
) -> str:
    selections = {
        (study.name, network): select(study, network, profile, rows)
        for study in studies
        for network in networks
        if network in study.networks
    }
    lines = []
    for study in studies:
        cells = []
        for network in networks:
            key = study.name, network
            counts = Counter(verdict.status for verdict in verdicts.get(key, ()))
            if key not in verdicts:
                cells.append("\N{EN DASH}")
            elif not selections[key].curves:
                cells.append("not run")
            else:
                told = [f"{counts[word]} {said}" for word, said in STATUSES.items() if counts[word]]
                # curves of a study may be there as those of another, its own still to run
                silent = "run in part" if selections[key].missing else "run"
                cells.append(", ".join(told) or silent)
        lines.append((study.name, *cells))
    caption = "Claims by study and network"
    counted = Table(("study", *map(_shown, networks)), tuple(lines), caption)
    mine = [
        (n, [r for r in rows if r["network"] == n and r["profile"] == profile]) for n in networks
    ]
    parts = [
        page.tag("h2", "Overview", id="overview"),
        page.table(counted, "overview"),
        page.tag(
            "p",
            "A claim holds or fails by rows of the paper profile alone, from three seeds on (two "
            "for some learned masks), of the seeds that all its arms have; its statistic and "
            "threshold were committed before its runs, unless claims.py says otherwise. p < 0.05 "
            "by Welch's two-sided test is starred as in the paper; beside it stands p corrected by "
            "Holm over the levels of a figure.",
        ),
    ]
    ran = [(_shown(network), its_rows) for network, its_rows in mine if its_rows]
    if ran:
        parts += [page.tag("h3", "Table 1: supermasks"), page.table(seven(ran))]
    return page.box("section", parts)


def _section(
    study: ReportedStudy,
    networks: Sequence[str],
    profile: str,
    rows: Sequence[Row],
    records: Sequence[Mapping[str, Any]],
    verdicts: Mapping[tuple[str, str], Sequence[Verdict]],
    weights: figures.Weights | None,
) -> str:
    parts = [
        page.tag("h2", study.name, id=study.name),
        page.tag("p", study.question, class_="lead"),
    ]
    if study.figure:
        parts.append(page.tag("p", f"In the paper: {study.figure}."))
    idle = []
    for network in networks:
        if network not in study.networks:
            continue
        selection = select(study, network, profile, rows)
        if not selection.curves:
            idle.append(network)
            continue
        parts += _network(selection, records, verdicts[study.name, network], weights)
    if idle:
        command = f"python -m experiments run {study.name} --network {idle[0]} --profile {profile}"
        names = ", ".join(map(_shown, idle))
        parts.append(
            f'<p class="note">Not run on {page.escape(names)}: '
            f"<code>{page.escape(command)}</code></p>"
        )
    return page.box("section", parts)


def _network(
    selection: Selection,
    records: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Verdict],
    weights: figures.Weights | None,
) -> list[str]:
    parts = [page.tag("h3", selection.place, id=f"{selection.study}-{selection.network}")]
    for stem, drawing in figures.draw(selection, weights):
        caption = f"Numbers: {page.download(f'{stem}.csv', drawing.numbers)}"
        parts.append(
            page.box(
                "figure",
                [
                    page.image(drawing.svg(), drawing.alt),
                    f"<figcaption class='download'>{caption}</figcaption>",
                ],
            )
        )
    if verdicts:
        found = [(v.claim.text, v.status, v.numbers) for v in verdicts]
        parts += [page.tag("h4", "Claims"), page.claims(found)]
    parts += [page.tag("h4", "Numbers"), *_numbers(selection)]
    return [*parts, page.tag("h4", "How it was run"), page.facts(_how(selection, records))]


def _numbers(selection: Selection) -> list[str]:
    """The tables of a study on a network: means and ranges, and tests against one curve."""
    kind = selection.curves[0].fields
    if kind["schedule"] == "learned":
        return [page.table(masks(selection))]
    value = ITERATION if selection.study == "early-stop" else ACCURACY
    parts = [page.table(summary(selection, value))]
    labels = {curve.label: curve for curve in selection.curves}
    against = next((labels[name] for name in REFERENCES if name in labels), None)
    if against is not None and len(labels) > 1:
        link = page.download(f"{selection.stem}-tests.csv", differences(selection, against, value))
        parts += [
            page.table(summary_of_tests(selection, against, value)),
            f'<p class="download">All levels: {link}</p>',
        ]
    return parts


def _how(selection: Selection, records: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    rows = [row for curve in selection.curves for row in curve.rows]
    network = Run(network=selection.network, profile=selection.profile, seed=0).net
    keep = ", ".join(f"{float(share):g} of {kind}" for kind, share in network.keep.items())
    yield "profile", selection.profile + (f": {selection.caveat}" if selection.caveat else "")
    if any(row["schedule"] == "learned" for row in rows):
        yield (
            "masks",
            f"SGD with momentum 0.9, rate {network.score_lr:g}, batch "
            f"{network.score_batch_size}, {network.score_iterations:,} iterations",
        )
    if any(row["schedule"] != "learned" for row in rows):
        yield (
            "training",
            f"Adam, rate {network.lr:g}, batch {network.batch_size}, "
            f"{network.iterations:,} iterations a round",
        )
        yield "a round keeps", keep
    yield "seeds", _list({row["seed"] for row in rows})
    rounds = {row["round"] for row in rows}
    yield "rounds", f"{min(rounds)} to {max(rounds)}" if len(rounds) > 1 else f"{min(rounds)}"
    yield "not run", ", ".join(selection.missing)
    yield "layers ran as", _products(rows)
    ids = {row.get("stored_as", row["run_id"]) for row in rows}
    yield from _provenance([record for record in records if record.get("run_id") in ids])


def _products(rows: Sequence[Row]) -> str:
    """Which products the layers ran on: "rounds 8 to 20: sparse, sparse, dense"."""
    by_round: dict[int, Counter[str]] = {}
    for row in rows:
        if row.get("products"):
            by_round.setdefault(row["round"], Counter())[", ".join(row["products"])] += 1
    spans: list[tuple[int, int, str]] = []
    for number, counts in sorted(by_round.items()):
        told = " or ".join(products for products, _ in counts.most_common())
        if spans and spans[-1][2] == told:
            spans[-1] = (spans[-1][0], number, told)
        else:
            spans.append((number, number, told))
    return "; ".join(
        (f"round {first}" if first == last else f"rounds {first} to {last}") + f": {told}"
        for first, last, told in spans
    )


def _provenance(records: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    if not records:
        return
    seconds = sum(record.get("seconds") or 0 for record in records)
    yield "time", f"{seconds / 3600:.1f} h in all" if seconds > 5400 else f"{seconds:.0f} s in all"
    yield "started", _span(str(r["started"]) for r in records if r.get("started"))
    versions = {
        ", ".join(f"{name} {number}" for name, number in sorted(record["versions"].items()))
        for record in records
        if isinstance(record.get("versions"), Mapping)
    }
    yield "versions", _list(versions)
    yield (
        "commits",
        _list(
            {
                str(r["commit"] or "unknown")[:10] + (" with changes" if r.get("dirty") else "")
                for r in records
                if "commit" in r
            }
        ),
    )
    yield "processors", _list({r["machine"]["cpu"] for r in records if "machine" in r})
    yield "engines", _list({str(r["engine"]) for r in records if r.get("engine")})
    outcomes = Counter(str(r.get("outcome", "done")) for r in records)
    yield "attempts", ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())


def _sources(records: Sequence[Mapping[str, Any]]) -> str:
    starts = _span(str(r["started"]) for r in records if r.get("started"))
    ran = f" Its runs were started {starts}." if starts else ""
    return f"Made by `python -m experiments report` from rows and records of the store.{ran}"


def _span(moments: Iterable[str]) -> str:
    ordered = sorted(moments)
    if not ordered:
        return ""
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(values)))


def _shown(network: str) -> str:
    return "FC" if network == "fc" else network.capitalize()


Load = Callable[[str], tuple[Mapping[str, Any], Mapping[str, Any]] | None]


def weights_from(load: Load) -> figures.Weights:
    """`figures.Weights` from `Store.load`."""

    def weights(row: Row) -> Mapping[str, Any] | None:
        found = load(row.get("stored_as", row["run_id"]))
        return None if found is None else found[0]

    return weights
