"""What is done, running and pending, and the hours that are left."""

import re
from functools import partial

import pytest

from experiments.__main__ import main
from experiments.store.store import Store
from experiments.study.runs import DENSE, Run
from experiments.study.studies import STUDIES
from experiments.sweep.status import Times, as_text, hours, progress, together

SMOKE = partial(Run, network="fc", profile="smoke", seed=0)
DENSE_RUN = SMOKE(criterion=DENSE)
RANDOM, MOVEMENT = SMOKE(criterion="random"), SMOKE(criterion="movement")
FROZEN = SMOKE(mask0="freeze_init")
STUDY = STUDIES["mask-criteria"]


def row(run: Run, number: int) -> dict:
    return {**{name: vars(run)[name] for name in Run.__dataclass_fields__}, "round": number} | {
        "run_id": run.id
    }


def record(run: Run, number: int, seconds: float) -> dict:
    return {"run_id": run.id, "round": number, "seconds": seconds}


@pytest.fixture
def store(tmp_path) -> Store:
    """A dense run, one run of three rounds, and one that is at its second."""
    store = Store(tmp_path / "store")
    for run, rounds in ((DENSE_RUN, 0), (RANDOM, 3), (MOVEMENT, 1)):
        numbers = range(rounds + 1)
        with store.claim([run.id]) as lease:
            records = [record(run, n, 100.0 * (n + 1)) for n in numbers if n or not rounds]
            store.add(lease, [row(run, n) for n in numbers], records)
    return store


def test_rounds_runs_and_who_is_on_them(store):
    with store.claim([MOVEMENT.id]):
        (one,) = progress([STUDY], ["fc"], "smoke", 1, store)
    assert (one.done, one.wanted) == (1 + 4 + 2, 1 + 11 * 4)
    assert set(one.running) == {MOVEMENT.id}
    assert one.left[MOVEMENT] == {2, 3}
    assert len(one.pending) == 9
    assert {DENSE_RUN, RANDOM, MOVEMENT}.isdisjoint(one.pending)


def test_shared_runs_count_once(store):
    studies = [STUDIES[name] for name in ("mask-criteria", "same-sign", "dense")]
    all_ = together(progress(studies, ["fc"], "smoke", 1, store))
    assert (all_.done, all_.wanted) == (7, 1 + 11 * 4)


def test_hours_are_those_of_the_same_kind_and_round(store):
    times = Times(store.rows(), store.records())
    assert times.seconds(DENSE_RUN, {0}) == 100
    assert times.seconds(SMOKE(criterion="large_init"), {0, 1, 2, 3}) == 200 + 300 + 400
    assert times.seconds(MOVEMENT, {2, 3, 4}) == 300 + 400 + 400  # of the nearest round
    assert times.seconds(FROZEN, {1}) is None
    assert times.seconds(SMOKE(network="conv2"), {1}) is None
    assert hours({MOVEMENT: {2, 3}}, times, 2) == f"{700 / 2 / 3600:.2f}"
    assert hours({MOVEMENT: {2, 3}, FROZEN: {1}}, times, 2) == f"more than {700 / 2 / 3600:.2f}"
    assert hours({FROZEN: {1}}, times, 2) == "unknown"
    assert hours({}, times, 2) == "0"


def test_a_mean_of_several_and_what_is_made_at_once():
    learned = [SMOKE(schedule="learned", trained=False, criterion=DENSE, seed=s) for s in (0, 1)]
    once = SMOKE(schedule="one_shot", trained=False)
    rows = [row(run, 1) for run in (*learned, once)]
    records = [record(learned[0], 1, 10.0), record(learned[1], 1, 30.0), record(once, 3, 7.0)]
    times = Times(rows, [*records, {"run_id": "of no row", "round": 0, "seconds": 1.0}])
    assert times.seconds(learned[0], {1}) == 20
    assert times.seconds(once, {0, 1, 2, 3}) == 7


def test_a_table_with_its_total(store):
    with store.claim([MOVEMENT.id]):
        found = progress([STUDY, STUDIES["mask-0"]], ["fc", "conv2"], "smoke", 1, store)
    lines = as_text(found, Times(store.rows(), store.records()), 4).splitlines()
    assert re.split("  +", lines[0]) == [
        "study", "network", "rounds", "running", "pending", "hours, 4 workers"
    ]  # fmt: skip
    assert lines[1].split()[:6] == ["mask-criteria", "fc", "7", "/", "45", "1"]
    assert lines[2].endswith("unknown")
    assert "more than" in lines[3]  # zero is known, the others are not
    assert lines[5].startswith("all ")
    assert re.fullmatch(rf"{MOVEMENT.id}: \S+, pid \d+, since \S+Z", lines[6])


def test_the_command(store, capsys):
    command = ["status", "mask-criteria", "--network", "fc", "--profile", "smoke", "--seeds", "1"]
    command += ["--store", f"{store.folder}"]
    assert main([*command, "--workers", "3"]) == 0
    said = capsys.readouterr().out
    assert "7 / 45" in said
    assert "hours, 3 workers" in said
    assert main([*command, "--pending"]) == 0
    ids = capsys.readouterr().out.split()
    assert len(ids) == len(set(ids)) == 10
    assert MOVEMENT.id in ids


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("status", "is no store of results"),
        ("status criteria", "study must be one of dense"),
        ("status dense --network lenet", "network must be one of fc, .*got 'lenet'"),
        ("status --workers -1 --profile smoke", "workers must be 1 or more, got -1"),
        ("status permutation --network conv2", "permutation is not a study of conv2"),
        ("run dense --seeds 0 --profile smoke", "seeds must be 1 or more, got 0"),
        ("run dense --rounds -1 --profile smoke", "rounds must be 0 to 46 on fc, .*got -1"),
        ("run mask-1 --only mask1=none", "mask1 must be one of rewind, .* here; got 'none'"),
        ("run dense --devices gpu --profile smoke", "cuda:0,cuda:1 and so on; got 'gpu'"),
        ("run dense --devices cuda:99 --profile smoke", "there is no cuda:99 here"),
    ],
)
def test_a_command_that_cannot_be_done_says_why(command, message, tmp_path, capsys):
    if command != "status":
        Store(tmp_path)
    assert main([*command.split(), "--store", f"{tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert re.search(message, said)


@pytest.mark.parametrize("command", ["figure", "table", "report"])
def test_without_matplotlib_one_sentence_says_so(command, store, capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "scipy" else real(n))
    assert main([command, "--store", f"{store.folder}"]) == 1
    assert capsys.readouterr().err == (
        f"error: {command} needs matplotlib and scipy, which are not here: "
        "pip install 'lottery-sparse[experiments]'.\n"
    )
