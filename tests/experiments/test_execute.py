"""Runs of studies: their ids, what is still to do, and rows that nothing but the run decides."""

import re
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

from experiments.__main__ import main
from experiments.findings import claims
from experiments.store.arithmetic import marked
from experiments.store.records import Recorder
from experiments.store.store import Store
from experiments.study import studies
from experiments.study.networks import FC, NETWORKS
from experiments.study.runs import DENSE, PROFILES, Run
from experiments.sweep import execute as execution
from experiments.sweep.execute import (
    dense_of,
    execute,
    groups,
    has_dense,
    kind_of,
    packed,
    unpacked,
)
from experiments.sweep.sweep import check_only, chosen
from experiments.train import data
from experiments.train.loop import minibatches
from experiments.train.lottery import lottery

SMOKE = partial(Run, network="fc", profile="smoke", seed=0)
DENSE_RUN = SMOKE(criterion=DENSE)
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("any_arithmetic")


@pytest.fixture(scope="module")
def tiny() -> data.Dataset:
    mini = data.load("mnist-mini")

    def first(part: data.Split, count: int) -> data.Split:
        return data.Split(part.images[:count], part.labels[:count])

    return replace(
        mini, train=first(mini.train, 600), val=first(mini.val, 100), test=first(mini.test, 100)
    )


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def do(store: Store, runs: list[Run], rounds: int, dataset: data.Dataset, say=lambda text: None):
    with store.claim([run.id for run in runs]) as lease:
        execute(runs, rounds, store, lease, dataset, say)


def rows_by_id(store: Store) -> list[dict]:
    return sorted(store.rows(), key=lambda row: (row["run_id"], row["round"]))


# ids


def test_ids_are_those_of_committed_rows():
    paper = Run(network="fc", profile="paper", seed=0)
    assert paper.id == "fc-large_final-s0-paper-fb07ee86dd16"
    assert paper.dense.id == "fc-dense-s0-paper-e6c6748381d2"


def test_an_id_says_what_differs_from_the_defaults():
    run = SMOKE(criterion="movement", mask0="freeze_init", rewind_to=3, compounding=True)
    assert run.id.startswith("fc-movement-freeze_init-rewind_to_3-compounding-s0-smoke-")
    learned = SMOKE(schedule="learned", criterion=DENSE, trained=True, init_score=-0.5)
    assert learned.id.startswith("fc-learned-init_score_-0.5-trained-s0-smoke-")


def test_runs_that_differ_have_other_ids():
    runs = {
        run
        for study in studies.STUDIES.values()
        for network in study.networks
        for profile in PROFILES
        for run in study.runs(network, profile, range(2))
    }
    assert len({run.id for run in runs}) == len(runs) > 1000


def test_the_protocol_is_part_of_the_id(monkeypatch):
    before = replace(SMOKE()).id
    monkeypatch.setitem(NETWORKS, "fc", replace(FC, lr=1e-3))
    assert replace(SMOKE()).id != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"network": "lenet"},
            "network must be one of fc, conv2, conv4, conv6, or MODULE:ATTR; got 'lenet'",
        ),
        (
            {"profile": "long"},
            "profile must be one of paper, coarse, patience, short, smoke; got 'long'",
        ),
        ({"criterion": "largest"}, "criterion must be one of large_final, .*got 'largest'"),
        ({"schedule": "learned"}, "a learned mask has no criterion, got 'large_final'"),
        ({"schedule": "one_shot"}, "not trained: trained=False"),
        ({"trained": False}, "not trained has schedule one_shot"),
        ({"rewind_to": 52}, "iteration of the dense run, 0 to 51; got 52"),
        ({"permuted": "pixels"}, "permuted must be 'none', got 'pixels': only learned masks"),
        ({"weights": "signed_constant"}, "weights must be 'init', .* starts from its initial"),
        ({"rescale": True}, "rescale must be False, got True: only learned masks have it"),
        ({"criterion": "none", "mask1": "reinit"}, "mask1 must be 'rewind', .*: only tickets"),
        ({"criterion": "none", "final_at": 5}, "final_at must be None, .* that a criterion"),
        (
            {"schedule": "one_shot", "trained": False, "mask0": "freeze_init"},
            "mask0 must be 'zero'",
        ),
        (
            {"schedule": "learned", "criterion": "none", "rewind_to": 5},
            "rewind_to must be 0, got 5",
        ),
    ],
)
def test_a_run_refuses_what_there_is_not(change, message):
    with pytest.raises(ValueError, match=message):
        Run(**{"network": "fc", "profile": "smoke", "seed": 0, **change})


# studies and claims as data


def test_every_run_belongs_to_a_study():
    for study in studies.STUDIES.values():
        for profile in PROFILES:
            for run in study.runs("fc", profile, (1,)):
                home = studies.STUDIES[studies.home(run)]
                assert run in home.runs("fc", profile, (1,))


def test_the_arms_of_a_claim_are_arms_of_its_study():
    for claim in claims.CLAIMS:
        study = studies.STUDIES[claim.study]
        for network in claim.networks:
            known = {run.id for run in study.runs(network, "paper", (0,))}
            for changes in claim.arms.values():
                run = studies.Arm(tuple(changes.items())).run(network, "paper", 0)
                other = claim.study == "learned" and studies.home(run) == "supermasks"
                assert run.id in known or run == run.dense or other
            assert max(claim.rounds) <= 24  # where the paper's scripts end: `run --rounds 24`


def test_snapshots_are_what_arms_ask_for():
    dense = Run(network="conv6", profile="paper", seed=0, criterion=DENSE)
    asked = {
        at
        for study in studies.STUDIES.values()
        if "conv6" in study.networks
        for run in study.runs("conv6", "paper", (0,))
        for at in (run.rewind_to, run.final_at)
        if at not in (None, 0)
    }
    assert asked <= set(studies.snapshots(dense)) | {dense.iterations}


# what is still to do


def test_dense_runs_come_first_and_what_is_done_is_left_out(tmp_path, tiny):
    store = Store(tmp_path)
    runs = [SMOKE(seed=seed, criterion=c) for seed in (0, 1) for c in ("random", "movement")]
    dense, others = groups(runs, 1, store, 8, across_seeds=False)
    assert [run for (run,) in dense] == [run.dense for run in (runs[0], runs[2])]
    assert others == [tuple(runs[:2]), tuple(runs[2:])]
    assert groups(runs, 1, store, 8, across_seeds=True)[1] == [tuple(runs)]
    assert groups(runs, 1, store, 1, across_seeds=True)[1] == [(run,) for run in runs]
    do(store, [DENSE_RUN], 0, tiny)
    do(store, runs[:1], 1, tiny)
    dense, others = groups(runs, 1, store, 8, across_seeds=False)
    assert dense == [(runs[2].dense,)]
    assert others == [(runs[1],), tuple(runs[2:])]
    assert groups(runs[:1], 2, store, 8, across_seeds=False)[1] == [(runs[0],)]  # a round more


def test_runs_of_other_kinds_are_not_trained_together(tmp_path):
    runs = [SMOKE(), SMOKE(mask0="freeze_init"), SMOKE(mask0="original"), SMOKE(mask1="reinit")]
    _, others = groups(runs, 1, Store(tmp_path), 8, across_seeds=False)
    assert others == [(runs[0], runs[3]), (runs[1],), (runs[2],)]


def test_only_takes_values_of_fields():
    run = SMOKE(criterion="movement")
    assert chosen(run, [])
    assert chosen(run, [("criterion", "random"), ("criterion", "movement")])
    assert not chosen(run, [("criterion", "movement"), ("mask1", "reinit")])
    assert chosen(run.dense, [("criterion", "random")])
    check_only([run], [("criterion", "movement")])
    with pytest.raises(ValueError, match=r"FIELD=VALUE with a field of network, .*got 'criteria'"):
        check_only([run], [("criteria", "movement")])


# rows


MIXED = [
    SMOKE(criterion="large_final"),
    SMOKE(mask1="reinit"),
    SMOKE(criterion="movement", mask1="reinit_permute", compounding=True),
]
VALUES = [SMOKE(mask0="freeze_init_zero_all")]
LATE = [SMOKE(rewind_to=5)]
ROUNDS = 8  # the last one with sparse products in every layer, so side by side


@pytest.fixture(scope="module")
def together(tmp_path_factory, tiny):
    store = Store(tmp_path_factory.mktemp("together"))
    torch.set_num_threads(1)
    for runs in ([DENSE_RUN], MIXED, VALUES, LATE):
        do(store, runs, ROUNDS, tiny)
    return store


def test_rows_are_those_of_the_lottery_loop(together, tiny):
    expected = [this.row["test_accuracy"] for this in lottery(MIXED[0], 2, tiny)]
    rows = [row for row in rows_by_id(together) if row["run_id"] == MIXED[0].id]
    assert [row["test_accuracy"] for row in rows[:3]] == expected
    assert [row["round"] for row in rows] == list(range(ROUNDS + 1))
    assert rows[3]["kept"] == 120_422 + 15_360 + 729
    assert rows[3]["study"] == "mask-criteria"
    assert rows[-1]["products"] == (
        ["sparse"] * 3 if rows[-1]["backend"] == "cpu" else ["dense"] * 3
    )


def test_a_rewound_ticket_trains_what_is_left_of_the_training(together, tiny):
    rows = [row for row in rows_by_id(together) if row["run_id"] == LATE[0].id]
    total = DENSE_RUN.iterations
    assert [row["iterations"] for row in rows] == [total] + [total - 5] * ROUNDS
    assert all(row["early_stop_iteration"] >= 5 for row in rows[1:])
    size = DENSE_RUN.net.batch_size
    whole = list(minibatches(tiny.train, 25, size, [0]))  # epochs of ten
    for (x, y), (its_x, its_y) in zip(
        whole[13:], minibatches(tiny.train, 25, size, [0], 13), strict=True
    ):
        assert torch.equal(x, its_x)
        assert torch.equal(y, its_y)
    assert len(list(minibatches(tiny.train, 25, size, [0], 13))) == 12
    assert kind_of(LATE[0]) != kind_of(MIXED[0])


def test_a_chain_with_a_damaged_row_is_done_again(together, tmp_path, tiny):
    store = Store(tmp_path / "damaged")
    do(store, [DENSE_RUN], 0, tiny)
    do(store, MIXED[:1], 2, tiny)
    good = rows_by_id(store)
    path = store.folder / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"round":1' in line)
    path.write_bytes(b"".join([*lines[:at], lines[at].replace(b"0", b"1", 1), *lines[at + 1 :]]))
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # test_store.py has them
        store = Store(tmp_path / "damaged")
        assert store.rounds_done(MIXED[0].id) == {0, 2}
        do(store, MIXED[:1], 2, tiny, said.append)
    assert "are missing" in said[0]
    assert rows_by_id(store) == good


def test_rows_do_not_depend_on_company_or_restarts(together, tmp_path, tiny):
    class Killed(Exception):
        pass

    said = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) % 4 == 0:
            raise Killed

    store = Store(tmp_path)
    do(store, [DENSE_RUN], 0, tiny)
    for runs in (MIXED[:2], MIXED[2:], VALUES, LATE):
        while True:
            try:
                do(store, runs, ROUNDS, tiny, say)
            except Killed:
                continue
            break
    assert len(said) >= len(MIXED + VALUES + LATE) * ROUNDS
    assert rows_by_id(store) == rows_by_id(together)


def test_a_checkpoint_gives_the_round_back(together):
    tensors, metadata = together.load(VALUES[0].id)
    this = unpacked(tensors, metadata, CPU)
    again, metadata_again = packed(this)
    assert marked(metadata_again, "cpu") == metadata
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert this.number == ROUNDS


def test_dense_runs_hold_the_snapshots_that_studies_ask_for(together):
    assert has_dense(DENSE_RUN, together)
    _, snapshots = dense_of(SMOKE(), together, CPU)
    assert set(snapshots) == {0, *studies.snapshots(DENSE_RUN), 51}


def test_untrained_networks_by_density(together, tiny):
    arms = [
        SMOKE(schedule="one_shot", trained=False, criterion="large_final", final_at=at)
        for at in (None, 5)
    ]
    do(together, arms, 3, tiny)
    first, early = ([r for r in together.rows() if r["run_id"] == run.id] for run in arms)
    assert [row["round"] for row in first] == [0, 1, 2, 3]
    assert first[0]["density"] == 1
    assert first[0]["test_accuracy"] == early[0]["test_accuracy"]  # no mask
    assert first[3]["test_accuracy"] != early[3]["test_accuracy"]
    assert first[3]["final_test_accuracy"] is None


# a whole study by the command line


def test_a_study_runs_and_resumes(tmp_path, capsys):
    command = [
        "run", "mask-criteria", "--profile", "smoke", "--seeds", "1", "--rounds", "1",
        "--only", "criterion=random", "--store", f"{tmp_path}", "--engine", "inline",
    ]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "fc-random-s0-smoke" in said
    assert main(command) == 0
    assert capsys.readouterr().out == ""  # all is done
    assert {row["round"] for row in Store(tmp_path).rows()} == {0, 1}


def test_a_dense_run_of_another_machine_stops_nothing_but_its_own(tmp_path, capsys):
    """A store came without its checkpoints, and one of its rows has other last digits."""
    command = [
        "run", "mask-criteria", "--profile", "smoke", "--seeds", "2", "--rounds", "1",
        "--only", "criterion=random", "--engine", "inline", "--store",
    ]  # fmt: skip
    made, brought = tmp_path / "made", tmp_path / "brought"
    assert main([*command, str(made)]) == 0
    dense = {row["seed"]: row for row in Store(made).rows() if row["criterion"] == "none"}
    dense[0]["final_validation_loss"] += 1e-7
    store = Store(brought)
    with store.claim([row["run_id"] for row in dense.values()]) as lease:
        store.add(lease, list(dense.values()), [])
    capsys.readouterr()
    assert main([*command, str(brought)]) == 1
    said = capsys.readouterr().err
    assert re.search(r"s0-smoke.* is stored with other numbers .*as a whole, with --remake", said)
    assert {row["seed"] for row in Store(brought).rows() if row["round"] == 1} == {1}
    outcomes = {seed: [] for seed in dense}
    for made in Store(brought).records():
        for seed, row in dense.items():
            if made["run_id"] == row["run_id"]:
                outcomes[seed].append(made["outcome"])
    assert outcomes == {0: ["started", "differs"], 1: ["started", "done"]}
    [failed] = [made for made in Store(brought).records() if made["outcome"] == "differs"]
    assert "is stored with other numbers" in failed["error"]


def test_masks_learned_side_by_side_are_stored_as_alone(tmp_path, monkeypatch, tiny):
    """As on a GPU; the checkpoints are files here, of slices of what is trained together."""
    runs = [SMOKE(schedule="learned", criterion=DENSE, trained=False, weights=weights, seed=seed)
            for weights, seed in (("init", 0), ("signed_constant", 0), ("init", 1))]  # fmt: skip
    alone, together = Store(tmp_path / "alone"), Store(tmp_path / "together")
    do(alone, runs, 1, tiny)
    learn = partial(execution.learn, every=200, side_by_side=True)
    monkeypatch.setattr(execution, "learn", learn)
    do(together, runs, 1, tiny)
    assert rows_by_id(together) == rows_by_id(alone)
    made = [record for record in together.records() if record["outcome"] == "done"]
    assert [record["group"] for record in made] == [[run.id for run in runs]] * 3
    for run in runs:
        (expected, _), (found, metadata) = alone.load(run.id), together.load(run.id)
        assert metadata["networks"] == 3
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_seconds_of_a_learned_mask_are_its_share_in_all_processes(tmp_path, monkeypatch, tiny):
    now = [1000.0]
    monkeypatch.setattr(execution.time, "time", lambda: now[0])
    store = Store(tmp_path)
    for before, at in (0.0, 1.0), (1.0, 4.0), (4.0, 9.0):  # a process gives it 1, 3, 5 s
        with store.claim(["a-run"]) as lease:
            kept = execution.Checkpoints(Recorder(store, lease, tiny, print))
            kept.load("a-run")
            assert kept.seconds["a-run"] == before
            networks = int(at)  # in other company each time
            now[0] += (at - before) * networks
            kept.save("a-run", {"x": torch.ones(1)}, {"iteration": 1, "networks": networks})
            now[0] += 100.0  # after the last checkpoint: lost, and done again


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run criteria", "study must be one of dense, mask-criteria, .*got 'criteria'"),
        ("run permutation --network conv2", "network must be one of fc for permutation"),
        ("run mask-1 --only mask1", "--only takes FIELD=VALUE, got 'mask1'"),
        (
            "run mask-1 --data-dir nowhere",
            r"mnist was not found: .* has no train-.*; give the",
        ),
    ],
)
def test_a_command_that_cannot_be_done_says_why(command, message, tmp_path, capsys):
    assert main([*command.split(), "--store", f"{tmp_path / 'store'}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert re.search(message, said)
