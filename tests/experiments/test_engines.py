"""Groups of a sweep on processes and on Dask: what fails, what is killed, what Ctrl-C leaves."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from engine_problems import Named, Work
from sweep_problems import follow_all, written

from experiments.__main__ import main
from experiments.store.machine import numerics
from experiments.store.store import Store
from experiments.study.runs import Run
from experiments.study.studies import STUDIES
from experiments.sweep import engines
from experiments.sweep.engines import sweep
from experiments.sweep.sweep import Job, claim

ROOT = Path(__file__).resolve().parents[2]
PROBLEMS = ROOT / "tests" / "problems"
COUNT = 12  # runs of the program

pytestmark = pytest.mark.usefixtures("any_arithmetic")

needs_distributed = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="distributed is not installed"
)


def named(*names: str):
    return [(Named(name),) for name in names]


def begun(work: Work) -> list[str]:
    return [line[1] for line in work.said() if line[0] == "begin"]


# what every engine does


@pytest.mark.parametrize("engine", ["inline", "process"])
def test_an_error_is_said_and_does_not_stop_the_others(engine, tmp_path, capfd):
    work = Work(tmp_path)
    groups = [(Named("bad-1"), Named("x"), Named("y")), *named("a", "bad-2", "b")]
    assert sweep(groups, work, engine=engine) == 2
    assert begun(work) == ["bad-1", "a", "bad-2", "b"]
    said = capfd.readouterr()
    assert said.err.splitlines() == [
        "failed: bad-1 and 2 more: the data are bad",
        "failed: bad-2: the data are bad",
    ]
    assert said.out == ""


@pytest.mark.parametrize("engine", ["inline", "process", "dask"])
def test_nothing_to_do_starts_nothing(engine, tmp_path):
    assert sweep([], Work(tmp_path), engine=engine) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "threads"}, "engine must be one of inline, process, dask; got 'threads'"),
        ({"scheduler": "tcp://a:1"}, "scheduler is for the engine dask, got tcp://a:1 with"),
        ({"workers": 0}, "workers must be 1 or more, got 0"),
        ({"devices": ("cpu", "cuda:0")}, "devices must be cpu, or CUDA devices; got 'cpu, cuda:0'"),
        (
            {"engine": "dask", "scheduler": "tcp://a:1", "devices": ("cuda:0", "cuda:1")},
            "a worker of a scheduler has one device, got cuda:0, cuda:1: start one worker",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep(named("a"), Work(tmp_path), **{"engine": "process", **options})


# processes


def test_a_warning_of_a_worker_is_one_line(tmp_path, capfd):
    assert sweep(named("odd"), Work(tmp_path), engine="process") == 0
    assert capfd.readouterr().err == "warning: a line is damaged\n"


def test_a_killed_worker_is_replaced_and_its_group_done_again(tmp_path, capfd):
    work = Work(tmp_path)
    assert sweep(named("once", "killed", "mute", "a"), work, engine="process", workers=2) == 2
    assert work.count("once", "end") == work.count("a", "end") == 1
    assert (work.count("once"), work.count("killed"), work.count("mute")) == (2, 3, 1)
    assert sorted(capfd.readouterr().err.splitlines()) == [
        "failed: killed: its process was killed 3 times (signal 9, Killed)",
        "failed: mute: its process ended with status 7",
    ]


def test_a_device_takes_one_group_at_a_time(tmp_path):
    work = Work(tmp_path, seconds=0.2)
    groups = named(*"abcdef")
    assert sweep(groups, work, engine="process", workers=7, devices=("cuda:0", "cuda:1")) == 0
    busy: set[str] = set()
    together = 0
    for word, _, device, _ in work.said():
        assert (word == "begin") == (device not in busy)
        busy ^= {device}
        together = max(together, len(busy))
    assert together == 2
    assert sorted(begun(work)) == list("abcdef")


# the program: rows of a store, killed and interrupted


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    follow_all(folder, COUNT)
    return written(folder)


ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{PROBLEMS}"}


def started(folder: Path, *more: str, module: list | None = None) -> subprocess.Popen:
    engine, *scheduler = more or ("",)
    return subprocess.Popen(
        module or [sys.executable, PROBLEMS / "engine_problems.py", engine, folder, *scheduler],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_rows(folder: Path, program: subprocess.Popen, count: int = 1) -> None:
    path = folder / "rows.jsonl"
    until = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert program.poll() is None, program.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)


def members(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found.append(int(folder.name))
    return found


def wait_for_end(session: int) -> None:
    until = time.monotonic() + 5  # multiprocessing's resource tracker outlives the parent a little
    while left := members(session):
        assert time.monotonic() < until, left
        time.sleep(0.05)


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


@linux
@pytest.mark.parametrize("whom", ["parent", "all"])  # kill -INT; Ctrl-C on a terminal
def test_ctrl_c_leaves_no_process_and_a_store_that_resumes(whom, undisturbed, tmp_path):
    program = started(tmp_path, "process")
    wait_for_rows(tmp_path, program, 4)
    began = time.monotonic()
    (os.kill if whom == "parent" else os.killpg)(program.pid, signal.SIGINT)
    said = program.communicate(timeout=60)[0]
    assert time.monotonic() - began < 5  # a second; the machine may be busy
    assert program.returncode == 130
    assert said == ""
    wait_for_end(program.pid)
    assert Store(tmp_path).holders() == {}
    assert 4 <= len(written(tmp_path)) < len(undisturbed)
    follow_all(tmp_path, COUNT)
    assert written(tmp_path) == undisturbed


@linux
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    program = started(tmp_path, "process")
    wait_for_rows(tmp_path, program)
    assert len(members(program.pid)) > 2
    program.kill()
    program.communicate(timeout=60)
    wait_for_end(program.pid)


# Dask


CLUSTER = """
import sys
from distributed import LocalCluster

if __name__ == "__main__":
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None,
        protocol="tcp", host="127.0.0.1",
    ) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


def a_worker(folder: Path) -> int:
    return Store(folder).records()[-1]["pid"]


@pytest.mark.slow
@needs_distributed
def test_a_dask_worker_killed_half_way(undisturbed, tmp_path):
    program = started(tmp_path, "dask")
    wait_for_rows(tmp_path, program, 3)
    os.kill(a_worker(tmp_path), signal.SIGKILL)
    said = program.communicate(timeout=120)[0]
    assert program.returncode == 0, said
    assert said == ""
    assert written(tmp_path) == undisturbed
    assert len({record["pid"] for record in Store(tmp_path).records()}) >= 3


@pytest.mark.slow
@linux
@needs_distributed
def test_ctrl_c_ends_a_local_cluster(tmp_path):
    program = started(tmp_path, "dask")
    wait_for_rows(tmp_path, program, 3)
    began = time.monotonic()
    os.killpg(program.pid, signal.SIGINT)
    said = program.communicate(timeout=60)[0]
    assert time.monotonic() - began < 10  # two seconds
    assert program.returncode == 130
    assert said == ""
    wait_for_end(program.pid)
    assert Store(tmp_path).holders() == {}


@pytest.mark.slow
@needs_distributed
def test_a_scheduler_that_is_there(undisturbed, tmp_path):
    program = [sys.executable, "-W", "ignore", "-c", CLUSTER]
    cluster = subprocess.Popen(
        program,
        env=ENVIRONMENT,
        cwd=PROBLEMS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert cluster.stdin
    assert cluster.stdout
    try:
        address = cluster.stdout.readline().strip()
        sweeps = [started(tmp_path, "dask", address) for _ in range(2)]
        for sweep_ in sweeps:
            said = sweep_.communicate(timeout=120)[0].splitlines()
            assert sweep_.returncode == 0, said
            ended = [line for line in said if line.startswith("ended: ")]
            assert len(ended) == COUNT // 2
            assert ended[0].endswith(" and 1 more")
        assert written(tmp_path) == undisturbed
    finally:
        cluster.communicate(timeout=60)  # closes its input, which ends it


def test_a_scheduler_that_is_not_there(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(engines, "TIMEOUT", "0.1 s")
    with pytest.raises(OSError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9: is it"):
        sweep(named("a"), Work(tmp_path), engine="dask", scheduler="tcp://127.0.0.1:9")


def test_without_distributed_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs distributed, .*pip install 'lottery-sparse.clus"):
        sweep(named("a"), Work(tmp_path), engine="dask")


# a study: what others hold, and the command line


SMOKE = partial(Run, network="fc", profile="smoke", seed=0)


def test_runs_of_a_group_that_another_holds_are_left_to_it(tmp_path, capsys):
    store = Store(tmp_path)
    group = [SMOKE(criterion=criterion) for criterion in ("random", "movement", "large_init")]
    with store.claim([run.id for run in group[:2]]) as held:
        mine, lease = claim(group, store)
        assert mine == group[2:]
        assert lease.run_ids == {group[2].id}
        lease.release()
        who = rf"held by another worker \(\S+, pid {os.getpid()}, since \S+Z\), left to it: "
        assert re.fullmatch(who + rf"{group[0].id} and 1 more\n", capsys.readouterr().out)
        Job(tmp_path, 1)(tuple(group[:2]))  # all is held: says so and does nothing
        assert re.fullmatch(who + rf"{group[0].id} and 1 more\n", capsys.readouterr().out)
        assert held.run_ids == {run.id for run in group[:2]}
    assert store.rows() == []


def test_a_study_that_another_sweep_does_says_so_and_succeeds(tmp_path, capsys):
    store = Store(tmp_path)
    runs = list(STUDIES["dense"].runs("fc", "smoke", (0, 1)))
    command = ["run", "dense", "--profile", "smoke", "--seeds", "2", "--store", f"{tmp_path}"]
    with store.claim([run.id for run in runs]):
        assert main(command) == 0
    assert re.fullmatch(
        rf"2 of 2 runs are being done by other workers \(\S+ pid {os.getpid()}\); "
        "the same command goes on with what they leave\n",
        capsys.readouterr().out,
    )
    assert store.rows() == []


@pytest.mark.slow
@linux
def test_a_study_killed_half_way_has_the_rows_of_an_undisturbed_one(tmp_path):
    def study(name: str, engine: str = "process") -> subprocess.Popen:
        command = "run mask-criteria --network fc --profile smoke --seeds 2 --rounds 1 --workers 2"
        more = ["--only=criterion=random", "--engine", engine, "--store", tmp_path / name]
        more += ["--numerics", f"{numerics()}"]
        return started(
            tmp_path, module=[sys.executable, "-m", "experiments", *command.split(), *more]
        )

    killed, whole = study("killed"), study("whole", "inline")
    wait_for_rows(tmp_path / "killed", killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    again = study("killed")
    for program in (whole, again):
        said = program.communicate(timeout=300)[0]
        assert program.returncode == 0, said
    assert written(tmp_path / "killed") == written(tmp_path / "whole")
    assert len(written(tmp_path / "whole")) == 2 + 2 * 2
