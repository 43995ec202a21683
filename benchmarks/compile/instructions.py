"""`python -m benchmarks.compile.instructions [--write]`: what the kernels execute, by callgrind.

A count does not depend on what else the machine does, so a change of 3% is a change of the code.
Counted for the variants that valgrind can run: portable and AVX2. Per product of a kept weight and
a batch element (convolutions: and a pixel) for products and whole steps, per weight for ternary
ones, per entry or element for the others. Fails if a count grew by more than 3% over
results/instructions.json; --write stores what was counted.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STORED = HERE.parent / "results" / "instructions.json"
BUILD = ROOT / "build" / "instructions"
DRIVERS = (
    "common/variants",
    "conv2d/sparse_conv2d",
    "conv2d/sparse_conv2d_planes",
    "linear/compact_linear",
    "step/train_step",
)
PROGRAM = ("instructions", "instructions_conv2d", "instructions_packed", "instructions_step")
SLACK = 0.03
X86 = platform.machine().lower() in ("x86_64", "amd64")


def why_not() -> str | None:
    """Why nothing can be counted here, or None."""
    if not shutil.which("valgrind"):
        return "valgrind is not installed (on Debian and Ubuntu: apt-get install valgrind)"
    if not _compiler():
        return "no C++ compiler was found ($CXX, c++, g++, clang++)"
    return None


def count() -> dict[str, Any]:
    """{"compiler", "counts": {variant: {kernel: instructions per unit of work}}}."""
    variants = {"portable": []} | ({"avx2": _setup()["AVX2"]} if _runs_avx2() else {})
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        programs = _build(variants, pool)
        counted = dict(zip(programs, pool.map(_callgrind, programs.values()), strict=True))
    return {"compiler": _version(_compiler()), "counts": counted}


def grown(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """A sentence for each count that is more than 3% over `before`."""
    return [
        f"{kernel} ({variant}) takes {new:.3f} instructions per unit, stored are {old:.3f}: "
        f"{new / old - 1:+.1%}."
        for variant, kernels in now["counts"].items()
        for kernel, new in kernels.items()
        if (old := before["counts"].get(variant, {}).get(kernel)) and new > old * (1 + SLACK)
    ]


def comparable(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Counts are those of one compiler."""
    return now["compiler"] == before["compiler"]


def as_text(now: dict[str, Any]) -> str:
    columns = now["counts"]
    lines = [f"{'instructions per unit':40}" + "".join(f"{variant:>12}" for variant in columns)]
    for kernel in next(iter(columns.values())):
        lines.append(f"{kernel:40}" + "".join(f"{c[kernel]:12.3f}" for c in columns.values()))
    return "\n".join(lines)


# ---- building and running ------------------------------------------------------------------------


def _compiler() -> str | None:
    named = os.environ.get("CXX", "").split()
    return next(filter(None, map(shutil.which, (*named[:1], "c++", "g++", "clang++"))), None)


def _version(program: str | None) -> str:
    said = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True)
    # "c++ (Debian 12.2.0) 12.2.0" and "g++ (Debian 12.2.0) 12.2.0" are one compiler
    return said.stdout.splitlines()[0].split(maxsplit=1)[-1]


def _runs_avx2() -> bool:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return X86 and {"avx2", "fma", "bmi1", "bmi2", "popcnt"} <= flags


def _setup() -> dict[str, list[str]]:
    """The lists of flags in setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in assigned
        if isinstance(node.targets[0], ast.Name) and node.targets[0].id in ("FLAGS", "AVX2")
    }


def _build(variants: dict[str, list[str]], pool: ThreadPoolExecutor) -> dict[str, Path]:
    """Compiles what is older than its sources; returns the program of each variant.

    Each program has one instruction set, which its drivers know as the portable one.
    """
    setup = _setup()
    common = [
        _compiler(),
        *setup["FLAGS"],
        f"-I{ROOT}/csrc",
        "-DLS_VARIANT=portable",
        "-DLS_X86_VARIANTS=0",
    ]
    shared = [ROOT / "csrc" / f"{name}.cpp" for name in DRIVERS]
    shared += [HERE / f"{name}.cpp" for name in PROGRAM]
    wanted = [(BUILD / "shared" / f"{source.stem}.o", source, []) for source in shared]
    for variant, flags in variants.items():
        sources = sorted((ROOT / "csrc").glob("*/*_cpu.cpp"))
        wanted += [(BUILD / variant / f"{source.stem}.o", source, flags) for source in sources]
    headers = [*(ROOT / "csrc").rglob("*.h"), *HERE.glob("*.h"), ROOT / "setup.py", Path(__file__)]
    newest = max(p.stat().st_mtime for p in headers)

    def compiled(wish: tuple[Path, Path, list[str]]) -> Path:
        out, source, flags = wish
        if not _newer(out, max(newest, source.stat().st_mtime)):
            out.parent.mkdir(parents=True, exist_ok=True)
            _run(*common, *flags, "-c", source, "-o", out)
        return out

    objects = list(pool.map(compiled, wanted))
    programs = {variant: BUILD / variant / "instructions" for variant in variants}
    for variant, program in programs.items():
        parts = [p for p in objects if p.parent.name in ("shared", variant)]
        if not _newer(program, max(p.stat().st_mtime for p in parts)):
            _run(*common, *parts, "-o", program)
    return programs


def _newer(path: Path, time: float) -> bool:
    return path.is_file() and path.stat().st_mtime > time


def _callgrind(program: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        said = _run(
            *("valgrind", "-q", "--tool=callgrind", "--instr-atstart=no"),
            *(f"--callgrind-out-file={out}", program),
        )
        units = dict(line.rsplit(" ", 1) for line in said.splitlines())
        counted = {}
        for dump in Path(folder).glob("out.*"):
            text = dump.read_text()
            kernel = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.M)
            total = re.search(r"^totals: (\d+)$", text, re.M)
            if kernel and total:
                counted[kernel[1]] = int(total[1])
    return {kernel: round(counted[kernel] / int(units[kernel]), 4) for kernel in units}


def _run(*command: object) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"LS_CPU": "portable"},  # the only one that a program knows
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile.instructions")
    parser.add_argument("--write", action="store_true", help="store the counts as the limit")
    arguments = parser.parse_args(argv)
    if reason := why_not():
        print(f"nothing is counted: {reason}.")
        return 0
    now = count()
    print(as_text(now))
    if arguments.write:
        STORED.write_text(json.dumps(now, indent=1) + "\n")
        return 0
    before = json.loads(STORED.read_text())
    if not comparable(now, before):
        print(f"not compared: this is {now['compiler']}, stored is {before['compiler']}.")
        return 0
    for sentence in (found := grown(now, before)):
        print(sentence)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
