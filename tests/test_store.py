"""The store: what is read back, what is refused, and what survives who is killed when."""

import errno
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import sweep_problems
import torch
from sweep_problems import ROUNDS, follow_all, ids, written

from experiments import leases
from experiments.leases import LeaseLost
from experiments.store import Store

RUN = ids(1)[0]
ROW = {"run_id": RUN, "round": 0, "test_accuracy": 0.1 + 0.2, "kept": 3, "products": ["sparse"]}
RECORD = {"run_id": RUN, "round": 0, "seconds": 1.5}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def lines_of(store: Store) -> list[bytes]:
    return (store.folder / "rows.jsonl").read_bytes().splitlines(keepends=True)


# rows


def test_rows_come_back_as_they_were_added(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW, ROW | {"round": 1, "test_accuracy": None}], [RECORD])
    for each in (store, Store(store.folder, create=False)):
        assert each.rows() == [ROW, ROW | {"round": 1, "test_accuracy": None}]
        assert each.records() == [RECORD]
        assert each.rounds_done(RUN) == {0, 1}
        assert each.rounds_done("another") == set()


def test_a_line_is_canonical_and_carries_the_checksum_of_itself(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW], [])
    (line,) = lines_of(store)
    entry = json.loads(line)
    checksum = entry.pop("checksum")
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    assert checksum == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert b'"test_accuracy":0.30000000000000004' in line
    assert line == json.dumps(json.loads(line), sort_keys=True, separators=(",", ":")).encode() + (
        b"\n"
    )


def test_what_is_read_is_the_readers_own(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW], [])
    store.rows()[0]["kept"] = 0
    assert store.rows() == [ROW]


def test_one_store_sees_what_another_adds(store):
    other = Store(store.folder)
    assert store.rows() == []
    with other.claim([RUN]) as lease:
        for number in range(3):
            other.add(lease, [ROW | {"round": number}], [])
            assert store.rounds_done(RUN) == set(range(number + 1))


def test_an_equal_row_is_skipped_and_another_one_refused(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW], [])
        store.add(lease, [ROW, ROW | {"round": 1}, ROW | {"round": 1}], [RECORD])
        before = (lines_of(store), store.records())
        changed = ROW | {"test_accuracy": 0.3, "kept": 4, "round": 1}
        message = rf"{RUN} round 1 .*kept: 3 stored, 4 now, test_accuracy: 0.3.*4 stored, 0.3 now"
        with pytest.raises(ValueError, match=message):
            store.add(lease, [ROW | {"round": 2}, changed], [RECORD])
        with pytest.raises(ValueError, match=r"round 2 .*kept: 3 stored, 4 now"):
            store.add(lease, [ROW | {"round": 2}, ROW | {"round": 2, "kept": 4}], [])
    assert (lines_of(store), store.records()) == before
    assert len(before[0]) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value, store):
    with store.claim([RUN]) as lease, pytest.raises(ValueError, match="not JSON compliant"):
        store.add(lease, [ROW, ROW | {"round": 1, "test_accuracy": value}], [])
    assert store.rows() == []


def test_a_torn_last_line_is_cut_off_and_kept_beside(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW], [RECORD])
        whole = lines_of(store)
        with (store.folder / "rows.jsonl").open("ab") as file:
            file.write(b'{"checksum":"12')
        assert store.rows() == Store(store.folder).rows() == [ROW]
        store.add(lease, [ROW | {"round": 1}], [])
    assert lines_of(store)[:1] == whole
    assert Store(store.folder).rounds_done(RUN) == {0, 1}
    assert (store.folder / "rows.jsonl.torn").read_bytes() == b'{"checksum":"12'


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b'"kept":3', b'"kept":4'),
        lambda line: line[:30] + b"\n",
        lambda line: b"\n",
        lambda line: b"\xff\r{}\n",
        lambda line: b"[1]\n",
        lambda line: b"<<<<<<< HEAD\n",
    ],
)
def test_a_changed_line_in_the_middle_is_reported_by_number_and_not_used(change, store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW | {"round": number} for number in range(3)], [])
        first, middle, last = lines_of(store)
        (store.folder / "rows.jsonl").write_bytes(first + change(middle) + last)
        again = Store(store.folder)
        with pytest.warns(UserWarning, match=r"rows.jsonl line 2 is not as it was written"):
            assert again.rounds_done(RUN) == {0, 2}
        again.add(lease, [ROW | {"round": 1}], [])  # so it is computed again
    with pytest.warns(UserWarning, match="line 2"):
        assert sorted(row["round"] for row in Store(store.folder).rows()) == [0, 1, 2]


def test_lines_of_two_machines_can_be_joined(store, tmp_path):
    other = Store(tmp_path / "other")
    for each, kept in ((store, 3), (other, 4)):
        with each.claim([RUN]) as lease:
            each.add(lease, [ROW, ROW | {"round": 1, "kept": kept}], [])
    joined = b"".join(lines_of(store) + lines_of(other))
    (store.folder / "rows.jsonl").write_bytes(joined)
    with pytest.warns(UserWarning, match="line 4 contradicts .*kept: 3 stored, 4 now"):
        assert store.rows() == [ROW, ROW | {"round": 1}]


def test_a_file_put_in_its_place_is_read_from_its_start(store):
    with store.claim([RUN]) as lease:
        store.add(lease, [ROW | {"round": number} for number in range(3)], [])
    lines = lines_of(store)
    assert len(store.rows()) == 3
    new = store.folder / "new"
    new.write_bytes(lines[2] + lines[1])
    new.replace(store.folder / "rows.jsonl")
    assert [row["round"] for row in store.rows()] == [2, 1]
    (store.folder / "rows.jsonl").unlink()
    assert store.rows() == []


# what is no store, or not ours


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2}', "is of format 2, this version reads format 1: give another folder"),
        ('{"format": 1', "is not that of a store"),
        ("[]", "is not that of a store"),
    ],
)
def test_another_format_is_refused_and_left_alone(content, message, tmp_path):
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]
    assert (tmp_path / "store.json").read_text() == content


def test_results_without_store_json_are_left_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"holds results but no store\.json"):
        Store(tmp_path)


def test_reading_makes_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no store of results"):
        Store(tmp_path / "none", create=False)
    assert not list(tmp_path.iterdir())


# leases


def test_a_lease_is_of_all_its_runs_or_none(store):
    first, second, third = ids(3)
    with store.claim([first, second]) as lease:
        assert lease.run_ids == {first, second}
        assert store.claim([second, third]) is None
        assert set(store.holders()) == {first, second}
        assert store.holders()[first]["pid"] == os.getpid()
        with Store(store.folder).claim([third]):
            assert set(store.holders()) == set(ids(3))
    assert store.holders() == {}
    store.claim([second, third]).release()


def test_a_lease_is_asked_for_at_every_write(store):
    other = ids(2)[1]
    with store.claim([RUN]) as lease:
        with pytest.raises(ValueError, match=f"is of other runs than {other}"):
            store.add(lease, [ROW | {"run_id": other}], [])
        with pytest.raises(ValueError, match=f"is of other runs than {other}"):
            store.save(lease, other, {}, {})
    with pytest.raises(LeaseLost):
        store.add(lease, [ROW], [])
    assert store.rows() == []


@pytest.mark.parametrize("run_id", ["", "../x", ".hidden", "a/b", "a b"])
def test_run_ids_are_file_names(run_id, store):
    with pytest.raises(ValueError, match="a run id is made of letters"):
        store.claim([run_id])


def age(store: Store, seconds: float) -> None:
    path = store.folder / "leases" / RUN
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_who_shows_no_sign_of_life_is_taken_over_and_fenced(store):
    sleeper = store.claim([RUN])
    age(store, leases.STALE - 5)
    assert store.claim([RUN]) is None
    age(store, 10)
    assert store.holders() == {}
    with store.claim([RUN]) as lease:
        assert lease.token != sleeper.token
        for write in (
            lambda: store.add(sleeper, [ROW], []),
            lambda: store.save(sleeper, RUN, {"w": torch.ones(1)}, {}),
            lambda: store.discard(sleeper, RUN),
        ):
            with pytest.raises(LeaseLost, match=f"lease of {RUN} is no longer ours"):
                write()
        sleeper.touch()
        assert sleeper.lost
        sleeper.release()
        assert store.load(RUN) is None
        store.add(lease, [ROW], [])  # the sleeper released nothing of the other's
        assert not lease.lost
    assert store.rows() == [ROW]
    leftover = [path.name for path in (store.folder / "checkpoints").iterdir()]
    assert leftover == []


def test_a_heartbeat_keeps_a_lease(store, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT", 0.01)
    with store.claim([RUN]) as lease:
        age(store, leases.STALE + 5)
        for _ in range(300):
            if store.holders():
                break
            lease._ended.wait(0.01)
        assert store.claim([RUN]) is None


def test_a_lease_of_another_machine_is_waited_for(store, monkeypatch):
    with store.claim([RUN]):
        path = store.folder / "leases" / RUN
        content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(leases, "_boot", lambda: "another machine")
        path.write_bytes(content)  # nobody on this machine locks it
        assert store.claim([RUN]) is None
    assert store.claim([RUN]) is not None


# checkpoints


def test_checkpoints_come_back(store):
    tensors = {
        "transposed": torch.randn(3, 4).t(),
        "view": torch.arange(10)[2:5],
        "mask": torch.tensor([True, False]),
        "half": torch.randn(2).bfloat16(),
        "scalar": torch.tensor(0.1),
        "empty": torch.empty(0, 3),
    }
    tensors["same"] = tensors["view"]
    assert store.load(RUN) is None
    with store.claim([RUN]) as lease:
        for number in range(2):
            store.save(lease, RUN, tensors, {"round": number, "at": [0.1, None]})
        found, metadata = store.load(RUN)
        assert metadata == {"round": 1, "at": [0.1, None]}
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
        store.discard(lease, RUN)
        store.discard(lease, RUN)
    assert store.load(RUN) is None


def test_a_broken_checkpoint_is_reported_and_not_used(store):
    with store.claim([RUN]) as lease:
        store.save(lease, RUN, {"w": torch.ones(5)}, {"round": 1})
    path = store.folder / "checkpoints" / f"{RUN}.safetensors"
    content = path.read_bytes()
    flipped = [content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in (0, 20, -1)]
    for broken in (b"", content[:7], content[:60], content[:-1], *flipped):
        path.write_bytes(broken)
        with pytest.warns(UserWarning, match="is broken"):
            assert store.load(RUN) is None


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
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
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
