"""Chains that cannot go on: done again and compared, left alone, or made anew as wholes."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments.__main__ import main
from experiments.findings.selection import select
from experiments.store import arithmetic, remakes
from experiments.store.records import Recorder, load
from experiments.store.remakes import readable
from experiments.store.store import Store
from experiments.study.runs import DENSE, Run, run_of
from experiments.study.studies import STUDIES
from experiments.sweep import execute
from experiments.sweep.status import progress
from experiments.train import data

COMMITTED = Path(__file__).parents[2] / "experiments" / "results"
SMOKE = partial(Run, network="fc", profile="smoke", seed=0)
CHAIN, DENSE_RUN = SMOKE(criterion="random"), SMOKE(criterion=DENSE)

pytestmark = pytest.mark.usefixtures("any_arithmetic")


def run(folder: Path, rounds: int, *more: str) -> int:
    return main(
        [
            "run", "mask-criteria", "--profile", "smoke", "--seeds", "1", "--engine", "inline",
            "--only", "criterion=random", "--rounds", f"{rounds}", "--store", f"{folder}", *more,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, any_arithmetic) -> dict[int, Path]:
    """Stores of the dense run and one chain, of one round and of three, made in one go."""
    folders = {rounds: tmp_path_factory.mktemp("made") / f"{rounds}" for rounds in (1, 3)}
    for rounds, folder in folders.items():
        assert run(folder, rounds) == 0
    return folders


@pytest.fixture
def cut(made, tmp_path) -> Path:
    """A copy of the chain of one round, which the tests want three of."""
    return Path(shutil.copytree(made[1], tmp_path / "cut"))


def rows_of(folder: Path) -> bytes:
    return (folder / "rows.jsonl").read_bytes()


def numbers(folder: Path, remake: int = 0) -> list[dict]:
    """The rows of a remake without its name, in order."""
    rows = [row for row in Store(folder).rows() if row.get("remake", 0) == remake]
    rows.sort(key=lambda row: (row["criterion"], row["round"]))
    return [{k: v for k, v in row.items() if k not in ("run_id", "remake")} for row in rows]


def change_row(folder: Path, run_id: str, number: int) -> None:
    """Give a stored row other last digits, as another machine has them."""
    store = Store(folder)
    rows = store.rows()
    for name in ("rows.jsonl", "runs.jsonl"):
        (folder / name).unlink()
    for row in rows:
        if (row["run_id"], row["round"]) == (run_id, number):
            row["final_validation_loss"] += 1e-7
    new = Store(folder)
    with new.claim({row["run_id"] for row in rows}) as lease:
        new.add(lease, rows, [])


def lose_weights(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


# the weights are lost


def test_without_its_weights_a_chain_is_done_again_and_compared(cut, made, capsys):
    before = rows_of(cut)
    lose_weights(cut)
    assert run(cut, 3) == 0
    said = capsys.readouterr().out
    assert f"{DENSE_RUN.id}: its weights are not here; trained again, and compared" in said
    assert f"{CHAIN.id}: its weights are not here; done again from the dense run" in said
    assert rows_of(cut).startswith(before)
    assert rows_of(cut) == rows_of(made[3])


def test_a_chain_is_made_anew_as_a_whole_where_that_is_asked(cut, made, capsys):
    before = rows_of(cut)
    lose_weights(cut)
    assert run(cut, 3, "--remake") == 0
    assert f"{CHAIN.id} cannot go on" in capsys.readouterr().out
    assert rows_of(cut).startswith(before)
    rows = Store(cut).rows()
    assert {row["round"] for row in rows if row["run_id"] == CHAIN.id} == {0, 1}
    again = [row for row in rows if "remake" in row]
    assert {row["run_id"]: row["remake"] for row in again} == {
        "fc-dense-remake_1-s0-smoke-c11950ecec9a": 1,
        run_of(again[-1]).id: 1,
    }
    assert numbers(cut, 1) == numbers(made[3])  # the number of a remake decides nothing
    # what shows results reads the whole chain, under the id that claims and studies ask for
    read = [row for row in readable(rows) if row["run_id"] == CHAIN.id]
    assert [row["round"] for row in read] == [0, 1, 2, 3]
    assert {row["stored_as"] for row in read} == {run_of(again[-1]).id}
    # and there is nothing more to do
    before = rows_of(cut)
    assert run(cut, 3) == run(cut, 3, "--remake") == 0
    assert rows_of(cut) == before


def test_a_remake_that_was_stopped_is_gone_on_with(cut):
    lose_weights(cut)
    change_row(cut, DENSE_RUN.id, 0)
    assert run(cut, 2, "--remake") == 0
    assert run(cut, 3, "--remake") == 0
    rows = Store(cut).rows()
    assert {row.get("remake", 0) for row in rows} == {0, 1}
    again = sorted(row["round"] for row in rows if row.get("remake") and row["round"])
    assert again == [1, 2, 3]
    (one,) = progress([STUDIES["mask-criteria"]], ["fc"], "smoke", 1, Store(cut))
    shown = {run: there for run, (_, there) in one.rounds.items() if run.criterion == "random"}
    assert [(run.remake, there) for run, there in shown.items()] == [(1, {0, 1, 2, 3})]


def test_new_chains_of_a_seed_start_from_the_dense_run_that_can_be_had(cut):
    """Dense run 0 is another machine's; 1 was made here, so no flag is needed any more."""
    lose_weights(cut)
    change_row(cut, DENSE_RUN.id, 0)
    assert run(cut, 1, "--remake", "--only", "criterion=movement") == 0  # another chain besides
    assert run(cut, 1, "--only", "criterion=large_init") == 0
    rows = {row["criterion"]: row for row in Store(cut).rows() if row["round"] == 1}
    assert {name: row.get("remake", 0) for name, row in rows.items()} == {
        "random": 0, "movement": 1, "large_init": 1,
    }  # fmt: skip


# other numbers come out


@pytest.mark.parametrize("changed", [DENSE_RUN, CHAIN], ids=["dense", "chain"])
def test_a_chain_of_other_numbers_stops_until_it_is_made_anew(cut, made, changed, capsys):
    lose_weights(cut)
    change_row(cut, changed.id, int(changed == CHAIN))
    before = rows_of(cut)
    assert run(cut, 3) == 1
    assert "other arithmetic (make its chain anew, as a whole, with --remake)" in (
        capsys.readouterr().err
    )
    assert rows_of(cut) == before
    outcomes = {r["run_id"]: r["outcome"] for r in Store(cut).records()}
    assert outcomes[changed.id] == "differs"
    assert run(cut, 3, "--remake") == 0
    assert rows_of(cut).startswith(before)
    assert numbers(cut, 1) == numbers(made[3])
    assert run(cut, 3) == 0


def test_only_the_last_attempt_counts(cut):
    """Code that gave other numbers was mended, and the chain has gone on since."""
    store = Store(cut)
    for outcome, goes_on in (("differs", False), ("started", False), ("done", True)):
        with store.claim([CHAIN.id]) as lease:
            store.add(lease, [], [{"run_id": CHAIN.id, "round": None, "outcome": outcome}])
        assert remakes.Remakes(store).current(CHAIN) == CHAIN
        assert (remakes.Remakes(store, anew=True).current(CHAIN) == CHAIN) == goes_on


# the weights are another machine's


def test_weights_of_another_machine_are_left_alone(cut, made, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in cut.rglob("*.*") if path.is_file()}
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(arithmetic, "here", lambda device: "another processor, another library")
        assert run(cut, 3) == 1
        said = capsys.readouterr()
        assert f"{CHAIN.id} cannot go on here: " in said.out
        assert "a chain never mixes two; go on there, or make it anew" in said.out
        assert {path: path.read_bytes() for path in before} == before
        with pytest.raises(arithmetic.OtherArithmetic, match=r"were made by .*torch .* --remake"):
            load(CHAIN.id, Store(cut), "cpu")
        assert run(cut, 3, "--remake") == 0
        checkpoints = {p: p.read_bytes() for p in before if p.suffix == ".safetensors"}
        assert {path: path.read_bytes() for path in checkpoints} == checkpoints
    assert numbers(cut, 1) == numbers(made[3])
    assert run(cut, 3) == 0  # done, on the first machine too
    assert len(numbers(cut)) == len(numbers(made[1]))


def test_masks_half_learned_elsewhere_are_not_learned_on(tmp_path, monkeypatch):
    learned = SMOKE(schedule="learned", criterion=DENSE, trained=False)
    store = Store(tmp_path)
    with store.claim([learned.id]) as lease:
        kept = execute.Checkpoints(Recorder(store, lease, data.load("mnist-mini"), print))
        kept.load(learned.id)
        kept.save(learned.id, {"x": torch.ones(1)}, {"iteration": 1, "networks": 1})
        assert kept.load(learned.id) is not None
        monkeypatch.setattr(arithmetic, "here", lambda device: "another")
        with pytest.raises(arithmetic.OtherArithmetic):
            kept.load(learned.id)
    assert remakes.Remakes(store).current(learned) is None
    assert remakes.Remakes(store, anew=True).current(learned).remake == 1
    assert remakes.Remakes(store, device=None).current(learned) == learned  # workers look


def test_a_checkpoint_of_before_says_no_machine_and_is_taken(cut):
    store = Store(cut)
    tensors, metadata = store.load(CHAIN.id)
    del metadata["arithmetic"]
    with store.claim([CHAIN.id]) as lease:
        store.save(lease, CHAIN.id, tensors, metadata)
    assert load(CHAIN.id, store, "cpu") is not None
    assert remakes.Remakes(store).current(CHAIN) == CHAIN


# which remake is read


def rows(remake: int, rounds: int, **changes) -> list[dict]:
    one = SMOKE(criterion="random", remake=remake, **changes)
    base = {"run_id": one.id, "study": "mask-criteria", "products": [], **one.named}
    return [
        {**base, "round": r, "density": 0.8**r, "test_accuracy": 0.1 * remake + 0.01 * r}
        for r in range(rounds)
    ]


@pytest.mark.parametrize(
    ("rounds", "read"),
    [
        ({0: 4, 1: 4}, 0),  # both whole: the lowest
        ({0: 2, 1: 4}, 1),
        ({0: 2, 1: 4, 2: 4}, 1),
        ({0: 4, 1: 6}, 0),  # whole is what the study asks for
        ({0: 3, 1: 2}, 0),  # none is whole: the longest
        ({0: 2, 1: 3}, 1),
        ({0: 2, 1: 2}, 0),
    ],
)
def test_the_lowest_whole_remake_is_read(rounds, read):
    stored = [row for remake, count in rounds.items() for row in rows(remake, count)]
    for order in (stored, stored[::-1]):
        found = readable(order)
        assert len(found) == rounds[read]
        assert {row["run_id"] for row in found} == {CHAIN.id}
        assert {row.get("remake", 0) for row in found} == {read}


def test_a_remade_curve_starts_at_its_own_dense_row():
    dense = {**rows(0, 1)[0], **DENSE_RUN.named, "run_id": DENSE_RUN.id, "test_accuracy": 0.5}
    stored = [dense, *rows(0, 1), *rows(1, 4)]
    selection = select(STUDIES["mask-criteria"], "fc", "smoke", readable(stored))
    (curve,) = selection.curves
    assert curve.levels()[0].values == (0.1,)
    assert [row["test_accuracy"] for row in selection.dense] == [0.5]


def test_rows_of_another_numerics_are_read_where_there_are_no_others():
    other = rows(0, 4, numerics=-1)
    assert {row["run_id"] for row in readable(other)} == {CHAIN.id}
    both = readable([*rows(0, 2), *other])
    assert [row["round"] for row in both] == [0, 1]
    assert {row["stored_as"] for row in both} == {CHAIN.id}


def test_committed_rows_are_read_as_they_are():
    lines = (COMMITTED / "rows.jsonl").read_bytes().splitlines()
    stored = list(map(json.loads, lines))
    for row in stored:
        one = run_of(row)
        assert one.id == row["run_id"]
        assert one.named.items() <= row.items()
        assert set(row) & {"numerics", "precision", "layout", "form", "limits", "remake"} == set()
    read = readable(stored)
    assert {(r["run_id"], r["round"]): r["test_accuracy"] for r in read} == {
        (r["run_id"], r["round"]): r["test_accuracy"] for r in stored
    }
