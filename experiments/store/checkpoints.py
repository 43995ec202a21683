"""What runs go on from: checkpoints of a store, under a lease, of one arithmetic each."""

import time
from typing import Any

from torch import Tensor

from experiments.store.arithmetic import OtherArithmetic, here, is_ours, marked
from experiments.store.records import Say
from experiments.store.store import Lease, Store
from experiments.study.runs import Run
from experiments.train import learned
from experiments.train.data import Dataset
from experiments.train.loop import Midway, State

EVERY = 600.0  # seconds from one state of a round in flight to the next


def load(run_id: str, store: Store, device: str) -> State | None:
    """The checkpoint of a run, to go on from.

    Raises:
        OtherArithmetic: it was made by another one.
    """
    found = store.load(run_id)
    if found is not None and not is_ours(found[1], device):
        raise OtherArithmetic(
            f"the weights of {run_id} in {store.folder} were made by {found[1]['arithmetic']}, not "
            f"by {here(device)}, and a chain never mixes two: go on there, or make it anew as a "
            "whole with --remake."
        )
    return found


def device_of(dataset: Dataset) -> str:
    return str(dataset.train.images.device)


class InFlight(Midway):
    """The state of a round of a run while it is trained, kept every `EVERY` seconds.

    One of another arithmetic, or another round, is not gone on with: the round is trained anew.
    """

    def __init__(self, run: Run, number: int, store: Store, lease: Lease, device: str, say: Say):
        self.run_id, self.number, self.device, self.say = run.id, number, device, say
        self.store, self.lease = store, lease
        self.saved = time.monotonic()

    def load(self) -> State | None:
        found = self.store.load(self.run_id, part=True)
        if found is None or found[1]["round"] != self.number or not is_ours(found[1], self.device):
            return None
        done = found[1]["seen"][-1][0]
        self.say(f"{self.run_id} round {self.number:2}: goes on from iteration {done:,}")
        return found

    def is_due(self) -> bool:
        return time.monotonic() - self.saved >= EVERY

    def save(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        metadata = marked({**metadata, "round": self.number}, self.device)
        self.store.save(self.lease, self.run_id, tensors, metadata, part=True)
        self.saved = time.monotonic()

    def end(self) -> None:
        """Remove it: the round is stored."""
        self.store.discard(self.lease, self.run_id, part=True)


class Checkpoints(learned.Checkpoints):
    """Of learned masks, under a lease."""

    def __init__(self, store: Store, lease: Lease, device: str):
        self.store, self.lease, self.device, self.began = store, lease, device, time.time()
        self.seconds: dict[str, float] = {}  # that a run took in processes before this one

    def load(self, run_id: str) -> State | None:
        self.began, found = time.time(), load(run_id, self.store, self.device)
        self.seconds[run_id] = found[1].get("seconds", 0.0) if found else 0.0
        return found

    def save(self, run_id: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        seconds = self.share(run_id, metadata["networks"])
        metadata = marked({**metadata, "seconds": seconds}, self.device)
        self.store.save(self.lease, run_id, tensors, metadata)

    def share(self, run_id: str, networks: int) -> float:
        """Seconds that a run took so far, where `networks` have shared them since it was loaded."""
        return self.seconds[run_id] + (time.time() - self.began) / networks
