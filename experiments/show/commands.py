"""Commands that show what a store holds: figure, table, report, claims. They change nothing in it.

Each takes options with the attributes store (a folder), study and network (a name, or None for
all), criterion and dataset (see `studies.asked`), profile (a name, or None: those that decide
claims, see `profiles_of`), and out (a folder; for the report a file or a folder).
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.files import write_whole
from experiments.findings.claim import DECIDING
from experiments.findings.judging import judge
from experiments.findings.selection import Selection, caveat_of, select
from experiments.findings.tables import ITERATION, Table, all_levels, masks, seven, summary
from experiments.show.numbering import figures_of
from experiments.show.overview import claims_markdown, sentence
from experiments.show.report import build, weights_from
from experiments.store.beside import joined
from experiments.store.remakes import readable
from experiments.store.store import Store
from experiments.study import parts, studies
from experiments.study.networks import NETWORKS, find
from experiments.study.profiles import profile_of


def figure(options: argparse.Namespace) -> None:
    """PNG, SVG and CSV of each study that has rows, into the folder `out`."""
    from experiments.show import figures

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
        # weights, then 1 where a criterion keeps them
        points = [(*map(float, row[:2]), *map(int, row[2:])) for row in rows]
        return Table(tuple(columns), tuple(points))

    return points


def table(options: argparse.Namespace) -> None:
    """A short table of each study on standard output; with `out`, text, Markdown and CSV there."""
    store = Store(options.store, create=False)
    rows = _rows(store, options)
    found: list[tuple[str, str, Table, Table]] = []
    for selection in _selections(options, store):
        learned = selection.curves[0].fields["schedule"] == "learned"
        value = ITERATION if selection.study == "early-stop" else "test_accuracy"
        short = masks(selection) if learned else summary(selection, value)
        found.append((selection.stem, selection.caveat, short, all_levels(selection, value)))
    if options.study in (None, "learned", "supermasks"):
        networks = [options.network] if options.network else list(NETWORKS)
        for profile in profiles_of(options, rows):
            of = {
                name: [r for r in rows if r["network"] == name and r["profile"] == profile]
                for name in networks
            }
            both = seven([(name, its_rows) for name, its_rows in of.items() if its_rows])
            found.append((f"table-1-{profile}", caveat_of(profile), both, both))
    for stem, caveat, short, full in found:
        print("\n\n".join(filter(None, (stem, caveat, short.text()))))
        if options.out is not None:
            write_whole(Path(options.out) / f"{stem}.txt", short.text().encode())
            write_whole(Path(options.out) / f"{stem}.md", short.markdown().encode())
            write_whole(Path(options.out) / f"{stem}.csv", full.csv())


def report(options: argparse.Namespace) -> None:
    """One self-contained HTML page, written to `out`; in a folder its name is report.html."""
    store = Store(options.store, create=False)
    chosen = studies.chosen(options)
    networks = _networks(options.network)
    rows = _rows(store, options)
    if not _has_rows(rows, options):
        raise _no_rows(options)
    text = build(
        chosen,
        rows,
        store.records(),
        judge,
        profiles_of(options, rows),
        networks,
        weights_from(store.load),
        points_from(options.store / "figures"),
        figures_of,
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
    rows = _rows(Store(options.store, create=False), options)
    profiles = profiles_of(options, rows)
    if options.study is not None:
        studies.find(options.study)
    if not _has_rows(rows, options):
        raise _no_rows(options)
    verdicts = [
        verdict
        for network in _networks(options.network)
        for verdict in judge(rows, network, options.profile or _only(profiles), options.study)
    ]
    caveats = {caveat_of(name) for name in profiles} - {""}
    parts = [sentence(verdicts), *sorted(caveats), claims_markdown(verdicts).markdown()]
    text = "\n\n".join(parts)
    print(text, end="")
    if options.out is not None:
        write_whole(Path(options.out) / "claims.md", text.encode())


def profiles_of(options: argparse.Namespace, rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The profile that the options name; else those with rows that can decide claims, else the one
    that all rows are of, else paper.
    """
    if options.profile is not None:
        return (profile_of(options.profile).name,)
    there = {row["profile"] for row in rows}
    deciding = tuple(name for name in DECIDING if name in there)
    return deciding or (tuple(there) if len(there) == 1 else ("paper",))


def _only(profiles: Sequence[str]) -> str | None:
    """A profile that decides nothing, so that its numbers are shown without a verdict."""
    return None if set(profiles) <= set(DECIDING) else profiles[0]


def _rows(store: Store, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Those to read, of the data set that the options name, with what lies beside them."""
    found = [row for row in store.rows() if row.get("data", "") == options.dataset]
    return joined(readable(found), store.curves())


def _selections(options: argparse.Namespace, store: Store) -> Iterator[Selection]:
    """What the options choose of the studies and networks that have rows.

    Raises:
        ValueError: none has.
    """
    chosen = studies.chosen(options)
    networks, rows = _networks(options.network), _rows(store, options)
    any_found = False
    for study in chosen:
        for network in networks:
            if network not in study.networks:
                continue
            for profile in profiles_of(options, rows):
                selection = select(study, network, profile, rows)
                if selection.curves if options.study else selection.begun:
                    any_found = True
                    yield selection
    if not any_found:
        raise _no_rows(options)


def _has_rows(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> bool:
    networks, profiles = _networks(options.network), profiles_of(options, rows)
    return any(row["network"] in networks and row["profile"] in profiles for row in rows)


def _no_rows(options: argparse.Namespace) -> ValueError:
    of = f"{options.study or 'any study'} on {options.network or 'any network'}"
    profile = options.profile or " or ".join(DECIDING)
    if any(map(parts.is_path, (options.network, options.dataset, *options.criterion))):
        profile += ", made of your files as they are now"
    return ValueError(
        f"no rows in {options.store} of {of} with profile {profile}: make them by "
        "`python -m experiments run`, or choose another --profile."
    )


def _networks(name: str | None) -> tuple[str, ...]:
    return tuple(NETWORKS) if name is None else (find(name).name,)
