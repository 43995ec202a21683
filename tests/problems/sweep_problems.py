"""Small runs that write to a store as studies do, and ways to kill who works on them.

As a program, `python sweep_problems.py kill_anywhere FOLDER ...`, it forks its workers: it holds
no thread, and a fork is quick enough to kill hundreds.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiments.store.store import Store

ROUNDS = 4


def ids(count: int) -> list[str]:
    return [f"fc-s{seed}-test-{seed:012x}" for seed in range(count)]


RUN = ids(1)[0]
ROW = {"run_id": RUN, "round": 0, "test_accuracy": 0.1 + 0.2, "kept": 3, "products": ["sparse"]}
RECORD = {"run_id": RUN, "round": 0, "seconds": 1.5}


def start(run_id: str) -> torch.Tensor:
    return torch.tensor([1.0, 2.0, int(run_id[-12:], 16)], dtype=torch.float64)


def follow(
    store: Store, group: Sequence[str], rounds: int = ROUNDS, record: dict | None = None
) -> bool:
    """Run a group to its end, from its checkpoint; False: somebody else is on it."""
    lease = store.claim(group)
    if lease is None:
        return False
    with lease:
        done = set.intersection(*(store.rounds_done(run_id) for run_id in group))
        states, at = {run_id: start(run_id) for run_id in group}, 0
        if saved := store.load(group[0]):
            states, at = saved[0], saved[1]["round"]
        for number in range(at, rounds):
            states = {run_id: torch.sin(state * 1.1 + 0.3) for run_id, state in states.items()}
            rows = [
                {"run_id": run_id, "round": number, "test_accuracy": float(state.sum())}
                for run_id, state in states.items()
            ]
            records = [{"run_id": run_id, "round": number, "pid": os.getpid()} for run_id in group]
            store.add(lease, rows, [] if number in done else [r | (record or {}) for r in records])
            store.save(lease, group[0], states, {"round": number + 1})
    return True


def follow_all(folder: Path, count: int, size: int = 2) -> None:
    store, every = Store(folder), ids(count)
    for at in range(0, count, size):
        follow(store, every[at : at + size])


def written(folder: Path) -> list[bytes]:
    return sorted((folder / "rows.jsonl").read_bytes().splitlines())


CALLS = ("write", "fsync", "ftruncate", "truncate", "replace", "unlink", "utime", "open")


def at_call(number: int, act: Callable[[str, tuple], object]) -> None:
    """Have `act` called instead of the call with that number of those that change files."""
    left = number

    def around(name: str, real: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                act(name, args)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, around(name, getattr(os, name)))


def forked(work: Callable[[], object]) -> int:
    if pid := os.fork():
        return pid
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def die(name: str, args: tuple) -> None:
    if name == "write":  # half of it arrives
        REAL_WRITE(args[0], bytes(args[1])[: len(args[1]) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


REAL_WRITE = os.write


def kill_anywhere(folder: Path, count: int) -> int:
    """Kill the worker at each of its calls in turn; each next one resumes in a copy of its own."""
    for number in range(10_000):
        here = folder / str(number)

        def work(here: Path = here, number: int = number) -> None:
            at_call(number, die)
            follow_all(here, count)

        _, status = os.waitpid(forked(work), 0)
        if not os.WIFSIGNALED(status):
            return number
        os.waitpid(forked(lambda here=here: follow_all(here, count)), 0)
    raise AssertionError("it does not end")


def kill_sometime(folder: Path, count: int, kills: int) -> int:
    """Kill the worker of one store at random moments; returns how many kills found it at work."""
    moments = random.Random(0)
    rows = folder / "rows.jsonl"
    at_work = 0
    for _ in range(kills):
        before = rows.stat().st_size if rows.exists() else 0
        pid = forked(lambda: follow_all(folder, count))
        while not (rows.exists() and rows.stat().st_size > before):
            if os.waitpid(pid, os.WNOHANG)[0]:  # nothing was left to do
                return at_work
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        at_work += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    os.waitpid(forked(lambda: follow_all(folder, count)), 0)
    return at_work


def compete(folder: Path, count: int, workers: int) -> int:
    """Let workers claim the same runs, each in an order of its own."""

    def work(seed: int) -> None:
        os.fsync = lambda fd: None  # what a power cut does is not tested here
        store, every = Store(folder), ids(count)
        random.Random(seed).shuffle(every)
        for run_id in every:
            if not store.rounds_done(run_id):
                follow(store, [run_id], rounds=1)

    pids = [forked(lambda seed=seed: work(seed)) for seed in range(workers)]
    return sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)


if __name__ == "__main__":
    name, folder, *numbers = sys.argv[1:]
    print(globals()[name](Path(folder), *map(int, numbers)))
