"""Synthetic rows of studies, for tests of what shows them. Their numbers mean nothing."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from experiments.study.runs import DENSE, Run

WEIGHTS = ("init", "signed_constant")
UNTRAINED = {"schedule": "one_shot", "trained": False}
LEARNED = {"schedule": "learned", "trained": False, "criterion": DENSE}
LEARNED_NUMBERS = {
    "mask_bits": 266_200,
    "seed_bits": 64,
    "threshold_accuracy": 0.92,
    "sample_accuracies": [0.92, 0.94],
}


@dataclass(frozen=True)
class Arm:
    label: str
    changes: Mapping[str, Any]

    def runs(self, network: str, profile: str, seeds: Sequence[int]) -> list[Run]:
        return [Run(network=network, profile=profile, seed=s, **self.changes) for s in seeds]


@dataclass(frozen=True)
class Study:
    name: str
    changes: tuple[Mapping[str, Any], ...]
    question: str = "Why <this> & that?"
    networks: tuple[str, ...] = ("fc", "conv4")
    figure: str = "figure 0"

    def arms(self) -> list[Arm]:
        return [Arm(_label(changes), changes) for changes in self.changes]


def _label(changes: Mapping[str, Any]) -> str:
    return ", ".join(
        str(value) for name, value in changes.items() if name not in ("schedule", "trained")
    )


def each(name: str, *values: Any, **others: Any) -> tuple[dict[str, Any], ...]:
    return tuple({**others, name: value} for value in values)


CRITERIA = (
    "large_final", "magnitude_increase", "random", "large_final_same_sign", "small_final",
    "large_init", "small_init", "large_init_large_final", "small_init_small_final", "movement",
    "large_final_diff_sign",
)  # fmt: skip

STUDIES = {
    study.name: study
    for study in (
        Study("dense", ({"criterion": DENSE},)),
        Study("mask-criteria", each("criterion", *CRITERIA)),
        Study(
            "mask-1",
            each(
                "mask1", "rewind", "reinit", "reshuffle", "constant", "signed_reinit",
                "signed_reshuffle", "signed_constant",
            )
            + each("criterion", "random"),
        ),
        Study(
            "mask-0",
            each(
                "mask0", "zero", "freeze_init", "freeze_init_zero_mask", "freeze_init_zero_all",
                "freeze_init_zero_reshuffle", "freeze_init_zero_rev",
            ),
        ),
        Study(
            "supermasks",
            tuple(
                {**UNTRAINED, "criterion": criterion, "weights": weights}
                for criterion in CRITERIA
                for weights in WEIGHTS
            ),
        ),
        Study("same-sign", each("criterion", CRITERIA[0], CRITERIA[3], CRITERIA[-1])),
        Study(
            "learned",
            tuple(
                {**LEARNED, "weights": weights, "rescale": rescale}
                for weights in WEIGHTS
                for rescale in (False, True)
            ),
        ),
        Study("first-bars", each("criterion", "random", "large_final", **UNTRAINED)),
        Study("early-stop", each("criterion", "large_final", "random") + each("mask1", "reinit")),
        Study("early-masks", each("final_at", 100, 5_000, None, **UNTRAINED)),
        Study("late-rewinding", each("rewind_to", 0, 100, 1_000)),
        Study(
            "rescaling",
            each(
                "mask1", "rewind", "reinit", "reinit_rescaling", "signed_reinit",
                "signed_reinit_rescaling", "constant", "constant_rescaling", "signed_constant",
                "signed_constant_rescaling",
            ),
        ),
        Study("learned-sensitivity", each("init_score", -2.0, 0.0, 2.0, **LEARNED)),
        Study("learned-trained", each("trained", False, True, **LEARNED)),
        Study("permutation", each("permuted", "none", "pixels", "classes", **LEARNED)),
    )
}  # fmt: skip


def rows(
    studies: Iterable[Study] = tuple(STUDIES.values()),
    network: str = "fc",
    profile: str = "paper",
    seeds: int = 3,
    rounds: int = 20,
) -> list[dict[str, Any]]:
    """Rows of all runs of the studies and of the dense runs that they start from."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for study in studies:
        for arm in study.arms():
            for run in arm.runs(network, profile, range(seeds)):
                for row in [*of_run(run.dense, 0), *of_run(run, rounds)]:
                    found[row["run_id"], row["round"]] = row
    return list(found.values())


def of_run(run: Run, rounds: int) -> list[dict[str, Any]]:
    draws = random.Random(run.id)
    if run.schedule == "learned":
        numbers = [1]
    elif run.criterion == DENSE:
        numbers = [0]
    else:
        numbers = list(range(rounds + 1))
    # what a round costs: one number for each kind of run
    fall = random.Random(f"{run.criterion} {run.mask1} {run.mask0}").choice([0.0005, 0.002, 0.01])
    out = []
    for number in numbers:
        density = 0.8**number
        if run.schedule == "learned":
            density = 1 / (1 + math.exp(-run.init_score))
            accuracy = 0.93
        elif run.trained:
            accuracy = 0.98 - fall * max(0, number - 8) - fall * (number > 0)
        else:
            accuracy = 0.1 + 0.6 * number * density if "same" in run.criterion else 0.12
        trained = run.trained and run.schedule != "learned"
        out.append(
            {field.name: getattr(run, field.name) for field in fields(run)}
            | {
                "study": "any",
                "run_id": run.id,
                "round": number,
                "density": density,
                "kept": round(266_200 * density),
                "test_accuracy": min(1.0, accuracy + draws.uniform(0, 0.002)),
                "early_stop_iteration": draws.randrange(4_000, 6_000) if trained else None,
                "products": ["sparse" if number >= 8 else "dense", "dense", "dense"],
            }
            | (LEARNED_NUMBERS if run.schedule == "learned" else {})
        )
    return out
