"""Commands that cannot be done: one sentence each, a status that is not 0, and nothing written."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.__main__ import main, only_profile
from experiments.store.machine import numerics
from experiments.store.store import Store
from experiments.study.runs import Run
from experiments.sweep import engines

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Run(network="fc", profile="smoke", seed=0, criterion="none")
pytestmark = pytest.mark.usefixtures("any_arithmetic")
ROW = {**vars(SMOKE), "run_id": SMOKE.id, "round": 0, "test_accuracy": 0.5, "density": 1.0}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where commands run: a file, a store without rows, one of another format, an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LS_DATA_DIR", raising=False)
    monkeypatch.setattr(engines, "TIMEOUT", "0.1 s")
    Path("file").write_text("ours")
    Path("empty").mkdir()
    Path("later").mkdir()
    Path("later/store.json").write_text('{"format": 2}')
    Store(Path("made"))
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


NO_RUN = {  # of `run STUDY --profile smoke --store new`
    "nothing": "study must be one of dense, .*; got 'nothing'",
    "": "run takes a STUDY or a --figure, one of both",
    "dense --figure 7": "run takes a STUDY or a --figure, one of both",
    "--figure 8": "figure must be one of 1, 2, .*, article-10; got '8'",
    "dense --network vgg": "network must be one of fc, conv2, .*; got 'vgg'",
    "dense --seeds 0": "seeds must be 1 or more, got 0",
    "dense --rounds -1": "rounds must be 0 to 46 on fc, .*; got -1",
    "dense --rounds 99": "rounds must be 0 to 46 on fc, .*; got 99",
    "dense --workers 0": "workers must be 1 or more, got 0",
    "dense --only size=3": "--only takes FIELD=VALUE with a field of network, .*; got 'size'",
    "dense --only criterion": "--only takes FIELD=VALUE, got 'criterion'",
    "dense --only criterion=best": "criterion must be one of none here; got 'best'",
    "mask-criteria --only seed=7": "seed must be one of 0, 1, 2, 3, 4 here; got '7'",
    "mask-1 --only mask1=reinit --only criterion=random": "no runs with all of mask1=reinit, crit",
    "dense --network conv2": "cifar10 needs a folder: give --data-dir DIR",
    "dense --network conv2 --data-dir none": "cifar10 was not found: none/cifar-10-batches-bin has",
    "dense --network conv2 --data-dir file": "cifar10 was not found: file/cifar-10-batches-bin has",
    "dense --devices gpu": "devices must be cpu, or cuda:0,cuda:1 and so on; got 'gpu'",
    "dense --devices cuda:99": "there is no cuda:99 here: torch finds",
    "dense --devices cpu,cpu": "devices must be cpu, or CUDA devices; got 'cpu, cpu'",
    "dense --scheduler tcp://a:1": "is for the engine dask, got tcp://a:1 with process: add --eng",
    "dense --store later": "later/store.json is of format 2, this version reads format 1: give",
    "dense --store file": "file cannot be a folder, since it, or what it is in, is a file: give",
    "dense --store file/below": "file/below cannot be a folder, since it, or what it is in, is a",
}


def said_by(command: str, capsys) -> str:
    """What a command that fails says."""
    assert main(command.split()) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("options", NO_RUN)
def test_a_run_that_cannot_be(options, folder, capsys):
    before = content(folder)
    command = f"run {options} --profile smoke"
    said = said_by(command if "--store" in command else f"{command} --store new", capsys)
    assert re.search(NO_RUN[options], said), said
    assert content(folder) == before


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "scheduler must be an address such as tcp://HOST:8786, got 'nonsense'"),
        ("tcp://127.0.0.1:9", "no Dask scheduler answers at tcp://127.0.0.1:9: is it running?"),
    ],
)
def test_a_scheduler_that_cannot_be(address, message, folder, capsys):
    pytest.importorskip("distributed")
    command = (
        f"run dense --profile smoke --seeds 1 --engine dask --store made --scheduler {address}"
    )
    assert message in said_by(command, capsys)
    assert Store(Path("made")).rows() == []


SHOWS = ("status", "figure", "table", "claims", "report")
STORES = {
    "none": "none is no store of results .*: give its folder with --store, or make one by",
    "empty": "empty is no store of results",
    "file": "file is no store of results",
    "later": "later/store.json is of format 2",
    "made": "no rows in made of any study on any network with profile paper or coarse: make them",
}


@pytest.mark.parametrize("command", SHOWS)
def test_what_shows_results_without_any(command, folder, capsys):
    before = content(folder)
    for store, message in STORES.items():
        if (command, store) == ("status", "made"):
            continue  # that is a status
        assert re.search(message, said_by(f"{command} --store {store}", capsys))
    for options, message in {
        "nothing": "study must be one of dense, .*; got 'nothing'",
        "--network vgg": "network must be one of fc, .*; got 'vgg'",
    }.items():
        assert re.search(message, said_by(f"{command} {options} --store made", capsys))
    assert content(folder).keys() - before.keys() <= {f"{folder}/made/store.lock"}


def test_places_that_cannot_be_written_are_refused_before_the_work(folder, capsys):
    for command in ("quickstart --json", "quickstart --png", "speed --json"):
        said = said_by(f"{command} file/x", capsys)
        assert "file cannot be a folder, since it, or what it is in, is a file" in said


def test_a_figure_where_a_file_is(folder, capsys):
    with Store(Path("made")).claim([SMOKE.id]) as lease:
        Store(Path("made")).add(lease, [ROW], [])
    before = content(folder)
    said = said_by("report --profile smoke --store made --out file/page.html", capsys)
    assert "file cannot be a folder" in said
    assert content(folder) == before


def test_verdicts_as_a_file_name_what_was_not_run_too(folder, capsys):
    with Store(Path("made")).claim([SMOKE.id]) as lease:
        Store(Path("made")).add(lease, [ROW], [])
    assert main(["claims", "--profile", "smoke", "--store", "made", "--out", "new"]) == 0
    said = capsys.readouterr().out
    assert Path("new/claims.md").read_text() == said
    assert len(re.findall(r"\| conv4 \| .* \| not run \|", said)) > 10
    assert said.startswith("Of ")
    assert main(["claims", "--store", "made"]) == 0  # the only profile there is, without its name
    assert capsys.readouterr().out == said


def test_a_run_of_a_figure_does_its_studies(folder, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "experiments.__main__.run_study", lambda study, *a, **k: asked.append(study) or 0
    )
    assert main(["run", "--figure", "table1", "--profile", "smoke", "--store", "new"]) == 0
    assert main(["run", "--figure", "article-8", "--profile", "smoke", "--store", "new"]) == 0
    assert [study.name for study in asked] == ["supermasks", "learned", "mask-1"]
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert "figure 4 of the paper, figure 8 of the article; fc, conv2, conv4, conv6" in said


@pytest.mark.filterwarnings("default")
def test_a_changed_line_is_one_line_of_warning(folder, capsys):
    with Store(Path("made")).claim([SMOKE.id]) as lease:
        Store(Path("made")).add(lease, [ROW, ROW | {"round": 1}], [])
    rows = Path("made/rows.jsonl")
    rows.write_bytes(rows.read_bytes().replace(b'"round":0', b'"round":7'))
    command = "status dense --network fc --profile smoke --store made"
    assert main(command.split()) == 0
    said = capsys.readouterr()
    assert "0 / 5" in said.out
    assert re.fullmatch(
        r"warning: made/rows.jsonl line 1 is not as it was .*: not used\.\n", said.err
    )


@pytest.mark.parametrize("command", [c for c in SHOWS if c != "status"])
def test_without_matplotlib(command, folder, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    assert "pip install 'lottery-sparse[experiments]'" in said_by(f"{command} --store made", capsys)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path):
    command = f"run mask-criteria --profile smoke --seeds 1 --workers 1 --numerics {numerics()}"
    program = subprocess.Popen(
        [sys.executable, "-m", "experiments", *command.split(), "--store", tmp_path / "store"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores it, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 60
    while not (tmp_path / "store/rows.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(program.pid, signal.SIGINT)
    said = program.communicate(timeout=60)[1]
    assert program.returncode == 130
    assert said == "interrupted; the same command goes on with what is not done\n"


@pytest.mark.parametrize(
    ("profiles", "shown"),
    [(["smoke", "smoke"], "smoke"), (["paper", "short"], "paper"), (["smoke", "short"], "paper")],
)
def test_what_is_shown_is_of_the_profile_that_the_store_has(profiles, shown):
    class Rows:
        def rows(self):
            return [{"profile": name} for name in profiles]

    assert only_profile(Rows()) == shown
