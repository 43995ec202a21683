"""The GPU benchmarks on a machine without a GPU: every stage walks, rows are kept and compared."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import command as gpu
from benchmarks.gpu import gate as gpu_gate
from benchmarks.gpu import jobs as gpu_jobs
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu.rows import Case, Run, Store
from lottery_sparse.ops.masked import dense as masked_dense
from lottery_sparse.ops.masked import reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_dry_run_walks_every_stage(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--stage", "all", "--dry-run"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    wrong = [row for row in rows if "failed" in row or not row.get("ok", True)]
    assert not wrong, wrong
    measured = {(row["stage"], row["name"]) for row in rows if row.get("ok")}
    assert measured >= {
        ("ceilings", "rate"), ("train", "step"), ("train", "forward"), ("train", "dvalues"),
        ("train", "conv step"), ("infer", "product"), ("study", "group step"),
    }  # fmt: skip
    checked = {row["name"] for row in rows if row["stage"] == "gate" and row.get("ok")}
    assert checked == {"parity", "opcheck", "tests"}
    assert not any("us" in row for row in rows)
    reasons = ("dry run", "there is no", "not built", "cannot be imported", "need a GPU", "refuses",
               "no registered op", "has no triton backend", "forced backend")  # fmt: skip
    for row in rows:
        assert "skipped" not in row or any(text in row["skipped"] for text in reasons), row
    assert "# GPU benchmarks" in (tmp_path / "gpu.md").read_text()


# ---- the file of rows ----------------------------------------------------------------------------


def case(name: str, contender: str = "ours", **fields) -> Case:
    return Case("train", name, contender, "64x64", lambda device: {}, **fields)


def run(name: str, commit: str = "abc") -> Run:
    return Run(name, commit, "a GPU", "2026-01-01")


def test_never_measured_rows_come_first_and_rows_of_this_commit_are_left_out(tmp_path):
    store = Store(tmp_path / "gpu.json")
    store.put(case("old"), run("1", "older"), {"us": 1.0})
    store.put(case("failed"), run("1"), {"failed": "no"})
    store.put(case("done"), run("1"), {"us": 1.0})
    store.put(case("tried"), run("2"), {"failed": "no"})
    everything = [case(name) for name in ("failed", "old", "tried", "done", "new")]
    found = Store(tmp_path / "gpu.json").left(everything, run("2"))
    assert [c.name for c in found] == ["new", "old", "failed"]
    other_card = Run("2", "abc", "another GPU", "2026-01-01")
    assert len(store.left(everything, other_card)) == len(everything)


def test_a_new_file_starts_from_the_stored_one(tmp_path):
    stored = Store(tmp_path / "before.json")
    stored.runs["1"] = {"driver": "5"}
    stored.put(case("a"), run("1"), {"us": 2.0})
    new = Store(tmp_path / "out" / "gpu.json", tmp_path / "before.json")
    new.put(case("b"), run("2"), {"us": 3.0})
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["a", "b"]
    assert found["runs"] == {"1": {"driver": "5"}}


def test_ratios_and_limits_follow_from_rows_of_the_same_card(tmp_path):
    store = Store(tmp_path / "gpu.json")
    store.put(case("step", "dense", peer=True), run("1"), {"us": 30.0})
    store.put(case("step", "other", density=0.5, peer=True), run("1"), {"us": 99.0})
    store.put(case("step", density=0.1), run("1"), {"us": 10.0, "bytes": 15e6})
    row = store.rows[gpu_rows._key(case("step", density=0.1).place | {"gpu": "a GPU"})]
    assert row["ratios"] == {"dense": 3.0}
    assert row["of_limit"] == 0.5  # 15 MB at 3 TB/s are 5 us
    copy = Case("ceilings", "rate", "torch", "copy", lambda device: {})
    store.put(copy, run("1"), {"us": 10.0, "bytes": 15e6})
    assert row["of_limit"] == 1.0


def test_the_table_is_short_and_names_what_is_wrong_first():
    rows = [case(f"{i}").place | {"us": 1.0, "gpu": "a"} for i in range(500)]
    rows.append(case("bad").place | {"ok": False, "summary": "error 1", "gpu": "a"})
    text = gpu_rows.short_table(rows)
    assert len(text) <= gpu_rows.TABLE
    assert text.startswith("bad")
    assert text.endswith("more lines, in gpu.md")


# ---- processes -----------------------------------------------------------------------------------


def start(program: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program], start_new_session=True)


def test_a_worker_that_hangs_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CASE_SECONDS", 0.3)
    process = start("import time; time.sleep(60)")
    assert gpu.watch(process, tmp_path / "gpu.json", 1e12) == "stopped after 0 s"
    assert process.returncode != 0
    process = start("import time; time.sleep(60)")
    assert gpu.watch(process, tmp_path / "gpu.json", 0.0) == "the time was up"
    assert gpu.watch(start("pass"), tmp_path / "gpu.json", 1e12) is None


DIES = """
import os, sys
from pathlib import Path
from benchmarks.gpu.command import ENDED
from benchmarks.gpu.rows import Case, Run, Store
run = Run("1", "abc", "a GPU", "2026-01-01")
store = Store(Path(sys.argv[1]))
left = store.left([Case("gate", n, "ours", "", None) for n in "ab"], run)
if left:
    store.put(left[0], run, {"failed": ENDED})
    os._exit(3)
"""


def test_a_worker_that_dies_is_followed_by_one_for_the_other_cases(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(
        gpu, "worker_command", lambda *arguments: [sys.executable, "-c", DIES, str(path)]
    )
    options = gpu.parse(["--stage", "gate", "--dry-run", "--out", str(tmp_path)])
    gpu.run_workers(options, run("1"), time.time() + 60)
    rows = Store(path).rows.values()
    assert [(row["name"], row["failed"]) for row in rows] == [("a", gpu.ENDED), ("b", gpu.ENDED)]


def test_a_worker_that_dies_before_any_case_is_not_tried_again(tmp_path, monkeypatch, capsys):
    program = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(1)"
    count = tmp_path / "count"
    monkeypatch.setattr(
        gpu, "worker_command", lambda *arguments: [sys.executable, "-c", program, str(count)]
    )
    options = gpu.parse(["--stage", "gate", "--dry-run", "--out", str(tmp_path)])
    gpu.run_workers(options, run("1"), time.time() + 60)
    assert count.read_text() == "x"
    assert "before any case" in capsys.readouterr().out


def test_counts_of_tests_that_ran_alone_beside_others_or_were_stopped():
    alone = "tests/a.py::test_b[x] PASSED [ 50%]\ntests/a.py::test_c FAILED [100%]\n"
    row = gpu_jobs.read_tests(alone, 1)
    assert (row["counts"]["passed"], row["counts"]["failed"], row["wrong"]) == (1, 1, ["test_c"])
    beside = "[gw0] [ 50%] PASSED tests/a.py::test_b \n[gw1] [100%] ERROR tests/a.py::test_c \n"
    row = gpu_jobs.read_tests(beside, None)
    assert (row["counts"]["passed"], row["counts"]["error"], row["wrong"]) == (1, 1, ["test_c"])
    assert row["summary"].endswith("stopped when the time was up")
    assert not row["ok"]
    assert not gpu_jobs.read_tests("", 4)["ok"]


def test_a_real_file_of_tests(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    job = gpu_jobs.run_tests(path)
    ((_, row),) = gpu_jobs.collect([job], 1e12)
    assert (row["counts"]["passed"], row["counts"]["failed"], row["wrong"]) == (1, 1, ["test_bad"])
    assert "assert False" in row["log"]


def test_sanitizers_must_say_that_they_found_nothing():
    good = gpu_jobs.read_sanitizer("========= ERROR SUMMARY: 0 errors\n", 0)
    assert good == {"ok": True, "summary": "0 errors"}
    assert not gpu_jobs.read_sanitizer("========= ERROR SUMMARY: 2 errors\n", 99)["ok"]
    assert not gpu_jobs.read_sanitizer("", 0)["ok"]


# ---- timing, on a GPU that is pretended ----------------------------------------------------------


class Pretended:
    """What gpu_timing uses of torch.cuda; calls take a millisecond, one of them can refuse."""

    def __init__(self, monkeypatch, refuses: bool):
        self.recorded: list | None = None
        self.refuses = refuses
        pretended = {
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 1000,
            "max_memory_allocated": lambda: 9000,
            "Event": lambda enable_timing: Event(),
            "CUDAGraph": lambda: self,
            "graph": self.capture,
        }
        for name, value in pretended.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def capture(self, graph, stream):
        self.recorded = []
        yield
        if self.refuses:
            raise RuntimeError("no capture of this")

    def call(self) -> None:
        time.sleep(1e-3)

    def replay(self) -> None:
        self.call()

    def reset(self) -> None:
        self.recorded = None


class Event:
    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return (other.time - self.time) * 1e3


def test_times_are_those_of_replays_per_call(monkeypatch):
    monkeypatch.setattr(gpu_timing, "SECONDS", 0.01)
    card = Pretended(monkeypatch, refuses=False)
    work = gpu_timing.Work(card.call, calls=2, bytes=5.0, weights=1000, held=2000.0)
    row = gpu_timing.timed(gpu_timing.Device(dry=False), lambda: work)
    assert (row["mode"], row["rounds"]) == ("graph", gpu_timing.REPLAYS)
    assert 500 <= row["min_us"] <= row["us"] < 5000  # a millisecond for two
    assert (row["bytes"], row["peak_bytes"], row["peak_per_weight"]) == (5.0, 6000.0, 6.0)


def test_what_cannot_be_captured_is_timed_eagerly_and_says_so(monkeypatch):
    card = Pretended(monkeypatch, refuses=True)
    row = gpu_timing.timed(gpu_timing.Device(dry=False), lambda: gpu_timing.Work(card.call))
    assert (row["mode"], row["no_graph"]) == ("eager", "no capture of this")
    assert row["min_us"] >= 1000


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, 1.0, torch.nan])
def test_parity_sees_a_single_wrong_number(monkeypatch, wrong):
    def forward(a):
        y = reference.masked_linear(a)
        if wrong is not None:
            y[3, 4] += wrong * y.abs().mean()
        return y

    monkeypatch.setattr(masked_dense, "masked_linear", forward)
    problem = gpu_gate.linear(200, 300, 64)
    for dtype in gpu_gate.DTYPES:
        device = gpu_timing.Device(dry=True)
        row = gpu_gate.parity("masked_linear", "dense", problem, dtype, device)
        assert row["ok"] == (wrong is None), row
