"""`python -m lottery_sparse doctor [--json]` and `python -m lottery_sparse build`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from lottery_sparse import doctor


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lottery_sparse")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser(
        "doctor",
        help="versions, kernels, which backend each op takes and why, and a self-check",
        description="Says what is installed and checks every backend against the reference. "
        "Exit status 0 if all that is installed works, 1 if not.",
    )
    show.add_argument("--json", action="store_true", help="the same as one JSON object")
    commands.add_parser(
        "build",
        help="build the kernels against the installed torch (in a checkout)",
        description="Builds csrc/ in place against the installed torch and says what came of it.",
    )
    arguments = parser.parse_args(argv)
    return _doctor(arguments.json) if arguments.command == "doctor" else _build()


def _doctor(as_json: bool) -> int:
    # the report itself says that kernels are missing; the first op need not say it too
    logging.getLogger("lottery_sparse").setLevel(logging.ERROR)
    found = doctor.report()
    print(json.dumps(found, indent=2) if as_json else doctor.as_text(found))
    return 0 if found["healthy"] else 1


def _build() -> int:
    root = Path(__file__).resolve().parent.parent
    if not (root / "setup.py").is_file() or not (root / "csrc").is_dir():
        print(
            "There are no kernel sources beside this installed package; in a checkout, or an "
            "unpacked source distribution, run `pip install --no-build-isolation .` instead.",
            file=sys.stderr,
        )
        return 1
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"LS_BUILD": "require"}
    status = subprocess.run(command, cwd=root, env=environment).returncode
    if status:
        print("The kernels were not built; the compiler's messages are above.", file=sys.stderr)
        return 1
    # a fresh interpreter, since this one has looked for the old files already
    say = "from lottery_sparse import doctor; print(doctor.native_line())"
    return subprocess.run([sys.executable, "-c", say], cwd=root).returncode


if __name__ == "__main__":
    sys.exit(main())
