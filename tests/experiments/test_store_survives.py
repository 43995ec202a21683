"""The store when disks fail, and when its writers are killed or compete."""

import errno
import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import sweep_problems
import torch
from sweep_problems import RECORD, ROUNDS, ROW, RUN, follow_all, ids, written

from experiments.store.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


# what is written when nothing can be


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    follow_all(folder, 4)
    assert len(written(folder)) == 4 * ROUNDS
    return written(folder)


@contextmanager
def failing_calls(first: int, code: int, for_good: bool, monkeypatch):
    """Calls that change files fail from that number on, or just that one; yields what happened."""
    failed = []

    def fail(name, args):
        if for_good or not failed:
            failed.append(name)
            if name == "write":
                sweep_problems.REAL_WRITE(args[0], bytes(args[1])[: len(args[1]) // 2])
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        for name in sweep_problems.CALLS:
            patch.setattr(os, name, getattr(os, name))
        sweep_problems.at_call(first, fail)
        yield failed


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_anywhere(code, for_good, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # only for its time
    for number in range(0, 1_000, 3 if for_good else 1):
        folder = tmp_path / str(number)
        said = None
        with failing_calls(number, code, for_good, monkeypatch) as failed:
            try:
                follow_all(folder, 4)
            except OSError as error:
                said = error
        if not failed:
            break
        if said is not None:
            assert said.errno == code
            assert os.strerror(code) in str(said)
        if (folder / "store.json").exists():  # no half of a group
            counts = [len(Store(folder).rounds_done(run_id)) for run_id in ids(4)]
            assert counts[0] == counts[1]
            assert counts[2] == counts[3]
        follow_all(folder, 4)
        assert written(folder) == undisturbed
    assert number > 50


@contextmanager
def largest_file(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_real_limit(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW], [RECORD] * 40)
        before = (store.folder / "rows.jsonl").read_bytes(), store.records()
        rows = [ROW | {"round": number} for number in range(1, 15)]
        size = (store.folder / "runs.jsonl").stat().st_size
        with largest_file(size + 90), pytest.raises(OSError) as caught:
            store.add(lease, rows, [RECORD])
        assert caught.value.errno == errno.EFBIG
        assert "rows.jsonl cannot be written (File too large): nothing of this" in str(caught.value)
        assert ((store.folder / "rows.jsonl").read_bytes(), store.records()) == before
        with largest_file(1_000), pytest.raises(OSError, match="File too large"):
            store.save(lease, RUN, {"w": torch.ones(1_000)}, {})
        assert list((store.folder / "checkpoints").iterdir()) == []
        store.add(lease, rows, [RECORD])
    assert store.rounds_done(RUN) == set(range(15))


# who is killed, and who competes


def is_of(line: bytes, run_ids: list[str]) -> bool:
    return json.loads(line)["run_id"] in run_ids


def program(*arguments: object) -> int:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, sweep_problems.__file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return int(done.stdout)


def test_a_worker_killed_at_any_of_its_calls(tmp_path, undisturbed):
    calls = program("kill_anywhere", tmp_path, 2)
    assert calls > 50
    for number in range(calls + 1):
        assert written(tmp_path / str(number)) == [x for x in undisturbed if is_of(x, ids(2))]
        assert not os.listdir(tmp_path / str(number) / "leases")


def test_workers_killed_at_random_moments(tmp_path):
    assert program("kill_sometime", tmp_path / "killed", 40, 60) > 20
    program("kill_sometime", tmp_path / "undisturbed", 40, 0)
    assert written(tmp_path / "killed") == written(tmp_path / "undisturbed")
    assert len(written(tmp_path / "killed")) == 40 * ROUNDS


def test_each_of_200_runs_is_run_once_by_16_workers(tmp_path):
    assert program("compete", tmp_path, 200, 16) == 0
    store = Store(tmp_path)
    assert sorted(row["run_id"] for row in store.rows()) == sorted(ids(200))
    records = store.records()
    assert len(records) == 200
    assert len({record["pid"] for record in records}) > 8
