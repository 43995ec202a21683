"""What runs leave in a store: rows of their results, and records of how they were made.

The `Recorder` of a group writes all of it; `attempt` says that a worker began, or failed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.store.arithmetic import OtherArithmetic, here, is_ours, marked
from experiments.store.provenance import digest, provenance
from experiments.store.store import Lease, Store
from experiments.study import studies
from experiments.study.runs import Run
from experiments.train.data import Dataset
from experiments.train.loop import NUMBERS, Evaluation, State

Say = Callable[[str], None]
Facts = Mapping[str, Any]  # what a row says beside its run


@dataclass(frozen=True)
class Made:
    """Rows of a run that were made at once.

    Attributes:
        facts: of each row, `round` among them, and how a step was computed (`engine`).
        evaluations: of a training over its iterations, of masks on an untrained network over
            rounds; empty where they are not known.
        heading: beside the curve of these, see `heading`; None: no curve has it.
    """

    run: Run
    facts: Sequence[Facts]
    evaluations: Sequence[Evaluation] = ()
    heading: Any = None

    def rows(self) -> list[dict[str, Any]]:
        run = self.run
        said = {"study": studies.home(run), "run_id": run.id, **run.named}
        rows = [{**dict.fromkeys(NUMBERS), **facts, **said} for facts in self.facts]
        return [{name: row[name] for name in row if name != "engine"} for row in rows]

    def curves(self) -> list[dict[str, Any]]:
        """What the validation part said of a row, so that a rule can be judged later.

        The first evaluation, the last and those between, evenly apart (`of` says in what). Losses
        and accuracies have six digits.
        """
        found = self.evaluations
        if not found:
            return []
        at = [one.iteration for one in found]
        curve = {
            "run_id": self.run.id,
            "round": self.facts[-1]["round"],
            "of": "iterations" if self.run.trained else "rounds",
            "first": at[0],
            "every": at[1] - at[0] if len(at) > 1 else 0,
            "last": at[-1],
            "loss": [float(f"{one.validation_loss:.6g}") for one in found],
            "accuracy": [float(f"{one.validation_accuracy:.6g}") for one in found],
        }
        return [curve if self.heading is None else curve | {"heading": self.heading}]


class Recorder:
    """Writes what a group of runs leaves, and reads what it goes on from, under one lease."""

    def __init__(self, store: Store, lease: Lease, dataset: Dataset, say: Say):
        self.store, self.lease, self.dataset, self.say = store, lease, dataset, say
        self.device = str(dataset.device)

    def add(
        self, made: Sequence[Made], began: float, seconds: float, group: Sequence[Run] = ()
    ) -> None:
        """Rows, their curves, and how they came about.

        Args:
            seconds: of the group, the runs that were trained together; () for those of `made`.
        """
        group = group or [one.run for one in made]
        records = [
            {
                "run_id": one.run.id,
                "round": one.facts[-1]["round"],
                "started": _utc(began),
                "seconds": round(seconds / len(group), 3),
                "group": [member.id for member in group],
                "engine": one.facts[-1].get("engine"),
                "threads": torch.get_num_threads(),
                "device": self.device,
                "data_sha256": digest(self.dataset),
                "outcome": "done",
                **provenance(),
            }
            for one in made
        ]
        rows = [row for one in made for row in one.rows()]
        self.store.add(self.lease, rows, records, [c for one in made for c in one.curves()])

    def copy(self, made: Made) -> None:
        """The row of another run, which was recorded there."""
        self.store.add(self.lease, made.rows(), [])

    def save(self, run: Run, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """The checkpoint of a run."""
        self.store.save(self.lease, run.id, tensors, marked(metadata, self.device))

    def load(self, run: Run) -> State | None:
        return load(run.id, self.store, self.device)


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


def attempt(run: Run, outcome: str, error: str = "") -> dict[str, Any]:
    """That a worker began a run, or why it did not end it; one that was killed says no more.

    Outcomes are "started", "failed", and "differs" where other numbers came out than are stored.
    """
    return {
        "run_id": run.id,
        "round": None,
        "started": _utc(time.time()),
        "outcome": outcome,
        **({"error": error} if error else {}),
        **provenance(),
    }


def _utc(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
