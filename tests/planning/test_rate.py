"""The rate of a machine: measured once, kept where repetitions agree, and followed by dispatch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lottery_sparse import measurements
from lottery_sparse.ops import dispatch, limits
from lottery_sparse.planning import rate
from lottery_sparse.planning.rate import Rate

needs_kernels = pytest.mark.skipif(not dispatch.built("cpu"), reason="the kernels are not built")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of this test, on a machine that may be measured."""
    monkeypatch.setenv("LS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LS_MACHINE")
    return tmp_path


def keep(ratio):
    file, key = measurements.RATE
    measurements.put(file, key, held=measurements.held(), ratio=ratio, spread=0.0)


def in_process(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout.split()


def test_densities_scale_where_the_rate_is_another_one():
    assert limits.scale_of(None) == 1
    assert limits.scale_of(limits.MEASURED_AT) == 1
    assert limits.scale_of(limits.MEASURED_AT * 1.09) == 1  # noise
    assert limits.scale_of(limits.MEASURED_AT * 2) == 0.5
    assert limits.scale_of(limits.MEASURED_AT / 2) == 2


def test_processes_follow_what_was_measured(folder):
    keep(limits.MEASURED_AT * 2)
    code = "import lottery_sparse.ops.limits as l; print(l.MAX_DENSITY_LINEAR, l.MAX_DENSITY_CONV)"
    assert in_process(code) == ["0.225", "0.2"]
    assert in_process("import experiments;" + code) == ["0.45", "0.4"]  # studies do not


def test_no_density_is_above_one(folder):
    keep(limits.MEASURED_AT / 4)
    code = "import lottery_sparse.ops.limits as l; print(l.MAX_DENSITY_QUICK, l.MAX_DENSITY_MASKED)"
    assert in_process(code) == ["1.0", "1.0"]


def test_what_was_measured_may_be_ignored(folder, monkeypatch):
    keep(3.0)
    assert measurements.dense_rate() == 3.0
    monkeypatch.setenv("LS_MACHINE", "0")
    assert measurements.dense_rate() is None


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": "another one"},
        {"torch": "1.0"},
        {"kernels": "built later"},
        {"held": ["AVX2", "", ""]},
        {"time": 0.0},  # older than any
        {"ratio": "3.0"},
        {"ratio": -1},
        {"ratio": 0},
    ],
    ids=str,
)
def test_a_rate_of_something_else_does_not_count(folder, change):
    keep(3.0)
    file, key = measurements.RATE
    entries = json.loads((folder / file).read_text())
    entries[key] |= change
    (folder / file).write_text(json.dumps(entries))
    assert measurements.dense_rate() is None


@needs_kernels
def test_a_machine_is_measured_once(folder, monkeypatch):
    calls = []
    found = [Rate(3.0, 0.5), Rate(2.5, 0.01)]
    monkeypatch.setattr(rate, "measure", lambda: calls.append(1) or found[len(calls) - 1])
    rate.measure_once()
    assert measurements.dense_rate() is None  # repetitions do not agree
    rate.measure_once()
    rate.measure_once()
    assert measurements.dense_rate() == 2.5
    assert len(calls) == 2


@needs_kernels
def test_nothing_is_measured_where_nobody_asks(folder, monkeypatch):
    monkeypatch.setenv("LS_MACHINE", "0")
    monkeypatch.setattr(rate, "measure", lambda: pytest.fail("it is measured"))
    rate.measure_once()
    assert list(folder.iterdir()) == []


@needs_kernels
def test_a_rate_is_of_two_times(monkeypatch):
    monkeypatch.setattr(rate, "_SECONDS", 0.0)
    dispatch.library_of("cpu")
    found = rate.measure()
    assert found.ratio > 0
    assert found.spread >= 0


@needs_kernels
def test_the_ratio_is_per_multiply_add(monkeypatch):
    monkeypatch.setattr(rate, "_in_turns", lambda *calls: [[2.0, 2.1, 2.2, 9.0], [3.0, 3.0, 3.6]])
    dispatch.library_of("cpu")
    found = rate.measure()
    assert found.ratio == pytest.approx(1.5 / rate._KEEP, rel=0.01)  # of so many entries, drawn
    assert found.spread == pytest.approx(0.2)
