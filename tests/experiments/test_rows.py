"""The rows of a store for other tools."""

import csv
import importlib.util
import json

import pytest

from experiments.__main__ import main
from experiments.show import rows as module
from experiments.store.store import Store
from experiments.study.runs import Run


@pytest.fixture
def store(tmp_path):
    runs = [Run(network="fc", profile="smoke", seed=seed) for seed in (0, 1)]
    made = [
        {
            **run.named, "study": "mask-criteria", "run_id": run.id, "round": number,
            "density": 0.1 + 0.2 * number, "test_accuracy": 0.9, "products": ["dense", "sparse"],
        }
        for run in runs
        for number in (0, 1)
    ]  # fmt: skip
    made[-1] |= {"data": "theirs:set", "final_test_accuracy": None}
    store = Store(tmp_path / "store")
    with store.claim([run.id for run in runs]) as lease:
        store.add(lease, made, [])
    return store


def test_csv_has_a_line_per_row_and_the_numbers_exactly(store, tmp_path, capsys):
    assert main(["rows", "--store", f"{store.folder}"]) == 0
    said = capsys.readouterr().out
    assert main(["rows", "--store", f"{store.folder}", "--csv", f"{tmp_path / 'new/r.csv'}"]) == 0
    assert (tmp_path / "new" / "r.csv").read_text() == said
    found = list(csv.DictReader(said.splitlines()))
    assert list(found[0])[:4] == ["study", "network", "profile", "seed"]
    for read, row in zip(found, store.rows(), strict=True):
        assert float(read["density"]) == row["density"]
        assert json.loads(read["products"]) == row["products"]
        assert (read["run_id"], int(read["round"])) == (row["run_id"], row["round"])
    assert [read["data"] for read in found] == ["", "", "", "theirs:set"]
    assert found[-1]["final_test_accuracy"] == ""


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ("mask-criteria --network fc --profile smoke", 4),
        ("--criterion large_final random", 4),
        ("--dataset theirs:set", 1),
        ("mask-0", 0),
        ("--profile paper", 0),
        ("--criterion random", 0),
    ],
)
def test_rows_are_chosen_as_everywhere(options, lines, store, capsys):
    status = main(["rows", *options.split(), "--store", f"{store.folder}"])
    said = capsys.readouterr()
    assert status == (0 if lines else 1)
    assert len(said.out.splitlines()) == (lines + 1 if lines else 0)
    assert ("no rows of these in" in said.err) == (not lines)


def test_without_pyarrow_nothing_is_written(store, tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pyarrow" else real(name)
    )
    files = ["--csv", f"{tmp_path / 'r.csv'}", "--parquet", f"{tmp_path / 'r.parquet'}"]
    assert main(["rows", "--store", f"{store.folder}", *files]) == 1
    assert "--parquet needs pyarrow, which is not here: pip install" in capsys.readouterr().err
    assert not (tmp_path / "r.csv").exists()


def test_parquet_holds_the_same_table(store, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "r.parquet"
    assert main(["rows", "--store", f"{store.folder}", "--parquet", f"{path}"]) == 0
    assert parquet.read_table(path).to_pydict() == module.columns(store.rows())
