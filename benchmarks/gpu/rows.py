"""Rows of the GPU measurements: cases, the file that grows, what is measured next, and tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# What tells one row from another; rows of different GPUs stand side by side.
PLACE = ("stage", "name", "shape", "density", "dtype", "contender")
# Until they are measured here: bytes/s of a copy, and operations/s (perf-anchors, section 3).
BANDWIDTH = 3.0e12
RATES = {"bf16": 790e12, "fp16": 790e12, "tf32": 400e12, "fp32": 50e12}
TABLE = 10_000  # characters: what a reply of the device machine has room for


@dataclass(frozen=True)
class Case:
    """One row to measure. `run` gets the Device and returns the fields of the row."""

    stage: str
    name: str  # what is measured
    contender: str
    shape: str
    run: Callable[[Any], Row]
    density: float | None = None  # None: the contender's time does not depend on it
    dtype: str = "bf16"
    peer: bool = False  # others are compared with it

    @property
    def place(self) -> Row:
        fields = {name: value for name, value in vars(self).items() if name != "run"}
        return fields if self.peer else {k: v for k, v in fields.items() if k != "peer"}


@dataclass(frozen=True)
class Run:
    """What the rows of one call of `python -m benchmarks gpu` share."""

    run: str  # when it began
    commit: str
    gpu: str
    date: str


class Store:
    """The rows of a file, by place and GPU; a new row replaces the old one.

    Args:
        path: the file; written anew, by way of a temporary one, with each row.
        before: a file to start from if there is none yet.
    """

    def __init__(self, path: Path, before: Path | None = None):
        self.path = path
        found = next((p for p in (path, before) if p is not None and p.is_file()), None)
        stored = json.loads(found.read_text()) if found else {}
        self.runs: dict[str, Row] = stored.get("runs", {})
        self.rows: dict[tuple, Row] = {_key(row): row for row in stored.get("rows", [])}

    def put(self, case: Case, run: Run, fields: Row) -> None:
        row = case.place | asdict(run) | fields
        self.rows[_key(row)] = row
        self.save()

    def save(self) -> None:
        complete(self.rows.values())
        used = {row["run"] for row in self.rows.values()}
        self.runs = {run: found for run, found in self.runs.items() if run in used}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        stored = {"runs": self.runs, "rows": list(self.rows.values())}
        new.write_text(json.dumps(stored, indent=1, default=str) + "\n")
        new.replace(self.path)

    def left(self, cases: Iterable[Case], run: Run) -> list[Case]:
        """What this run has still to measure: what was never measured first, failures last.

        Left out are rows of this commit, and what this run has tried already.
        """
        ranked = []
        for case in cases:
            row = self.rows.get(_key(case.place | {"gpu": run.gpu}))
            if row is None:
                ranked.append((0, case))
            elif row["run"] == run.run:
                continue
            elif row["commit"] != run.commit:
                ranked.append((1, case))
            elif "failed" in row or "skipped" in row:
                ranked.append((2, case))
        return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


def _key(row: Row) -> tuple:
    return (row["gpu"], *(row.get(name) for name in PLACE))


def complete(rows: Iterable[Row]) -> None:
    """Adds what follows from a time and other rows: share of the limit, ratios to peers."""
    rows = list(rows)
    measured = {(r["gpu"], r["shape"]): r for r in rows if r["stage"] == "ceilings" and "us" in r}
    peers: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.get("peer") and row.get("us"):
            peers.setdefault(_group(row), []).append(row)
    for row in rows:
        if not row.get("us") or row["stage"] == "ceilings":
            continue
        bandwidth, rate = BANDWIDTH, RATES.get(row["dtype"], RATES["bf16"])
        if found := measured.get((row["gpu"], "copy")):
            bandwidth = found["bytes"] / found["us"] * 1e6
        if found := measured.get((row["gpu"], f"product {row['dtype']}")):
            rate = found["flops"] / found["us"] * 1e6
        limit = max(row.get("bytes", 0) / bandwidth, row.get("flops", 0) / rate) * 1e6
        if limit:
            row["limit_us"] = round(limit, 2)
            row["of_limit"] = round(limit / row["us"], 3)
        ratios = {
            peer["contender"]: round(peer["us"] / row["us"], 3)
            for peer in peers.get(_group(row), [])
            if peer.get("density") in (None, row.get("density")) and peer is not row
        }
        if ratios:
            row["ratios"] = ratios


def _group(row: Row) -> tuple:
    return tuple(row.get(name) for name in ("gpu", "stage", "name", "shape", "dtype"))


# ---- tables --------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """A row as a line of text."""
    place = [row["name"], row["shape"], row["dtype"], row["contender"]]
    if row.get("density") is not None:
        place.insert(2, f"{row['density']:g} kept")
    if "us" not in row:
        what = [_outcome(row)]
    else:
        what = [f"{row['us']:.1f} us"]
        if "of_limit" in row:
            what.append(f"{row['of_limit']:.0%} of limit")
        if "predicted_us" in row:
            what.append(f"predicted {row['predicted_us']:.1f}")
        if "peak_per_weight" in row:
            what.append(f"{row['peak_per_weight']:.1f} B/weight")
        what += [f"{ratio:.2f}x {name}" for name, ratio in row.get("ratios", {}).items()]
        what += [row[name] for name in ("mode", "note") if row.get(name, "graph") != "graph"]
    return f"{' | '.join(filter(None, place))}: {', '.join(what)}"


def _outcome(row: Row) -> str:
    for word in ("failed", "skipped"):
        if word in row:
            return f"{word}: {row[word]}"
    return row.get("summary", "ok" if row.get("ok") else "not ok")


def short_table(rows: Iterable[Row], most: int = TABLE) -> str:
    """What is wrong; how many checks passed; a line of times for each shape; cut to what fits."""
    rows = list(rows)
    wrong = [row for row in rows if "failed" in row or not row.get("ok", True)]
    lines = [line(row)[:250] for row in wrong]
    for name in dict.fromkeys(row["name"] for row in rows if "ok" in row):
        outcomes = [row["ok"] for row in rows if row["name"] == name and "ok" in row]
        lines.append(f"{name}: {sum(outcomes)} of {len(outcomes)} ok")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if "us" in row:
            groups.setdefault(_group(row), []).append(row)
    for (_, _, name, shape, dtype), found in groups.items():
        found.sort(key=lambda row: not row.get("peer", False))
        lines.append(f"{name} {shape} {dtype}: " + "; ".join(map(_entry, found)))
    reasons = [row["skipped"][:100] for row in rows if "skipped" in row]
    lines += [f"skipped {reasons.count(why)}: {why}" for why in dict.fromkeys(reasons)]
    kept, size = [], 0
    for at, text in enumerate(lines):
        size += len(text) + 1
        if size > most - 60:
            kept.append(f"... and {len(lines) - at} more lines, in gpu.md")
            break
        kept.append(text)
    return "\n".join(kept)


def _entry(row: Row) -> str:
    """Contender, time, and ratios to the first and to the fastest peer."""
    text = row["contender"]
    if row.get("density") is not None:
        text += f" @{row['density']:g}"
    text += f" {row['us']:.1f}"
    if "of_limit" in row:
        text += f" {row['of_limit']:.0%}"
    ratios = list(row.get("ratios", {}).values())
    if ratios and not row.get("peer"):
        text += f" ({ratios[0]:.2f}x, {min(ratios):.2f}x)"
    return text


def as_markdown(store: Store) -> str:
    sections = [
        "# GPU benchmarks",
        "Written by `python -m benchmarks gpu`. Times are medians of CUDA graph replays unless a "
        "row says otherwise; a ratio is a peer's time over the contender's, so more is faster; the "
        "limit is the time of the bytes that a row counts, or of its operations, at the rates "
        "measured on the same GPU.",
    ]
    rows = list(store.rows.values())
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        here = [row for row in rows if row["gpu"] == gpu]
        sections.append(f"## {gpu}")
        for stage in dict.fromkeys(row["stage"] for row in here):
            lines = "\n".join(f"- {line(row)}" for row in here if row["stage"] == stage)
            sections.append(f"### {stage}\n\n{lines}")
        runs = dict.fromkeys((row["commit"], row["date"]) for row in here)
        sections.append("\n".join(f"Measured at commit {c}, {date}." for c, date in runs))
    sections += [
        f"Run {run}: " + ", ".join(f"{k} {v}" for k, v in found.items())
        for run, found in store.runs.items()
    ]
    return "\n\n".join(sections) + "\n"
