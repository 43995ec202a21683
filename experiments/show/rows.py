"""The command `rows`: the rows of a store as a table that any tool reads."""

import argparse
import csv
import importlib.util
import io
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.files import write_whole
from experiments.store.store import Store
from experiments.study import studies
from experiments.study.networks import find

# columns that come first, in this order; others follow as rows have them
FIRST = ("study", "network", "profile", "seed", "run_id", "round", "density", "test_accuracy")


def rows(options: argparse.Namespace) -> None:
    """CSV on standard output, or files. Lists are written as JSON; empty: the row says nothing.

    Raises:
        ValueError: there are no such rows, or pyarrow is needed and not here.
    """
    if options.parquet and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("--parquet needs pyarrow, which is not here: pip install pyarrow.")
    asked = {
        "study": options.study and studies.find(options.study).name,
        "network": options.network and find(options.network).name,
        "profile": options.profile,
        "data": options.dataset or None,
    }
    found = [
        row
        for row in Store(options.store, create=False).rows()
        if all(value in (None, row.get(name, "")) for name, value in asked.items())
        and (not options.criterion or row["criterion"] in options.criterion)
    ]
    if not found:
        raise ValueError(
            f"no rows of these in {options.store}: make them by `python -m experiments run`, or "
            "ask for others."
        )
    table = columns(found)
    if options.parquet:
        write_whole(options.parquet, as_parquet(table))
    if options.csv:
        write_whole(options.csv, as_csv(table).encode())
    if not (options.parquet or options.csv):
        sys.stdout.write(as_csv(table))


def columns(found: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Column -> its values, lists as JSON; None where a row has no such field."""
    found = list(found)
    names = dict.fromkeys((*FIRST, *(name for row in found for name in row)))
    return {name: [_cell(row.get(name)) for row in found] for name in names}


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def as_csv(table: Mapping[str, list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return text.getvalue()


def as_parquet(table: Mapping[str, list[Any]]) -> bytes:
    import pyarrow  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(dict(table)), sink)
    return sink.getvalue().to_pybytes()
