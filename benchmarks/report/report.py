"""The machine, the run, and the page of tables that results are written to."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.cpu import peers
from benchmarks.report import tables
from lottery_sparse.tools import doctor

ROOT = Path(__file__).resolve().parents[2]
SETS = ("sse4_2", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile")

Row = dict[str, Any]


def machine() -> Row:
    """What a number depends on."""
    fields = _cpu_fields()
    flags = set(fields.get("flags", "").split())
    model = "{model name} (family {cpu family}, model {model})"
    return {
        "cpu": model.format_map(fields) if "model name" in fields else platform.processor(),
        "flags": " ".join(name for name in SETS if name in flags),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "native": doctor.native_line(),
        "peers": ", ".join(f"{name} {version}" for name, version in peers.versions().items()),
        "threads": "1 unless a row says otherwise",
    }


def run(load: float) -> Row:
    """What rows measured together share. load: processes running before they began."""
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "load_before": round(load, 2),
    }


def _cpu_fields() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in fields.items()}


def _commit() -> str:
    """The commit measured, with "+" if what is measured differs from it."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "csrc", "lottery_sparse", "setup.py", "benchmarks")
    measured = [line for line in changed.splitlines() if "benchmarks/results" not in line]
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if measured else "")


def as_markdown(machine: Row, rows: list[Row]) -> str:
    sections = [
        "# CPU benchmarks",
        "Written by `python -m benchmarks cpu`. Times are minima; a ratio is the time of the dense "
        "peer over the contender's, so more is faster.",
        "\n".join(f"- {name}: {value}" for name, value in machine.items()),
    ]
    for bench, table in tables.TABLES.items():
        found = [row for row in rows if row["bench"] == bench]
        if any("min_us" in row for row in found):
            sections += [table([row for row in found if "min_us" in row])]
            sections += [text for text in (_not_measured(found), _measured(found)) if text]
    return "\n\n".join(sections) + "\n"


def _not_measured(rows: list[Row]) -> str:
    """A line per contender and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        reason = row.get("skipped") or row.get("failed")
        if reason:
            place = [str(row[name]) for name in ("layer", "batch", "network") if name in row]
            reasons.setdefault((row["contender"], reason), []).append(", ".join(place))
    return "\n".join(
        f"- {contender}: not measured at {'; '.join(dict.fromkeys(places))}: {reason}"
        for (contender, reason), places in reasons.items()
    )


def _measured(rows: list[Row]) -> str:
    runs = dict.fromkeys((row["commit"], row["date"], row["load_before"]) for row in rows)
    return "\n".join(
        f"Measured at commit {c}, {date}, load before {load}." for c, date, load in runs
    )
