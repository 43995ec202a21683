"""The paper's studies as data: what each asks, and which runs answer it.

An arm is a curve of a figure: what its runs change of the defaults of `Run`. Arms of different
studies may be the same runs, which are then made once.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from experiments.study import parts
from experiments.study.profiles import PROFILES
from experiments.study.runs import DENSE, LATER, Run, run_in

SEEDS = 5  # as in the paper
ROUNDS = 20  # where the paper's figures end; its scripts run 24
CONV = ("conv2", "conv4", "conv6")
ALL = ("fc", *CONV)

CRITERIA = (  # in the order in which they are run
    "large_final", "magnitude_increase", "random", "large_final_same_sign", "small_final",
    "large_init", "small_init", "large_init_large_final", "small_init_small_final", "movement",
    "large_final_diff_sign",
)  # fmt: skip
SIGNS = ("large_final", "large_final_same_sign", "large_final_diff_sign")
MASK1 = ("reinit", "reshuffle", "constant")
SIGNED_MASK1 = tuple(f"signed_{action}" for action in MASK1)
VARIANT_1, VARIANT_2 = "freeze_init_zero_mask", "freeze_init_zero_all"
CONTROLS = ("freeze_init_zero_reshuffle", "freeze_init_zero_rev")
WEIGHTS = ("init", "signed_constant")
SCORES = (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)  # of a learned mask, at the start
# Shares of the dense run's iterations: of FC 0, 101, 504, 1,008, 2,519, 5,038 and 25,190.
MOMENTS = (0.0, 0.002, 0.01, 0.02, 0.05, 0.1, 0.5)

UNTRAINED: dict[str, Any] = {"schedule": "one_shot", "trained": False}
LEARNED: dict[str, Any] = {"schedule": "learned", "trained": False, "criterion": DENSE}


@dataclass(frozen=True)
class Arm:
    """A curve: the fields of `Run` that differ from their defaults.

    An iteration (rewind_to, final_at) is given as a share of the dense run's.
    """

    changes: tuple[tuple[str, Any], ...]

    @property
    def label(self) -> str:
        """The values that set the arm apart: "large_final", "large_final, signed_constant"."""
        words = []
        for name, value in self.changes:
            common = (("trained", False), ("criterion", DENSE))
            if name in ("schedule", "data") or (name, value) in common:
                continue
            if value is None:
                words.append(f"{name} the end")
            elif isinstance(value, bool):
                words.append(name if value else f"no {name}")
            elif isinstance(value, str):
                words.append(value)
            else:
                words.append(f"{name} {value:g}")
        return ", ".join(words) or "learned"

    def run(self, network: str, profile: str, seed: int) -> Run:
        iterations = run_in(profile, network, seed).iterations
        changes = dict(self.changes)
        for name in ("rewind_to", "final_at"):
            if changes.get(name) is not None:
                changes[name] = round(changes[name] * iterations)
        return run_in(profile, network, seed, **changes)

    def runs(self, network: str, profile: str, seeds: Sequence[int]) -> list[Run]:
        return [self.run(network, profile, seed) for seed in seeds]


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
        axes: sets of arms: every combination of the values of one mapping is an arm.
        figure: the paper's number of it, or what the figure is made from.
    """

    name: str
    question: str
    axes: tuple[Mapping[str, Sequence[Any]], ...]
    networks: tuple[str, ...] = ALL
    rounds: int = ROUNDS
    seeds: int = SEEDS
    figure: str = ""

    def arms(self) -> list[Arm]:
        found = [
            Arm(tuple(zip(axes, values, strict=True)))
            for axes in self.axes
            for values in product(*axes.values())
        ]
        return list(dict.fromkeys(found))

    def runs(self, network: str, profile: str, seeds: Sequence[int]) -> list[Run]:
        """By arm, then by seed; each run once: in a short profile two arms may be the same runs."""
        found = [run for arm in self.arms() for run in arm.runs(network, profile, seeds)]
        return list(dict.fromkeys(found))


def _one(changes: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {name: (value,) for name, value in changes.items()}


STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        Study(
            "dense",
            "How good is the network before anything is pruned, and where do its weights go?",
            ({"criterion": (DENSE,)},),
            rounds=0,
            figure="lines of the dense network; figures 1, 2 and 6 with real weights",
        ),
        Study(
            "mask-criteria",
            "Which weights must a ticket keep?",
            ({"criterion": CRITERIA},),
            figure="figure 3, its supplement",
        ),
        Study(
            "mask-1",
            "What must the kept weights restart from: their values, or their signs?",
            ({"mask1": ("rewind", *MASK1, *SIGNED_MASK1)}, {"criterion": ("random",)}),
            figure="figure 4",
        ),
        Study(
            "mask-0",
            "What should the pruned weights hold: zero, or where they began?",
            ({"mask0": ("zero", "freeze_init", VARIANT_1, VARIANT_2)}, {"mask0": CONTROLS}),
            figure="figure 5, with both controls",
        ),
        Study(
            "supermasks",
            "How good is a network that was masked, but never trained?",
            ({**_one(UNTRAINED), "criterion": CRITERIA, "weights": WEIGHTS},),
            figure="figure 7",
        ),
        Study(
            "same-sign",
            "Do tickets need the weights whose sign changed?",
            ({"criterion": SIGNS},),
            figure="figure S5",
        ),
        Study(
            "learned",
            "How good is a network whose mask alone is learned?",
            ({**_one(LEARNED), "weights": WEIGHTS, "rescale": (False, True)},),
            rounds=1,
            figure="table 1",
        ),
        Study(
            "first-bars",
            "What does a mask do to a network that knows nothing?",
            ({**_one(UNTRAINED), "criterion": ("random", "large_final")},),
            figure="the first figure of the authors' article",
        ),
        Study(
            "early-stop",
            "Do tickets learn faster?",
            ({"criterion": ("large_final", "random")}, {"mask1": ("reinit",)}),
            figure="iteration of the lowest validation loss over density",
        ),
        Study(
            "early-masks",
            "How early in training is a good mask there?",
            (
                {
                    **_one(UNTRAINED),
                    "criterion": SIGNS[:2],
                    "weights": WEIGHTS,
                    "final_at": (*MOMENTS[1:], None),
                },
            ),
            figure="masks from early snapshots (in the authors' code only)",
        ),
        Study(
            "late-rewinding",
            "Is there a better moment to rewind to than the start?",
            ({"rewind_to": MOMENTS[:-1]},),
            seeds=3,
            figure="after Frankle et al. 2019",
        ),
        Study(
            "rescaling",
            "Do larger weights make up for missing ones?",
            (
                {
                    "mask1": (
                        "rewind", "reinit", "reinit_rescaling", "signed_reinit",
                        "signed_reinit_rescaling", "constant", "constant_rescaling",
                        "signed_constant", "signed_constant_rescaling",
                    )
                },
            ),
            seeds=3,
            figure="the *_rescaling actions (in the authors' code only)",
        ),
        Study(
            "choices",
            "What do our choices change against the authors' code?",
            (
                {"mask1": ("reinit", "reinit_permute")},
                {"mask1": ("reinit",), "compounding": (True,)},
            ),
            networks=("fc",),
            seeds=3,
            figure="two deviations, beside what they deviate from",
        ),
        Study(
            "learned-sensitivity",
            "What do the initial scores of a learned mask decide?",
            ({**_one(LEARNED), "init_score": SCORES},),
            rounds=1,
            seeds=2,
            figure="supplement",
        ),
        Study(
            "learned-trained",
            "Is a learned mask a good ticket?",
            ({**_one(LEARNED), "trained": (False, True)},),
            rounds=1,
            seeds=3,
            figure="in the authors' code only",
        ),
        Study(
            "permutation",
            "Can masks of one random network solve permuted tasks?",
            ({**_one(LEARNED), "permuted": ("none", "pixels", "classes")},),
            networks=("fc",),
            rounds=1,
            seeds=2,
            figure="the article's remark on transfer",
        ),
    )
}  # fmt: skip


def find(name: str) -> Study:
    """A study by name.

    Raises:
        ValueError: there is none.
    """
    if name not in STUDIES:
        raise ValueError(f"study must be one of {', '.join(STUDIES)}; got {name!r}.")
    return STUDIES[name]


def asked(name: str, options: argparse.Namespace) -> Study:
    """A study with what options choose.

    These are `criterion`, of all arms that have one; `dataset`, of all arms; and a `network` of
    somebody else, which every study has that trains weights.
    """
    study, networks = find(name), find(name).networks
    changes = {"data": (options.dataset,)} if options.dataset else {}
    for criterion in options.criterion:
        parts.criterion(criterion)
    axes = []
    for its in study.axes:
        scored = options.criterion and its.get("criterion") != (DENSE,)
        axes.append({**its, **({"criterion": options.criterion} if scored else {}), **changes})
    if parts.is_path(options.network) and study.axes[0].get("schedule") != ("learned",):
        networks = (*networks, options.network)
    return replace(study, axes=tuple(axes), networks=networks)


def chosen(options: argparse.Namespace) -> list[Study]:
    """The study that options name, or all, as `asked`."""
    return [asked(name, options) for name in ([options.study] if options.study else STUDIES)]


def wanted(study: Study, network: str, profile: str, seeds: int) -> list[Run]:
    """The runs of a study, for seeds 0 to `seeds` - 1.

    Raises:
        ValueError: the study is not one of that network.
    """
    if network not in study.networks:
        raise ValueError(
            f"network must be one of {', '.join(study.networks)} for {study.name}; got {network!r}."
        )
    return study.runs(network, profile, range(seeds))


@cache
def homes() -> dict[tuple[tuple[str, Any], ...], str]:
    found: dict[tuple[tuple[str, Any], ...], str] = {}
    for study in STUDIES.values():
        for arm in study.arms():
            found.setdefault(_key(arm.run("fc", "paper", 0)), study.name)
    return found


def home(run: Run) -> str:
    """The first study that has the run, whatever its network, profile and seed; "" if none has."""
    changes = {name: value for name, value in run.changed.items() if name not in LATER}
    if parts.is_path(run.criterion):  # as if it were the paper's first
        changes["criterion"] = CRITERIA[0]
    same = Run(**{**changes, "network": "fc", "profile": "paper"})  # for its iterations
    return homes().get(_key(same), "")


def _key(run: Run) -> tuple[tuple[str, Any], ...]:
    apart = ("network", "profile", "seed", "rewind_to", "final_at", *LATER)
    late = ("late", run.rewind_to > 0), ("early", run.final_at is not None)
    return (*((k, v) for k, v in run.changed.items() if k not in apart), *late)


def rounds_asked(study: Study, profile: str) -> int:
    """The study's, or as many as the profile has at most."""
    most = PROFILES[profile].rounds
    return study.rounds if most is None else min(most, study.rounds)


def seeds_asked(study: Study, profile: str) -> int:
    """The study's, or as many as the profile takes unless the user says more."""
    most = PROFILES[profile].seeds
    return study.seeds if most is None else min(most, study.seeds)


def snapshots(run: Run) -> list[int]:
    """The iterations of a dense run at which studies look, but for its first and last."""
    found = {round(moment * run.iterations) for moment in MOMENTS}
    return sorted(found - {0, run.iterations})
