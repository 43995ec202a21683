"""`python -m benchmarks cpu [--quick] [--only FILE] [--out FOLDER]`: measure, print, store."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import report

HERE = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("suite", choices=["cpu"])
    parser.add_argument("--quick", action="store_true", help="few layers and rounds, a minute")
    parser.add_argument(
        "--only",
        choices=sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py")),
        help="run one file and keep the stored rows of the others",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of cpu.json and cpu.md (default: benchmarks/results, with --quick "
        "out/benchmarks)",
    )
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    out = arguments.out or (HERE.parent / "out" / "benchmarks" if quick else HERE / "results")
    machine, run = report.machine(), report.run(os.getloadavg()[0])
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "benchmark.json"
        status = pytest.main(
            [
                str(HERE / f"bench_{arguments.only}.py" if arguments.only else HERE),
                *("-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"),
                *("-o", "addopts=", "-p", "no:cacheprovider", "-q"),
                *("--benchmark-only", "--benchmark-disable-gc", f"--benchmark-json={measured}"),
                "--benchmark-columns=min,median",
                *(["--quick"] if quick else []),
            ]
        )
        if status != pytest.ExitCode.OK:
            return int(status)
        rows = report.rows(json.loads(measured.read_text()), run)
    stored = out / "cpu.json"
    if arguments.only and stored.is_file():
        fresh = {row["bench"] for row in rows}
        rows += [r for r in json.loads(stored.read_text())["rows"] if r["bench"] not in fresh]
    out.mkdir(parents=True, exist_ok=True)
    text = report.as_markdown(machine, rows)
    stored.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    (out / "cpu.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
