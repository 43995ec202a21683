"""Sweeps over several machines: dead workers elsewhere, and what experiments/slurm.md says."""

import argparse
import re
import subprocess
from pathlib import Path

import pytest

from experiments.__main__ import parser
from experiments.store import leases
from experiments.store.store import Store
from experiments.study.runs import Run
from experiments.sweep import sweep
from experiments.sweep.engines import _why
from experiments.sweep.sweep import wait_for_life

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Run(network="fc", profile="smoke", seed=0, criterion="none")


# a worker of another machine, which may be dead


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A store with a lease that looks like another machine's; says what time it is there."""
    store = Store(tmp_path / "store")
    clock = [0.0]
    lease = store.claim([SMOKE.id])
    path = store.folder / "leases" / SMOKE.id
    monkeypatch.setattr(leases, "_now", lambda lock: path.stat().st_mtime + clock[0])
    monkeypatch.setattr(leases, "_boot", lambda: "another machine")
    yield store, clock, lease
    lease.release()


def test_a_worker_that_shows_no_sign_of_life_is_waited_for(elsewhere, monkeypatch, capsys):
    store, clock, _ = elsewhere
    clock[0] = 3.0

    def sleep(seconds):
        clock[0] += 10
        assert clock[0] < 200

    monkeypatch.setattr(sweep.time, "sleep", sleep)
    wait_for_life([SMOKE], store)
    assert store.holders() == {}
    assert clock[0] > leases.STALE
    said = capsys.readouterr().out
    assert re.fullmatch(r"waiting for a sign of life of \S+ pid \d+; after 120 s .*\n", said)


def test_a_sign_of_life_ends_the_wait(elsewhere, monkeypatch):
    store, clock, _ = elsewhere
    clock[0], slept = 15.0, []

    def sleep(seconds):
        slept.append(seconds)
        clock[0] = clock[0] + 2 if len(slept) < 3 else 0.5

    monkeypatch.setattr(sweep.time, "sleep", sleep)
    wait_for_life([SMOKE], store)
    assert len(slept) == 3
    assert set(store.holders()) == {SMOKE.id}


def test_a_worker_of_this_machine_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: pytest.fail("it waits"))
    store = Store(tmp_path)
    with store.claim([SMOKE.id]):
        wait_for_life([SMOKE], store)


def test_a_scheduler_that_cannot_import_us_is_told_where_to_start():
    pytest.importorskip("distributed")
    for error in (
        ModuleNotFoundError("No module named 'experiments'"),
        RuntimeError("Error during deserialization of the task graph. This frequently\noccurs"),
    ):
        assert re.match(r"the scheduler or a worker cannot import .*PYTHONPATH=\$PWD", _why(error))
    assert _why(ValueError("else")).args == ("else",)


# the page


PAGE = (ROOT / "experiments/slurm.md").read_text()


def test_blocks_of_the_slurm_page_can_be_read(tmp_path):
    scripts = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    assert len(scripts) == 2
    for script in scripts:
        assert script.startswith("#!/bin/bash\n#SBATCH ")
        (tmp_path / "job.sh").write_text(script)
        subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    compile(block, "slurm.md", "exec")


def test_commands_of_the_slurm_page_are_ours(monkeypatch):
    text = PAGE.replace("\\\n", " ").replace("${networks[$SLURM_ARRAY_TASK_ID]}", "conv2")
    text = re.sub(r"`[^`\n]*\n[^`]*`", lambda m: m.group().replace("\n", " "), text)
    text = re.sub(r"\$SLURM_\w+", "4", text)
    found = re.findall(r"python -m experiments ([^`\n]+)", text)
    assert len(found) == 4
    for command in found:
        options = parser().parse_args(command.split())
        assert isinstance(options, argparse.Namespace)
