"""Work for engines that says when it was begun and ended, and fails as its run's name tells.

As a program, `python engine_problems.py ENGINE FOLDER [SCHEDULER]`, it sweeps runs of a store that
take a while, two in a group. It imports no torch by itself, so that processes start quickly.
"""

import os
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from experiments.sweep.engines import sweep


@dataclass(frozen=True)
class Named:
    """As much of a run as an engine sees."""

    id: str


@dataclass(frozen=True)
class Work:
    folder: Path
    seconds: float = 0.0

    def __call__(self, group, device: str) -> None:
        name = group[0].id
        self.say("begin", name, device)
        if name.startswith("odd"):
            warnings.warn("a line is damaged", stacklevel=1)
        if name.startswith("bad"):
            raise ValueError("the data are bad")
        if name.startswith("mute"):
            os._exit(7)
        if name.startswith("killed") or (name.startswith("once") and self.count(name) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        self.say("end", name, device)

    def say(self, *words: str) -> None:
        fd = os.open(self.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, (" ".join([*words, f"{os.getpid()}"]) + "\n").encode())
        os.close(fd)

    def said(self) -> list[list[str]]:
        path = self.folder / "said"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def count(self, name: str, word: str = "begin") -> int:
        return sum(line[:2] == [word, name] for line in self.said())


@dataclass(frozen=True)
class Slowly:
    """Writes rows to a store."""

    folder: Path

    def __call__(self, group, device: str) -> None:
        import sweep_problems

        from experiments.store.store import Store

        class Slow(Store):
            def add(self, lease, rows, records):
                time.sleep(0.1)
                super().add(lease, rows, records)

        sweep_problems.follow(Slow(self.folder), [run.id for run in group])


def groups(count: int):
    from sweep_problems import ids

    every = ids(count)
    return [tuple(map(Named, every[at : at + 2])) for at in range(0, count, 2)]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    engine, folder, *scheduler = sys.argv[1:]
    try:
        failed = sweep(
            groups(12),
            Slowly(Path(folder)),
            engine=engine,
            workers=2,
            scheduler=scheduler[0] if scheduler else None,
        )
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(failed)
