"""From pytest-benchmark's JSON to ours: machine, rows, and tables of ratios."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lottery_sparse import doctor

ROOT = Path(__file__).resolve().parent.parent
ANY_DENSITY = ("F.linear", "bare mm", "prune")  # as in bench_masked_linear.py


def machine() -> dict[str, Any]:
    """What a number depends on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "native": doctor.native_line(),
        "threads": "1 unless a row says otherwise",
    }


def run(load: float) -> dict[str, Any]:
    """What rows measured together share. load: processes running before they began."""
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "load_before": round(load, 2),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        by_name = {name.strip(): value.strip() for name, value in fields.items()}
        return "{model name} (family {cpu family}, model {model})".format_map(by_name)
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit measured, with "+" if what is measured differs from it."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "csrc", "lottery_sparse", "setup.py", "benchmarks")
    measured = [line for line in changed.splitlines() if "benchmarks/results" not in line]
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if measured else "")


def rows(pytest_benchmark: dict[str, Any], run: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per benchmark: what it was, and its times in microseconds."""
    return [
        {
            "bench": bench["name"].split("[")[0].removeprefix("bench_"),
            **bench["extra_info"],
            "min_us": round(bench["stats"]["min"] * 1e6, 1),
            "median_us": round(bench["stats"]["median"] * 1e6, 1),
            "rounds": bench["stats"]["rounds"],
            **run,
        }
        for bench in pytest_benchmark["benchmarks"]
    ]


def as_markdown(machine: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    tables = {"step": _linear_tables, "keep_top": _selection_table}
    sections = [
        "# CPU benchmarks",
        "Written by `python -m benchmarks cpu`. Times are minima; a ratio is the time of the dense "
        "peer over the contender's, so more is faster.",
        facts,
    ]
    for bench, table in tables.items():
        found = [row for row in rows if row["bench"] == bench]
        if found:
            sections += [table(found), _measured(found)]
    return "\n\n".join(sections) + "\n"


def _measured(rows: list[dict[str, Any]]) -> str:
    runs = dict.fromkeys((row["commit"], row["date"], row["load_before"]) for row in rows)
    return "\n".join(
        f"Measured at commit {c}, {date}, load before {load}." for c, date, load in runs
    )


def _linear_tables(rows: list[dict[str, Any]]) -> str:
    """Per layer and batch: contenders down, densities across."""
    time = {(r["layer"], r["batch"], r["contender"], r["density"]): r["min_us"] for r in rows}
    densities = sorted({r["density"] for r in rows}, reverse=True)
    lines = [
        "## One step of a linear layer: forward, dx, dW",
        "Ratio to `F.linear`, by density. `count` is the share of the F.linear step that counting "
        "the mask once takes. Contenders: benchmarks/bench_masked_linear.py.",
        _row("layer, batch", "F.linear µs", "contender", *(f"{d:g}" for d in densities)),
        _row(*["---"] * (3 + len(densities))),
    ]
    for layer, batch in dict.fromkeys((r["layer"], r["batch"]) for r in rows):
        dense = time[layer, batch, "F.linear", densities[0]]
        where = (f"{layer}, {batch}", f"{dense:.0f}")
        for contender in dict.fromkeys(
            r["contender"] for r in rows if r["contender"] != "F.linear"
        ):
            times = [time.get((layer, batch, contender, d)) for d in densities]
            if contender == "count":
                cells = [f"{t / dense:.1%}" if t else "" for t in times]
            else:
                cells = [f"{dense / t:.2f}" if t else "" for t in times]
            if contender in ANY_DENSITY:
                cells = cells[:1] * len(cells)
            lines.append(_row(*where, contender, *cells))
            where = ("", "")
    return "\n".join(lines[:1] + [""] + lines[1:2] + [""] + lines[2:])


def _selection_table(rows: list[dict[str, Any]]) -> str:
    topk = {r["keep"]: r["min_us"] for r in rows if r["contender"] == "topk"}
    lines = [
        f"## Selecting the top of {rows[0]['size']:,} scores as a mask",
        "",
        "Ratio to torch.topk(sorted=False) of abs(normal) scores, one thread, same share kept.",
        "",
        _row("scores", "kept", "threads", "contender", "ms", "ratio"),
        _row(*["---"] * 6),
    ]
    for r in rows:
        ms, ratio = r["min_us"] / 1e3, topk[r["keep"]] / r["min_us"]
        lines.append(
            _row(r["scores"], r["keep"], r["threads"], r["contender"], f"{ms:.1f}", f"{ratio:.1f}")
        )
    return "\n".join(lines)


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
