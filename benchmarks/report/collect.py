"""A pytest plugin that turns each benchmark into a row of the stored file as soon as it is done."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import report

SAVE_EVERY = 20.0  # seconds


class Rows:
    """Rows of a file of results; what this run measures replaces what was stored.

    Args:
        path: the file; it is written every few seconds, so that little is lost if a run is cut.
        resume: leave out what is stored as measured at this commit.
    """

    def __init__(self, path: Path, resume: bool):
        self.path, self.resume = path, resume
        self.machine, self.run = report.machine(), report.run(os.getloadavg()[0])
        stored = json.loads(path.read_text())["rows"] if path.is_file() else []
        # a file that an older version wrote may hold rows without
        kept = [row for row in stored if "commit" in row]
        self.rows: dict[tuple, dict[str, Any]] = {_key(row): row for row in kept}
        self._seen: set[tuple] = set()
        self._saved = time.monotonic()

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        self._seen = {_key(_named(item)) for item in items}
        if not self.resume:
            return
        done = [item for item in items if self._is_done(self.rows.get(_key(_named(item))))]
        items[:] = [item for item in items if item not in set(done)]
        config.hook.pytest_deselected(items=done)

    def _is_done(self, row: dict[str, Any] | None) -> bool:
        return row is not None and row["commit"] == self.run["commit"] and "failed" not in row

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        outcome = yield
        result = outcome.get_result()
        if call.when != "call":
            return
        row = _named(item)
        benchmark = item.funcargs["benchmark"]
        if result.skipped:
            row["skipped"] = str(call.excinfo.value)
        elif result.failed:
            row["failed"] = f"{call.excinfo.typename}: {call.excinfo.value}"[:300]
        else:
            stats = benchmark.stats.stats
            row |= benchmark.extra_info
            row["min_us"] = round(stats.min * 1e6, 1)
            row["median_us"] = round(stats.median * 1e6, 1)
            row["rounds"] = stats.rounds
        self.rows[_key(row)] = row | self.run
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def finish(self) -> str:
        """Drops rows that no longer have a benchmark, saves, and returns the tables."""
        benches = {key[0] for key in self._seen}
        self.rows = {k: r for k, r in self.rows.items() if k in self._seen or k[0] not in benches}
        return self.save()

    def save(self) -> str:
        rows = list(self.rows.values())
        text = report.as_markdown(self.machine, rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"machine": self.machine, "rows": rows}, indent=1) + "\n")
        new.replace(self.path)
        self.path.with_suffix(".md").write_text(text)
        self._saved = time.monotonic()
        return text


# what tells one row of a file from another
_FIELDS = ("layer", "batch", "scores", "keep", "threads", "network", "density", "contender")


def _key(row: dict[str, Any]) -> tuple:
    return (row["bench"], *(row.get(field) for field in _FIELDS))


def _named(item: Any) -> dict[str, Any]:
    bench = item.originalname.removeprefix("bench_")
    return {"bench": bench, **item.callspec.params["case"]._asdict()}
