"""Who does the groups of a sweep: this process, processes of this machine, or a Dask cluster.

No engine holds truth: the store does. A group that is done again, or that dies half-way, loses at
most the round in flight, so an engine only has to hand out groups and to count what failed.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from experiments.runs import Run

ATTEMPTS = 3  # of a group whose worker was killed
INSTALL_DASK = "pip install 'lottery-sparse[cluster]'"

Group = tuple[Run, ...]
Work = Callable[[Group, str], None]  # a group, and the device that it is for


def sweep(
    groups: Sequence[Group],
    work: Work,
    *,
    engine: str,
    workers: int = 1,
    scheduler: str | None = None,
    devices: Sequence[str] = ("cpu",),
) -> int:
    """Do all groups; returns how many failed, each of which was said in a line on stderr.

    An error in a group does not stop the others. A worker that is killed is replaced, and its group
    done again, up to ATTEMPTS times.

    Args:
        work: called as work(group, device); it must be picklable but for "inline".
        engine: one of ENGINES.
        workers: processes at a time on the CPU; with CUDA devices it is one each.
        scheduler: address of a Dask scheduler; None starts a cluster of processes here.
        devices: what groups run on; each takes one at a time, but for "cpu".

    Raises:
        ValueError: an unknown engine, a scheduler for another one than dask, or no distributed.
        KeyboardInterrupt: Ctrl-C; workers are gone by then.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}.")
    if scheduler and engine != "dask":
        raise ValueError(f"scheduler is for the engine dask, got {scheduler} with {engine}.")
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}.")
    slots = list(devices) if devices[0] != "cpu" else ["cpu"] * workers
    if not groups:
        return 0
    return ENGINES[engine](groups, work, slots, scheduler)


def _inline(groups: Sequence[Group], work: Work, slots: list[str], scheduler: str | None) -> int:
    failed = 0
    for group in groups:
        try:
            work(group, slots[0])
        except Exception as error:  # whatever it is, the other groups go on
            failed += _say_failed(group, str(error) or type(error).__name__)
    return failed


# ---- processes of this machine -------------------------------------------------------------------


@dataclass
class _Running:
    group: Group
    slot: str
    process: BaseProcess
    attempt: int


def _processes(groups: Sequence[Group], work: Work, slots: list[str], scheduler: str | None) -> int:
    """A fresh, spawned process for each group: nothing is shared, and nothing leaks."""
    context = multiprocessing.get_context("spawn")
    waiting = deque((group, 1) for group in groups)
    free = slots[: len(groups)]
    running: dict[int, _Running] = {}
    failed = 0
    with _one_thread(), _stopping(running):
        while waiting or running:
            while waiting and free:
                group, attempt = waiting.popleft()
                slot = free.pop(0)
                process = context.Process(target=_child, args=(work, group, slot), daemon=True)
                process.start()
                running[process.sentinel] = _Running(group, slot, process, attempt)
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                one = running.pop(sentinel)
                one.process.join()
                free.append(one.slot)
                code = one.process.exitcode or 0
                if code < 0 and one.attempt < ATTEMPTS:
                    waiting.appendleft((one.group, one.attempt + 1))
                elif code < 0:
                    name = signal.Signals(-code).name
                    failed += _say_failed(one.group, f"killed by {name} {ATTEMPTS} times")
                elif code:
                    failed += 1  # it has said why
    return failed


def _child(work: Work, group: Group, device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to deal with
    try:
        work(group, device)
    except Exception as error:
        _say_failed(group, str(error) or type(error).__name__)
        sys.exit(1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Children start with one thread per library, however many cores there are."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _stopping(running: dict[int, _Running]) -> Iterator[None]:
    """Whatever ends the block, no worker outlives it; the store stays right at any moment."""
    try:
        yield
    finally:
        for one in running.values():
            one.process.terminate()
        deadline = time.monotonic() + 0.5
        for one in running.values():
            one.process.join(max(0.0, deadline - time.monotonic()))
            one.process.kill()


# ---- a Dask cluster ------------------------------------------------------------------------------


def _dask(groups: Sequence[Group], work: Work, slots: list[str], scheduler: str | None) -> int:
    if importlib.util.find_spec("distributed") is None:
        raise ValueError(f"the engine dask needs distributed, which is not here: {INSTALL_DASK}.")
    import dask
    import distributed

    settings: dict[str, Any] = {
        "distributed.scheduler.allowed-failures": ATTEMPTS - 1,  # deaths of its worker
        "distributed.scheduler.worker-ttl": "10 minutes",  # a round holds the GIL now and then
    }
    failed = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(settings))
        if scheduler is None:
            cluster = distributed.LocalCluster(
                n_workers=len(slots), threads_per_worker=1, processes=True, dashboard_address=None
            )
            stack.enter_context(cluster)
            client = stack.enter_context(distributed.Client(cluster))
        else:
            client = stack.enter_context(distributed.Client(scheduler, timeout="30 s"))
        # names of runs are keys, so that the dashboard says what is being done
        futures = {
            client.submit(
                _task, work, group, slots[at % len(slots)],
                key=f"{group[0].id}-{len(group)}", pure=False,
            ): group
            for at, group in enumerate(groups)
        }  # fmt: skip
        try:
            for future in distributed.as_completed(futures):
                if future.status != "finished":
                    failed += _say_failed(futures[future], str(future.exception()))
        except BaseException:
            client.cancel(list(futures), force=True)
            raise
    return failed


def _task(work: Work, group: Group, device: str) -> None:
    """Returns nothing: results go into the store."""
    work(group, device)


def _say_failed(group: Group, why: str) -> int:
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    print(f"failed: {group[0].id}{more}: {why}", file=sys.stderr, flush=True)
    return 1


ENGINES: dict[str, Callable[[Sequence[Group], Work, list[str], str | None], int]] = {
    "inline": _inline,
    "process": _processes,
    "dask": _dask,
}
