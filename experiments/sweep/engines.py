"""Who does the groups of a sweep: this process, processes of this machine, or a Dask cluster.

No engine holds truth: the store does. A group that is done again, or that dies half-way, loses at
most the round in flight, so an engine only has to hand out groups and to count what failed.
"""

import contextlib
import importlib.util
import logging
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from experiments.sweep.progress import warning_line

if TYPE_CHECKING:  # it imports torch, and processes shall start quickly
    from experiments.study.runs import Run

ATTEMPTS = 3  # of a group whose worker was killed
TIMEOUT = "30 s"  # to reach a scheduler
SAID = 70  # exit status of a worker that has said what failed
INSTALL_DASK = "pip install 'lottery-sparse[cluster]'"

Group = tuple["Run", ...]
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
        devices: what groups run on; each takes one at a time, but for "cpu". With a scheduler one
            device, as its workers name theirs.

    Raises:
        ValueError: an unknown engine, a scheduler for another one than dask, no distributed, or
            devices that do not go together.
        KeyboardInterrupt: Ctrl-C; workers are gone by then.
    """
    check(engine, workers, scheduler, devices)
    slots = list(devices) if devices[0] != "cpu" else ["cpu"] * workers
    if not groups:
        return 0
    return ENGINES[engine](groups, work, slots, scheduler)


def check(engine: str, workers: int, scheduler: str | None, devices: Sequence[str]) -> None:
    """Raise ValueError where `sweep` would, but for what a cluster alone can know."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}.")
    if scheduler and engine != "dask":
        raise ValueError(
            f"scheduler is for the engine dask, got {scheduler} with {engine}: add --engine dask."
        )
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}.")
    if not devices or ("cpu" in devices and len(devices) > 1):
        raise ValueError(f"devices must be cpu, or CUDA devices; got {', '.join(devices)!r}.")
    if scheduler and len(devices) > 1:
        raise ValueError(
            f"a worker of a scheduler has one device, got {', '.join(devices)}: start one worker "
            "per GPU with CUDA_VISIBLE_DEVICES, and give --devices cuda:0."
        )
    if engine == "dask" and importlib.util.find_spec("distributed") is None:
        raise ValueError(f"the engine dask needs distributed, which is not here: {INSTALL_DASK}.")


def _inline(groups: Sequence[Group], work: Work, slots: list[str], scheduler: str | None) -> int:
    failed = 0
    for group in groups:
        try:
            work(group, slots[0])
        except Exception as error:  # whatever it is, the other groups go on
            failed += _say_failed(group, error)
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
    waiting = deque((group, 1) for group in groups)
    free = slots[: len(groups)]
    running: dict[int, _Running] = {}
    failed = 0
    resource_tracker.ensure_running()  # else the first start lets Ctrl-C through
    with _one_thread(), _stopping(running):
        while waiting or running:
            while waiting and free:
                group, attempt = waiting.popleft()
                _start(group, attempt, free.pop(0), work, running)
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                one = running.pop(sentinel)
                one.process.join()
                free.append(one.slot)
                code = one.process.exitcode or 0
                if code < 0 and one.attempt < ATTEMPTS:
                    waiting.appendleft((one.group, one.attempt + 1))
                elif code < 0:
                    name = signal.strsignal(-code) or "unknown"
                    why = f"its process was killed {ATTEMPTS} times (signal {-code}, {name})"
                    failed += _say_failed(one.group, why)
                elif code == SAID:
                    failed += 1
                elif code:
                    failed += _say_failed(one.group, f"its process ended with status {code}")
    return failed


def _start(group: Group, attempt: int, slot: str, work: Work, running: dict[int, _Running]) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_child, args=(work, group, slot), daemon=True
    )
    with _no_interrupt():  # so that no child is started and then forgotten
        process.start()
        running[process.sentinel] = _Running(group, slot, process, attempt)


def _child(work: Work, group: Group, device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to deal with
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    warnings.showwarning = warning_line
    try:
        work(group, device)
    except Exception as error:
        _say_failed(group, error)
        sys.exit(SAID)


def _end_with_parent() -> None:
    """Who is killed cannot stop its workers, so they look themselves."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; processes started in it do not hear it at all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
        with _no_interrupt():
            for one in running.values():
                one.process.terminate()
            deadline = time.monotonic() + 0.5
            for one in running.values():
                one.process.join(max(0.0, deadline - time.monotonic()))
            for one in running.values():
                one.process.kill()
                one.process.join()


# ---- a Dask cluster ------------------------------------------------------------------------------


def _dask(groups: Sequence[Group], work: Work, slots: list[str], scheduler: str | None) -> int:
    import dask.config
    import distributed

    settings: dict[str, Any] = {
        "distributed.scheduler.allowed-failures": ATTEMPTS - 1,  # deaths of its worker
        "distributed.scheduler.worker-ttl": "10 minutes",  # a round holds the GIL now and then
    }
    failed = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(settings))
        if scheduler is None:
            address = stack.enter_context(_local_cluster(len(slots)))
        else:
            address = scheduler
        try:
            client = stack.enter_context(distributed.Client(address, timeout=TIMEOUT))
        except OSError as error:
            raise OSError(f"no Dask scheduler answers at {address}: is it running?") from error
        except ValueError as error:
            raise ValueError(
                f"scheduler must be an address such as tcp://HOST:8786, got {address!r}: {error}."
            ) from None
        sweep_id = secrets.token_hex(4)  # two sweeps may use one scheduler
        # names of runs are in the keys, so that the dashboard says what is being done
        futures = {
            client.submit(
                _task, work, group, slots if scheduler is None else slots[:1],
                key=f"{group[0].id}-{len(group)}-{sweep_id}", pure=False,
            ): group
            for group in groups
        }  # fmt: skip
        try:
            for future in distributed.as_completed(futures):
                group = futures[future]
                if future.status != "finished":
                    failed += _say_failed(group, _why(future.exception()))
                elif scheduler is not None:  # its workers' output is elsewhere
                    print(f"ended: {_named(group)}", flush=True)
        except BaseException:
            client.cancel(list(futures), force=True)
            raise
    return failed


@contextlib.contextmanager
def _local_cluster(workers: int) -> Iterator[Any]:
    """Worker processes of one thread; the operating system limits their memory, not Dask."""
    import distributed

    resource_tracker.ensure_running()
    with _no_interrupt():  # its threads and processes leave Ctrl-C to this thread
        cluster = distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=None,
            dashboard_address=None,  # pyright: ignore[reportArgumentType]
            silence_logs=logging.CRITICAL,  # what fails is said here
        )
    try:
        yield cluster
    except BaseException:
        for nanny in cluster.workers.values():  # else they end their rounds first
            nanny.auto_restart = False
        for child in multiprocessing.active_children():
            child.kill()
        raise
    finally:
        with _no_interrupt():
            cluster.close()


def _task(work: Work, group: Group, slots: Sequence[str]) -> None:
    """Returns nothing: results go into the store."""
    from distributed import get_worker

    # the workers of a local cluster are named by number
    work(group, slots[int(get_worker().name)] if len(slots) > 1 else slots[0])


def _why(error: BaseException | None) -> str | BaseException:
    from distributed import CancelledError, KilledWorker

    if isinstance(error, KilledWorker):
        return "the workers that were on it died, one after the other"
    if error is None or isinstance(error, CancelledError):
        return "the scheduler has dropped it"
    if isinstance(error, ModuleNotFoundError) or "deserialization of the task" in str(error):
        return (
            "the scheduler or a worker cannot import what it is sent: start them in the checkout, "
            "with PYTHONPATH=$PWD and this Python environment (see experiments/slurm.md)"
        )
    return error


def _named(group: Group) -> str:
    first, *others = group
    return f"{first.id} and {len(others)} more" if others else first.id


def _say_failed(group: Group, why: str | BaseException) -> int:
    text = str(why) or type(why).__name__
    print(f"failed: {_named(group)}: {text}", file=sys.stderr, flush=True)
    return 1


ENGINES: dict[str, Callable[[Sequence[Group], Work, list[str], str | None], int]] = {
    "inline": _inline,
    "process": _processes,
    "dask": _dask,
}
