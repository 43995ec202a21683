"""Commands that show what a store holds: figure, table, report, claims. They change nothing in it.

Each takes options with the attributes store (a folder), study and network (a name, or None for
all), profile, and out (a folder; for the report a file or a folder).
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments import studies
from experiments.files import write_whole
from experiments.judging import judge
from experiments.networks import NETWORKS
from experiments.remakes import readable
from experiments.report import build, weights_from
from experiments.runs import PROFILES
from experiments.selection import Selection, caveat_of, select
from experiments.store import Store
from experiments.tables import ITERATION, Table, all_levels, masks, seven, summary


def figure(options: argparse.Namespace) -> None:
    """PNG, SVG and CSV of each study that has rows, into the folder `out`."""
    from experiments import figures  # matplotlib loads slowly, and tables do without

    store = Store(options.store, create=False)
    weights, points = weights_from(store.load), points_from(options.store / "figures")
    for selection in _selections(options, store):
        for stem, drawing in figures.draw(selection, weights, points):
            for path in drawing.save(Path(options.out), stem):
                print(path)


def points_from(folder: Path) -> Callable[[str], Table | None]:
    """`figures.Points` from the CSV files of earlier figures in a folder."""

    def points(stem: str) -> Table | None:
        path = folder / f"{stem}.csv"
        if not path.exists():
            return None
        with path.open(newline="") as file:
            columns, *rows = csv.reader(file)
        return Table(tuple(columns), tuple(tuple(map(float, row)) for row in rows))

    return points


def table(options: argparse.Namespace) -> None:
    """A short table of each study on standard output; with `out`, text, Markdown and CSV there."""
    store = Store(options.store, create=False)
    rows = readable(store.rows())
    found: list[tuple[str, Table, Table]] = []
    for selection in _selections(options, store):
        learned = selection.curves[0].fields["schedule"] == "learned"
        value = ITERATION if selection.study == "early-stop" else "test_accuracy"
        short = masks(selection) if learned else summary(selection, value)
        found.append((selection.stem, short, all_levels(selection, value)))
    if options.study in (None, "learned", "supermasks"):
        networks = [options.network] if options.network else list(NETWORKS)
        of = {
            name: [r for r in rows if r["network"] == name and r["profile"] == options.profile]
            for name in networks
        }
        both = seven([(name, its_rows) for name, its_rows in of.items() if its_rows])
        found.append((f"table-1-{options.profile}", both, both))
    for stem, short, full in found:
        print("\n\n".join(filter(None, (stem, caveat_of(options.profile), short.text()))))
        if options.out is not None:
            write_whole(Path(options.out) / f"{stem}.txt", short.text().encode())
            write_whole(Path(options.out) / f"{stem}.md", short.markdown().encode())
            write_whole(Path(options.out) / f"{stem}.csv", full.csv())


def report(options: argparse.Namespace) -> None:
    """One self-contained HTML page, written to `out`; in a folder its name is report.html."""
    store = Store(options.store, create=False)
    chosen = [studies.find(options.study)] if options.study else list(studies.STUDIES.values())
    networks = _networks(options.network)
    _check_profile(options.profile)
    rows = readable(store.rows())
    if not _has_rows(rows, options):
        raise _no_rows(options)
    text = build(
        chosen,
        rows,
        store.records(),
        judge,
        options.profile,
        networks,
        weights_from(store.load),
    )
    path = Path(options.out)
    if path.suffix != ".html":
        path /= "report.html"
    write_whole(path, text.encode())
    print(path)


def claims(options: argparse.Namespace) -> None:
    """What the rows say to each claim, as a Markdown table on standard output, and in claims.md of
    the folder `out`.
    """
    rows = readable(Store(options.store, create=False).rows())
    _check_profile(options.profile)
    if options.study is not None:
        studies.find(options.study)
    if not _has_rows(rows, options):
        raise _no_rows(options)
    cells = [
        (verdict.claim.study, network, verdict.claim.text, verdict.numbers, verdict.status)
        for network in _networks(options.network)
        for verdict in judge(rows, network, options.profile, options.study)
    ]
    text = Table(("study", "network", "claim", "numbers", "verdict"), tuple(cells)).markdown()
    if caveat := caveat_of(options.profile):
        text = f"{caveat}\n\n{text}"
    print(text, end="")
    if options.out is not None:
        write_whole(Path(options.out) / "claims.md", text.encode())


def _selections(options: argparse.Namespace, store: Store) -> Iterator[Selection]:
    """What the options choose of the studies and networks that have rows.

    Raises:
        ValueError: none has.
    """
    chosen = [studies.find(options.study)] if options.study else list(studies.STUDIES.values())
    networks, rows = _networks(options.network), readable(store.rows())
    _check_profile(options.profile)
    any_found = False
    for study in chosen:
        for network in networks:
            if network not in study.networks:
                continue
            selection = select(study, network, options.profile, rows)
            if selection.curves:
                any_found = True
                yield selection
    if not any_found:
        raise _no_rows(options)


def _has_rows(rows: Iterable[Mapping[str, Any]], options: argparse.Namespace) -> bool:
    networks = _networks(options.network)
    return any(row["network"] in networks and row["profile"] == options.profile for row in rows)


def _no_rows(options: argparse.Namespace) -> ValueError:
    of = f"{options.study or 'any study'} on {options.network or 'any network'}"
    return ValueError(
        f"no rows in {options.store} of {of} with profile {options.profile}: make them by "
        "`python -m experiments run`, or choose another --profile."
    )


def _networks(name: str | None) -> tuple[str, ...]:
    if name is not None and name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}; got {name!r}.")
    return tuple(NETWORKS) if name is None else (name,)


def _check_profile(name: str) -> None:
    if name not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}; got {name!r}.")
