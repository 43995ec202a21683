"""A study run: its groups of runs handed to workers, which may die at any moment."""

import contextlib
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from experiments.store import arithmetic, leases
from experiments.store.leases import LeaseLost
from experiments.store.records import attempt
from experiments.store.remakes import DIFFERS, Remakes, to_do
from experiments.store.store import Lease, OtherNumbers, Store
from experiments.study.networks import check_fits, find, keep_by_parameter, skeleton
from experiments.study.runs import Run, rounds_of
from experiments.study.studies import Study, rounds_asked, wanted
from experiments.sweep.engines import ATTEMPTS, check, sweep
from experiments.sweep.execute import execute, groups, has_dense
from experiments.train import data
from experiments.train.data import Dataset

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
        for run in group:
            arithmetic.check(run, device)
        store = Store(self.store)
        mine, lease = claim(group, store)
        if lease is None:
            return
        with lease:
            # what is claimed may have been done by another worker meanwhile, or before a kill
            left = [run for run in mine if not is_done(run, self.rounds, store)]
            if not left:
                return
            for run in left:
                if run.schedule != "learned" and run != run.dense:
                    wait_for(run.dense, store)
            dataset = load(group[0].dataset, self.data_dir, device)
            store.add(lease, [], [attempt(run, "started") for run in left])
            try:
                execute(left, self.rounds, store, lease, dataset, partial(print, flush=True))
            except LeaseLost:
                raise  # the runs are another worker's now
            except Exception as error:
                other = error.run_id if isinstance(error, OtherNumbers) else None
                with contextlib.suppress(OSError, LeaseLost):  # what is said is the error itself
                    store.add(
                        lease,
                        [],
                        [
                            attempt(run, DIFFERS if run.id == other else "failed", str(error))
                            for run in left
                        ],
                    )
                raise


def claim(group: Sequence[Run], store: Store) -> tuple[list[Run], Lease | None]:
    """The runs of a group that nobody works on, and their lease; says which are left out."""
    while True:
        holders = store.holders()
        mine = [run for run in group if run.id not in holders]
        lease = store.claim([run.id for run in mine]) if mine else None
        if mine and lease is None:
            continue  # another worker came between
        if len(mine) < len(group):
            say_held([run for run in group if run not in mine], holders)
        return mine, lease


def is_done(run: Run, rounds: int, store: Store) -> bool:
    """Whether the store holds all of a run that others need of it."""
    there = rounds_of(run, rounds) <= store.rounds_done(run.id)
    return there and (run != run.dense or has_dense(run, store))


def say_held(runs: Sequence[Run], holders: Mapping[str, Mapping[str, Any]]) -> None:
    """One line for each other worker: how many of the runs it holds."""
    of: dict[str, list[Run]] = {}
    for run in runs:
        if owner := holders.get(run.id):
            who = f"{owner['host']}, pid {owner['pid']}, since {owner['since']}"
            of.setdefault(who, []).append(run)
    for who, its in of.items():
        more = f" and {len(its) - 1} more" if len(its) > 1 else ""
        print(f"held by another worker ({who}), left to it: {its[0].id}{more}", flush=True)


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
    folder: Path,
    *,
    rounds: int | None = None,
    only: Sequence[tuple[str, str]] = (),
    data_dir: Path | None = None,
    download: bool = False,
    engine: str = "process",
    workers: int = 1,
    scheduler: str | None = None,
    devices: Sequence[str] = ("cpu",),
    numerics: int = 1,
    remake: bool = False,
) -> int:
    """Do what is still to do of a study; returns how many groups failed, or runs were left.

    Args:
        seeds: how many, from 0 on.
        folder: of the store, made where it is missing, but only once the rest is in order.
        rounds: how many; None: the study's, or as many as the profile has at most.
        only: arms to take: pairs (field of Run, its value as text); several of one field are
            alternatives.
        download: fetch what is missing in `data_dir` first.
        numerics: of the runs, see `Run`.
        remake: make chains anew, as wholes, that cannot go on: their weights are not in the store,
            or are another machine's, or other numbers came out of them. Else those without weights
            are done again and compared with their rows, and the rest is left.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be 1 or more, got {seeds}.")
    every = [replace(run, numerics=numerics) for run in wanted(study, network, profile, seeds)]
    check_only(every, only)
    runs = [run for run in every if chosen(run, only)]
    if not runs:
        values = ", ".join(f"{name}={value}" for name, value in only)
        raise ValueError(f"{study.name} has no runs with all of {values}: leave out some --only.")
    if rounds is None:
        rounds = rounds_asked(study, profile)
    check_rounds(rounds, network)
    check(engine, workers, scheduler, devices)
    check_devices(devices, scheduler)
    # before any worker starts: an error is one message
    here = devices[0] if scheduler is None else None
    if here is not None:
        arithmetic.check(runs[0], here)
        arithmetic.warn_if_slow(runs[0], here)
    if download:
        data.load(runs[0].dataset, data_dir, download=True)
    dataset = load(runs[0].dataset, data_dir, "cpu")
    check_fits(runs[0].net, dataset.val.images[:2], dataset.classes, dataset.name)
    store = Store(folder)
    cuda = devices[0] != "cpu"
    # workers of a cluster may be in another folder
    job = Job(store.folder.absolute(), rounds, data_dir and data_dir.absolute())
    failed = 0
    say = cache(partial(print, flush=True))  # each sentence once
    size = len(runs) if cuda else spread_over(len(runs), workers)
    for phase in (0, 1):  # the others start from the dense runs
        again, before_failed = 0, failed
        while failed == before_failed and again < ATTEMPTS:
            now = to_do(runs, rounds, Remakes(store, here, remake), say)
            left = groups(now, rounds, store, size, across_seeds=cuda)[phase]
            if failed:  # of dense runs: what starts from the others is done all the same
                left = [group for group in left if all(_can_start(run, store) for run in group)]
            todo = free(left, store)
            if left and not todo:  # by a worker that died on another machine, perhaps
                wait_for_life([run for group in left for run in group], store)
                todo = free(left, store)
            if not todo:
                break
            before = len(store.rows())
            failed += sweep(
                todo, job, engine=engine, workers=workers, scheduler=scheduler, devices=devices
            )
            again = again + 1 if len(store.rows()) == before else 0
    left = say_left(runs, rounds, Remakes(store))
    return failed or left


def _can_start(run: Run, store: Store) -> bool:
    return run.schedule == "learned" or has_dense(run.dense, store)


def free(left: Sequence[tuple[Run, ...]], store: Store) -> list[tuple[Run, ...]]:
    """The groups of which a run is held by nobody."""
    holders = store.holders()
    return [group for group in left if any(run.id not in holders for run in group)]


def wait_for_life(runs: Sequence[Run], store: Store, every: float = 2.0) -> None:
    """Return when each of the runs is free, or its worker certainly alive.

    On this machine that is seen at once. Elsewhere a worker is alive that touches its lease, and
    dead that has not done so for `leases.STALE` seconds; so this waits for one or the other.
    """
    silent: dict[str, float] = {run.id: 0.0 for run in runs}
    said = False
    while True:
        holders = store.holders()
        # who has been silent for less long than when last looked at has given a sign of life
        silent = {
            run_id: holders[run_id]["silent"]
            for run_id, before in silent.items()
            if run_id in holders and holders[run_id]["silent"] > before
        }
        if not silent:
            return
        if not said:
            print(
                f"waiting for a sign of life of {_whom(holders, silent)}; after "
                f"{leases.STALE:g} s without one its runs are gone on with",
                flush=True,
            )
            said = True
        time.sleep(every)


def _whom(holders: Mapping[str, Mapping[str, Any]], run_ids: Iterable[str]) -> str:
    return ", ".join(sorted({f"{holders[at]['host']} pid {holders[at]['pid']}" for at in run_ids}))


def say_left(runs: Sequence[Run], rounds: int, remakes: Remakes) -> int:
    """At the end: what is not done. Returns how much of it nobody is on."""
    holders = remakes.store.holders()
    left = [run for run in runs if not remakes.is_done(run, rounds)]
    held = [one.id for run in left for one in remakes.remakes(run) if one.id in holders]
    if held:
        print(
            f"{len(held)} of {len(runs)} runs are being done by other workers "
            f"({_whom(holders, held)}); the same command goes on with what they leave"
        )
    return len(left) - len(held)


def check_rounds(rounds: int, network: str) -> None:
    """Raise ValueError for fewer than 0, and for more than leave each layer a weight."""
    net = find(network)
    sizes = {name: p.numel() for name, p in skeleton(net).named_parameters()}
    most = min(
        math.floor(math.log(sizes[name]) / -math.log(share))
        for name, share in keep_by_parameter(net).items()
    )
    if not 0 <= rounds <= most:
        raise ValueError(
            f"rounds must be 0 to {most} on {network}, where more leave a layer without a weight; "
            f"got {rounds}."
        )


def check_devices(devices: Sequence[str], scheduler: str | None) -> None:
    """Raise ValueError unless they are cpu, or CUDA devices that are here or at the scheduler."""
    for device in devices:
        if device == "cpu":
            continue
        if not re.fullmatch(r"cuda:\d+", device):
            raise ValueError(f"devices must be cpu, or cuda:0,cuda:1 and so on; got {device!r}.")
        if scheduler is None and int(device[5:]) >= torch.cuda.device_count():
            raise ValueError(f"there is no {device} here: torch finds {torch.cuda.device_count()}.")


def spread_over(runs: int, workers: int) -> int:
    """Runs in a group such that each worker gets three groups or more."""
    return max(1, min(MOST_ON_CPU, runs // (3 * workers)))


def chosen(run: Run, only: Sequence[tuple[str, str]]) -> bool:
    """Whether the run is of the arms named; dense runs are those of all."""
    if run == run.dense or not only:
        return True
    values: dict[str, set[str]] = {}
    for name, value in only:
        values.setdefault(name, set()).add(value)
    return all(str(getattr(run, name)) in allowed for name, allowed in values.items())


def check_only(runs: Sequence[Run], only: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError for a field that runs do not have, or a value that none of them has."""
    for name, value in only:
        if name not in Run.__dataclass_fields__:
            fields = ", ".join(Run.__dataclass_fields__)
            raise ValueError(f"--only takes FIELD=VALUE with a field of {fields}; got {name!r}.")
        known = dict.fromkeys(str(getattr(run, name)) for run in runs)
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)} here; got {value!r}.")
