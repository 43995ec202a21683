"""Leases: who works on which run, who takes over from whom, and who may no longer write."""

import os

import pytest
import torch
from sweep_problems import ROW, RUN, ids

from experiments.store import leases
from experiments.store.leases import LeaseLost
from experiments.store.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


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
