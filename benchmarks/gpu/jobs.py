"""What the GPU gate runs in processes of its own: build, tests/ops/triton, compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Case, Row

ROOT = Path(__file__).resolve().parents[2]
SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"
TOOLS = ("memcheck", "racecheck")


def case(name: str, what: str) -> Case:
    return Case("gate", name, what, "", lambda device: {}, dtype="")


def build(dry: bool, limit: float, commit: str) -> list[tuple[Case, Row]]:
    """The extension, in place, against the installed torch; nothing if this commit's is there."""
    place = case("build", "setup.py build_ext --inplace")
    if dry:
        return [(place, {"skipped": "dry run: C++ for CUDA needs nvcc and a CUDA build of torch"})]
    stamp = ROOT / "build" / "gpu-commit"
    if stamp.is_file() and stamp.read_text() == commit:
        return []
    started = time.time()
    job = Job(place, read_build).start(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a"),
        MAX_JOBS=str(os.cpu_count()),
    )
    row = job.row(started + limit)
    if row["ok"]:
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text(commit)
    return [(place, row | {"seconds": round(time.time() - started, 1)})]


def read_build(text: str, status: int | None) -> Row:
    built = sorted(path.name for path in (ROOT / "lottery_sparse").glob("*.so"))
    good = status == 0 and any("_C_cuda" in name for name in built)
    return {"ok": good, "summary": ", ".join(built) or "nothing built"}


@dataclass
class Job:
    """A process that runs beside the others, and how to read what it has written."""

    case: Case
    read: Callable[[str, int | None], Row]  # output, exit status (None: stopped)
    process: Any = None
    output: Any = None
    why_not: str = ""

    def start(self, command: list[str], **variables: str) -> Job:
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `row` closes it
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | variables,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def row(self, until: float) -> Row:
        if self.process is None:
            return {"skipped": self.why_not}
        try:
            status = self.process.wait(max(0.0, until - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # the group that it leads
            self.process.wait()
            status = None
        self.output.seek(0)
        text = self.output.read()
        self.output.close()
        row = self.read(text, status)
        return row if row["ok"] else row | {"log": text[-3000:]}


def start(dry: bool) -> list[Job]:
    """All of them at once: tests mostly compile, and the machine has cores for that."""
    files = sorted((ROOT / "tests" / "ops" / "triton").glob("test_*.py"))
    jobs = [run_tests(path, collect_only=dry) for path in files[:1] if dry]
    jobs += [run_tests(path) for path in files if not dry]
    found = shutil.which("compute-sanitizer") or (SANITIZER if Path(SANITIZER).exists() else None)
    for tool in TOOLS:
        job = Job(case("sanitizer", tool), read_sanitizer)
        if dry or found is None:
            job.why_not = "dry run" if dry else "compute-sanitizer is not on the path"
        else:
            command = [found, "--tool", tool, "--error-exitcode", "99"]
            # memory of torch's own allocator would hide writes beyond a tensor
            job.start(
                [*command, sys.executable, "-m", "benchmarks.gpu.gate"],
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
        jobs.append(job)
    return jobs


def run_tests(path: Path, collect_only: bool = False) -> Job:
    command = [
        *(sys.executable, "-m", "pytest", "-v", "-rN", "--tb=short", str(path)),
        *("-o", "addopts=", "-o", "filterwarnings=ignore", "-p", "no:cacheprovider"),
    ]
    if collect_only:
        command += ["--collect-only", "-q"]
    elif importlib.util.find_spec("xdist"):
        command += ["-n", "2"]
    # tests run in torch's deterministic mode, in which cuBLAS asks for this
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if collect_only:
        variables["TRITON_INTERPRET"] = "1"
    return Job(case("tests", path.name), read_tests).start(command, **variables)


def collect(jobs: list[Job], until: float) -> list[tuple[Case, Row]]:
    return [(job.case, job.row(until)) for job in jobs]


def read_tests(text: str, status: int | None) -> Row:
    """Counts of `pytest -v`, which are there even if it was stopped."""
    found = re.findall(r"^(?=.*::)(.*?)\b(PASSED|FAILED|ERROR|SKIPPED)\b(.*)$", text, re.M)
    counts = {
        word.lower(): sum(1 for _, outcome, _ in found if outcome == word)
        for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    wrong = [
        (name if "::" in name else rest).strip().split("::", 1)[-1]
        for name, outcome, rest in found
        if outcome in ("FAILED", "ERROR")
    ]
    listed = ", ".join(f"{n} {word}" for word, n in counts.items() if n) or "nothing ran"
    if collected := re.search(r"^(\d+) tests? collected", text, re.M):
        listed = f"{collected[1]} collected"
    return {
        "counts": counts,
        "ok": status == 0,
        "summary": listed + ("" if status is not None else ", stopped when the time was up"),
        "wrong": wrong[:20],
    }


def read_sanitizer(text: str, status: int | None) -> Row:
    # memcheck: "ERROR SUMMARY: 2 errors"; racecheck: "RACECHECK SUMMARY: 1 hazard displayed (...)"
    found = re.findall(r"[A-Z]+ SUMMARY: (.+)", text)
    summary = found[-1] if found else "said no summary"
    return {
        "ok": status == 0 and bool(found),
        "summary": summary if status is not None else f"{summary}, stopped when the time was up",
    }
