"""Everything about one GPU in one command: `python -m benchmarks gpu --stage gate --seconds 520`.

    gate    builds the extension, runs tests/ops/triton, parity of every op, opcheck, sanitizers
    train   training steps against torch's, and their kernels alone
    infer   packed weights against cuBLAS at 1 to 4096 rows
    study   45 LeNets together

Rows go into gpu.json as they come, those never measured first; what is stored for this commit is
left out, so a run that was cut goes on where it stopped. A case that fails, hangs or takes the
process with it becomes a row that says so. --dry-run walks all of it on the CPU, in Triton's
interpreter, with tiny shapes and without a clock.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.gpu import jobs as gpu_jobs
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu.rows import Case, Row, Run, Store

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("gate", "train", "infer", "study")
RESERVE = 10.0  # seconds to end in
CASE_SECONDS = 120.0  # a case that takes longer hangs
GATE_SECONDS = 180.0
RESTARTS = 30
BROKEN = 3  # exit status of a worker whose GPU answers no more
ENDED = "the process ended during this case"
SOURCES = ("lottery_sparse/**/*.py", "csrc/*/*", "setup.py", "benchmarks/**/*.py")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker:
        return worker(options)
    end = time.time() + options.seconds - RESERVE
    run = Run(
        datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"),
        options.commit or commit(),
        "dry run" if options.dry_run else gpu_name(),
        datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )
    store = Store(options.out / "gpu.json", None if options.dry_run else results() / "gpu.json")
    store.save()
    started = time.time()
    built = gpu_jobs.build(options.dry_run, min(100.0, end - started), run.commit)
    if options.stage == "gate":
        end = min(end, started + GATE_SECONDS - RESERVE)
    jobs = gpu_jobs.start(options.dry_run) if options.stage in ("gate", "all") else []
    run_workers(options, run, end)
    store = Store(options.out / "gpu.json")
    for case, row in [*built, *gpu_jobs.collect(jobs, end)]:
        store.put(case, run, row)
    (options.out / "gpu.md").write_text(gpu_rows.as_markdown(store))
    mine = [row for row in store.rows.values() if row["run"] == run.run]
    print(gpu_rows.short_table(mine))
    print(f"{len(mine)} rows of {run.gpu} at {run.commit}, in {options.out / 'gpu.json'}"[-300:])
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--stage", choices=[*STAGES, "all"], required=True)
    parser.add_argument("--seconds", type=float, default=520.0, help="stop before")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny, not timed")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of gpu.json and gpu.md (default: benchmarks/results, dry out/benchmarks)",
    )
    parser.add_argument("-k", default="", metavar="TEXT", help="only cases whose name holds TEXT")
    parser.add_argument("--commit", help="what is measured, where git cannot say it")
    for hidden in ("--worker", "--run", "--gpu", "--date", "--until"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = ROOT / "out" / "benchmarks" if options.dry_run else results()
    return options


def results() -> Path:
    return ROOT / "benchmarks" / "results"


def commit() -> str:
    """The commit; where the sources differ from it, or there is no git, with a hash of them."""
    from benchmarks.report import report

    try:
        found = report.run(0.0)["commit"]
    except OSError:  # no git at all
        found = "unknown"
    if not found.startswith("unknown") and not found.endswith("+"):
        return found
    sha = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        sha.update(path.read_bytes() if path.is_file() else b"")
    return f"{found.rstrip('+')}+{sha.hexdigest()[:8]}"


def gpu_name() -> str:
    """Asked in another process, so that this one holds no GPU."""
    command = "import torch; print(torch.cuda.is_available() and torch.cuda.get_device_name())"
    said = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout
    if said.strip() in ("", "False"):
        sys.exit("torch finds no GPU here; --dry-run walks the stages without one.")
    return said.strip()


# ---- processes that hold the GPU -----------------------------------------------------------------


def worker_command(options: argparse.Namespace, run: Run, end: float) -> list[str]:
    return [
        *(
            sys.executable,
            "-m",
            "benchmarks.gpu.command",
            "--worker",
            "1",
            "--stage",
            options.stage,
        ),
        *("--run", run.run, "--gpu", run.gpu, "--commit", run.commit, "--date", run.date),
        *("--until", str(end), "--out", str(options.out), "-k", options.k),
        *(["--dry-run"] if options.dry_run else []),
    ]


def run_workers(options: argparse.Namespace, run: Run, end: float) -> None:
    """One worker after another, until none dies before its cases are done."""
    command = worker_command(options, run, end)
    variables = os.environ | ({"TRITON_INTERPRET": "1"} if options.dry_run else {})
    tried = 0
    for _ in range(RESTARTS):
        process = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True)
        why = watch(process, options.out / "gpu.json", end)
        store = Store(options.out / "gpu.json")
        if why is not None:
            for row in store.rows.values():
                if row.get("failed") == ENDED and row["run"] == run.run:
                    row["failed"] = why
            store.save()
        before, tried = tried, sum(row["run"] == run.run for row in store.rows.values())
        if process.returncode == 0 or time.time() > end:
            return
        if tried == before:
            print(f"the worker ended with status {process.returncode} before any case")
            return


def watch(process: subprocess.Popen, path: Path, end: float) -> str | None:
    """Wait for a worker; why it was stopped, or None. It shows life by writing its rows."""
    started = time.time()
    while process.poll() is None:
        time.sleep(0.2)
        now = time.time()
        alive = max(started, path.stat().st_mtime if path.exists() else 0.0)
        why = None
        if now > end + RESERVE / 2:
            why = "the time was up"
        elif now > alive + CASE_SECONDS:
            why = f"stopped after {CASE_SECONDS:.0f} s"
        if why is not None:
            os.killpg(process.pid, signal.SIGKILL)  # the group that it leads
            process.wait()
            return why
    return None


def cases_of(stage: str, dry: bool) -> list[Case]:
    from benchmarks.gpu import gate as gpu_gate
    from benchmarks.gpu import infer as gpu_infer
    from benchmarks.gpu import parts as gpu_parts
    from benchmarks.gpu import sparse as gpu_sparse
    from benchmarks.gpu import study as gpu_study
    from benchmarks.gpu import timing as gpu_timing
    from benchmarks.gpu import train as gpu_train

    modules = {
        "gate": [gpu_gate],
        "train": [gpu_train, gpu_parts, gpu_sparse],
        "infer": [gpu_infer],
        "study": [gpu_study],
    }
    stages = STAGES if stage == "all" else (stage,)
    chosen = [module for name in stages for module in modules[name]]
    found = [case for module in chosen for case in module.cases(dry)]
    return gpu_timing.ceilings(dry) + found


def worker(options: argparse.Namespace) -> int:
    import torch

    from benchmarks.gpu.timing import Device, environment

    torch.manual_seed(0)
    device = Device(options.dry_run)
    if not options.dry_run:
        torch.backends.cudnn.benchmark = True  # for the convolutions of all contenders
        device.stream = torch.cuda.Stream()
        with torch.cuda.stream(device.stream):  # cuBLAS takes its memory now, not in a case
            for dtype in (torch.bfloat16, torch.float32):
                torch.ones(64, 64, device="cuda", dtype=dtype).mm(device.randn(64, 64, dtype=dtype))
    run = Run(options.run, options.commit, options.gpu, options.date)
    store = Store(options.out / "gpu.json")
    store.runs[run.run] = environment(device)
    cases = [case for case in cases_of(options.stage, options.dry_run) if options.k in str(case)]
    for case in store.left(cases, run):
        if time.time() > float(options.until):
            break
        store.put(case, run, {"failed": ENDED})
        row = attempt(case, device)
        store.put(case, run, row)
        wrong = "failed" in row or "no_graph" in row
        if wrong and not options.dry_run and not answers(device):
            os._exit(BROKEN)  # a CUDA error stays with its process
    return 0


def attempt(case: Case, device) -> Row:
    from benchmarks.gpu.timing import Skip

    started = time.time()
    try:
        row = case.run(device)
    except Skip as skip:
        row = {"skipped": str(skip)}
    except Exception as error:
        said = " ".join(str(error).split())
        if "forced backend" in said or re.search(r"has no \w+ backend", said):
            row = {"skipped": said[:200]}  # we ask every backend for everything
        else:
            row = {"failed": f"{type(error).__name__}: {said}"[:400]}
    return row | {"seconds": round(time.time() - started, 2)}


def answers(device) -> bool:
    """Whether the GPU still works in this process, captures included."""
    import torch

    try:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=device.stream):
            numbers = torch.rand(8, device="cuda") + 1.0
        graph.replay()
        return bool((numbers >= 1.0).all())
    except Exception:
        return False


if __name__ == "__main__":
    sys.exit(main())
