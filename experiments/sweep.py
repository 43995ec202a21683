"""A study run: its groups of runs handed to workers, which may die at any moment."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from experiments import data
from experiments.data import Dataset
from experiments.engines import sweep
from experiments.execute import execute, groups, has_dense
from experiments.runs import PROFILES, Run
from experiments.store import Store
from experiments.studies import Study, wanted

MOST_ON_CPU = 8  # networks side by side; more gain nothing on one core


@dataclass(frozen=True)
class Job:
    """What a worker needs to know beside its group; it is sent to other processes."""

    store: Path
    rounds: int
    data_dir: Path | None = None

    def __call__(self, group: tuple[Run, ...], device: str = "cpu") -> None:
        """Bring a group to its rounds. Runs that another worker holds are left to it."""
        if device == "cpu":
            torch.set_num_threads(1)  # the bits of dense products depend on how many there are
        store = Store(self.store)
        lease = store.claim([run.id for run in group])
        if lease is None:
            print(f"{group[0].id} and what is trained with it are held by another worker")
            return
        with lease:
            for dense in {run.dense for run in group} - set(group):
                wait_for(dense, store)
            dataset = load(group[0].dataset, self.data_dir, device)
            execute(group, self.rounds, store, lease, dataset, partial(print, flush=True))


def wait_for(dense: Run, store: Store) -> None:
    """Return when the dense run is there, which another sweep on this store may be at."""
    while not has_dense(dense, store):
        if dense.id not in store.holders() and not has_dense(dense, store):
            raise ValueError(f"{dense.id} is not in {store.folder}: its run failed; start again.")
        time.sleep(2)


@cache
def load(name: str, folder: Path | None, device: str) -> Dataset:
    """A data set, once per process."""
    return data.load(name, folder, torch.device(device))


def run_study(
    study: Study,
    network: str,
    profile: str,
    seeds: int,
    store: Store,
    *,
    rounds: int | None = None,
    only: Sequence[tuple[str, str]] = (),
    data_dir: Path | None = None,
    engine: str = "process",
    workers: int = 1,
    scheduler: str | None = None,
    devices: Sequence[str] = ("cpu",),
) -> int:
    """Do what is still to do of a study; returns how many groups failed.

    Args:
        seeds: how many, from 0 on.
        rounds: how many; None: the study's, or as many as the profile has at most.
        only: arms to take: pairs (field of Run, its value as text); several of one field are
            alternatives.
    """
    most = PROFILES[profile].rounds
    if rounds is None:
        rounds = study.rounds if most is None else min(most, study.rounds)
    runs = [run for run in wanted(study, network, profile, seeds) if chosen(run, only)]
    load(runs[0].dataset, data_dir, "cpu")  # before any worker starts: an error is one message
    cuda = devices[0] != "cpu"
    job = Job(store.folder, rounds, data_dir)
    failed = 0
    for phase in (0, 1):  # the others start from the dense runs
        size = len(runs) if cuda else spread_over(len(runs), workers)
        todo = groups(runs, rounds, store, size, across_seeds=cuda)[phase]
        failed += sweep(
            todo, job, engine=engine, workers=workers, scheduler=scheduler, devices=devices
        )
    return failed


def spread_over(runs: int, workers: int) -> int:
    """Runs in a group such that each worker gets three groups or more."""
    return max(1, min(MOST_ON_CPU, runs // (3 * workers)))


def chosen(run: Run, only: Sequence[tuple[str, str]]) -> bool:
    """Whether the run is of the arms named; dense runs are those of all."""
    if run == run.dense or not only:
        return True
    values: dict[str, set[str]] = {}
    for name, value in only:
        if name not in Run.__dataclass_fields__:
            raise ValueError(f"--only takes fields of a run, FIELD=VALUE; got {name}={value}.")
        values.setdefault(name, set()).add(value)
    return all(str(getattr(run, name)) in allowed for name, allowed in values.items())
