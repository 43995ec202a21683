"""`python -m benchmarks cpu [--quick] [--only FILE] [--resume] [--out FOLDER]`: measure, store.

`python -m benchmarks gpu --stage STAGE`: see gpu/command.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

from benchmarks.report.collect import Rows

HERE = Path(__file__).resolve().parent
CPU = HERE / "cpu"


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["gpu"]:
        from benchmarks.gpu import command as gpu

        return gpu.main(words[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("suite", choices=["cpu", "gpu"])
    parser.add_argument("--quick", action="store_true", help="few layers and rounds, two minutes")
    parser.add_argument(
        "--only",
        choices=sorted(path.stem.removeprefix("bench_") for path in CPU.glob("bench_*.py")),
        help="run one file; the stored rows of the others stay",
    )
    parser.add_argument("--resume", action="store_true", help="leave out rows of this commit")
    parser.add_argument("-k", help="run only what this pytest expression names")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of cpu.json and cpu.md (default: benchmarks/results, with --quick "
        "out/benchmarks)",
    )
    arguments = parser.parse_args(words)
    quick = arguments.quick
    out = arguments.out or (HERE.parent / "out" / "benchmarks" if quick else HERE / "results")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of peers, which do not ask torch
    rows = Rows(out / "cpu.json", arguments.resume)
    status = pytest.main(
        [
            str(CPU / f"bench_{arguments.only}.py" if arguments.only else CPU),
            *("-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"),
            *("-o", "addopts=", "-o", "filterwarnings=ignore", "-p", "no:cacheprovider", "-q"),
            *("--benchmark-only", "--benchmark-disable-gc", "--benchmark-quiet"),
            *(["-k", arguments.k] if arguments.k else []),
            *(["--quick"] if quick else []),
        ],
        plugins=[rows],
    )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        rows.save()
        return int(status)
    print(rows.save() if arguments.k else rows.finish())
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
