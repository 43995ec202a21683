"""What runs that are killed half-way go on from: rounds in flight, masks half learned."""

import time
from typing import Any

from torch import Tensor

from experiments.store.arithmetic import is_ours, marked
from experiments.store.records import Recorder, load
from experiments.study.runs import Run
from experiments.train import learned
from experiments.train.loop import Midway, State

EVERY = 600.0  # seconds from one state of a round in flight to the next


class InFlight(Midway):
    """The state of a round of a run while it is trained, kept every `EVERY` seconds.

    One of another arithmetic, or another round, is not gone on with: the round is trained anew.
    """

    def __init__(self, run: Run, number: int, out: Recorder):
        self.run_id, self.number, self.out = run.id, number, out
        self.saved = time.monotonic()

    def load(self) -> State | None:
        found = self.out.store.load(self.run_id, part=True)
        if found is None or found[1]["round"] != self.number:
            return None
        if not is_ours(found[1], self.out.device):
            return None
        done = found[1]["seen"][-1][0]
        self.out.say(f"{self.run_id} round {self.number:2}: goes on from iteration {done:,}")
        return found

    def is_due(self) -> bool:
        return time.monotonic() - self.saved >= EVERY

    def save(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        metadata = marked({**metadata, "round": self.number}, self.out.device)
        self.out.store.save(self.out.lease, self.run_id, tensors, metadata, part=True)
        self.saved = time.monotonic()

    def end(self) -> None:
        """Remove it: the round is stored."""
        self.out.store.discard(self.out.lease, self.run_id, part=True)


class Checkpoints(learned.Checkpoints):
    """Of learned masks, under a lease."""

    def __init__(self, out: Recorder):
        self.out, self.began = out, time.time()
        self.seconds: dict[str, float] = {}  # that a run took in processes before this one

    def load(self, run_id: str) -> State | None:
        self.began, found = time.time(), load(run_id, self.out.store, self.out.device)
        self.seconds[run_id] = found[1].get("seconds", 0.0) if found else 0.0
        return found

    def save(self, run_id: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        seconds = self.share(run_id, metadata["networks"])
        metadata = marked({**metadata, "seconds": seconds}, self.out.device)
        self.out.store.save(self.out.lease, run_id, tensors, metadata)

    def share(self, run_id: str, networks: int) -> float:
        """Seconds that a run took so far, where `networks` have shared them since it was loaded."""
        return self.seconds[run_id] + (time.time() - self.began) / networks
