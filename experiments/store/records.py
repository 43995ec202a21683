"""What a run leaves in the store: rows of its results, and records of how they were made."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from experiments.store.provenance import digest, provenance
from experiments.study import studies
from experiments.study.runs import Run
from experiments.train.data import Dataset
from experiments.train.loop import Evaluation
from experiments.train.lottery import Round

Say = Callable[[str], None]


def base_row(run: Run) -> dict[str, Any]:
    """What every row of a run says, and null for what it may say."""
    unknown = dict.fromkeys(
        (
            "final_test_accuracy", "early_stop_iteration", "early_stop_validation_loss",
            "early_stop_validation_accuracy", "final_validation_loss", "final_train_accuracy",
        )
    )  # fmt: skip
    return {"study": studies.home(run), "run_id": run.id, **run.named, **unknown}


def row_of(run: Run, this: Round) -> dict[str, Any]:
    """The row of a round; that of the dense one says which run it starts."""
    apart = ("criterion", "mask1", "mask0", "seed", "engine")
    return base_row(run) | {key: value for key, value in this.row.items() if key not in apart}


def curve_of(run: Run, number: int, found: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """What the validation part said of a row, for a rule that chooses by it to be judged later.

    Of a training over its iterations, of masks on an untrained network over rounds (`of`): the
    first, the last and those between, evenly apart. Losses have six digits; `correct` counts
    images. None where the evaluations are not known: of a round that was not made here.
    """
    if not found:
        return []
    at = [one.iteration for one in found]
    return [
        {
            "run_id": run.id,
            "round": number,
            "of": "iterations" if run.trained else "rounds",
            "first": at[0],
            "every": at[1] - at[0] if len(at) > 1 else 0,
            "last": at[-1],
            "loss": [float(f"{one.validation_loss:.6g}") for one in found],
            "accuracy": [float(f"{one.validation_accuracy:.6g}") for one in found],
        }
    ]


def record(
    run: Run,
    number: int,
    began: float,
    group: Sequence[Run],
    seconds: float,
    dataset: Dataset,
    engine: object = None,
) -> dict[str, Any]:
    """How rows were made: what is not a function of the run.

    `round` is the last one of them, `seconds` a network's share of the group's.
    """
    return {
        "run_id": run.id,
        "round": number,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": round(seconds / len(group), 3),
        "group": [member.id for member in group],
        "engine": engine,
        "threads": torch.get_num_threads(),
        "device": str(dataset.train.images.device),
        "data_sha256": digest(dataset),
        "outcome": "done",
        **provenance(),
    }


def attempt(run: Run, outcome: str, error: str = "") -> dict[str, Any]:
    """That a worker began a run, or why it did not end it; one that was killed says no more.

    Outcomes are "started", "failed", and "differs" where other numbers came out than are stored.
    """
    return {
        "run_id": run.id,
        "round": None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "outcome": outcome,
        **({"error": error} if error else {}),
        **provenance(),
    }


def line(run: Run, this: Round) -> str:
    row = this.row
    return (
        f"{run.id} round {this.number:2}: density {row['density']:7.2%}, test accuracy "
        f"{row['test_accuracy']:.2%} at iteration {row['early_stop_iteration']:,}"
    )
