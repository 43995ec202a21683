"""A run of a study as data: what decides its numbers, and the id made of that.

A run is a curve of one figure with one seed: a chain of rounds, masks on an untrained network over
density, or one learned mask. Its rows are a function of the run and of what torch computes in it
(dense products, losses), whose bits belong to torch's libraries and the processor: not of the study
that asked for it, of what it was grouped with, or of restarts.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

import lottery_sparse as ls
from experiments.study import parts
from experiments.study.networks import Network, find
from experiments.study.profiles import PROFILES, Profile, check, profile_of

SCHEMA = 1  # of the rules that make numbers of a run; with another one all ids are others

DENSE = "none"  # the criterion of what has no criterion: the dense network, a learned mask

# Most kept weights, as a share, of products over kept weights; above it the product is dense.
Limits = tuple[tuple[str, float], ...]
LIMITS: Limits = (
    ("linear", 0.45),  # y and dx of a linear layer through modules
    ("linear_quick", 0.52),  # the same, at sizes where those products are quicker
    ("linear_values", 0.45),  # the gradient of its weights
    ("conv", 0.4),
    ("step", 0.45),  # y and dx in `ls.train_step`
    ("step_values", 0.45),
)
# What products a run is made of, and in which order they are summed: literals of its config, which
# no host and no cache decides. `arithmetic.check` refuses a run where they are not to be had.
LITERALS: dict[str, tuple[Any, ...]] = {  # field -> the values there are
    "numerics": (1, -1, 0),  # of `lottery_sparse.ops.dispatch.numerics`
    "precision": ("float32", "bfloat16"),
    "layout": ("contiguous", "channels_last"),
    "form": ("compact", "masked"),
    "limits": (LIMITS,),
}

LATER = (*LITERALS, "remake", "data")  # fields that a dense run shares, and few rows say

Schedule = Literal["iterative", "one_shot", "learned"]
Weights = Literal["init", "signed_constant"]
Permuted = Literal["none", "pixels", "classes"]


_TICKETS, _MASKS = ("mask1", "mask0", "rewind_to", "compounding"), ("rescale", "init_score")

# kind of a run -> what it does not read, and so must leave at its default
NOT_READ: dict[str, tuple[str, ...]] = {
    "iterative": ("weights", "permuted", *_MASKS),
    "dense": ("final_at", "weights", "permuted", *_MASKS, *_TICKETS),
    "one_shot": ("permuted", *_MASKS, *_TICKETS),
    "learned": ("final_at", *_TICKETS),
}
READ_BY = {
    **dict.fromkeys(_TICKETS, "only tickets, of rounds with a criterion, have it"),
    **dict.fromkeys((*_MASKS, "permuted"), "only learned masks have it"),
    "final_at": "only masks that a criterion scores have it",
    "weights": "what is trained starts from its initial weights",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One curve with one seed. The defaults are a lottery ticket as in the paper.

    Attributes:
        network, profile: names of NETWORKS, or "module:attr", and of PROFILES; a run that is not
            for a store may have a `Network` and a `Profile` of its own.
        schedule: "iterative": train, prune, train again, round by round. "one_shot": the dense
            network is pruned at once to what each number of rounds leaves. "learned": a mask is
            learned by gradient descent on scores.
        criterion: one of ls.pruning.CRITERIA, or "module:attr", see `parts`; "none": the dense
            network, or a learned mask.
        mask1: what kept weights restart from, of ls.pruning.MASK1_ACTIONS.
        mask0: what pruned weights hold, of ls.pruning.MASK0_ACTIONS.
        weights: what a network that is not trained computes with, "init" or "signed_constant".
        trained: whether the weights are trained under the mask.
        rewind_to: iteration of the dense run whose weights a ticket starts from.
        final_at: iteration of the dense run whose weights count as final; None: its last.
        compounding: mask-1 actions start from the last round's start, as in the authors' code.
        rescale: learned masks: weights are divided by the share of them that a sample keeps.
        init_score: learned masks: the score of every weight at the start.
        permuted: what of the data a fixed permutation permutes: "none", "pixels" or "classes".
        numerics: the order in which the CPU kernels sum, see `lottery_sparse.ops.dispatch`; 0 is
            torch's own sums, where the kernels are not built.
        precision: "float32", or "bfloat16": products under autocast; parameters, optimizer and
            loss are float32.
        layout: how maps lie: "contiguous", or "channels_last", where the columns of the first
            linear layer behind convolutions are in that order too.
        form: of layers with a mask: "compact" holds kept weights alone; "masked" is dense, with
            pruned weights that rest.
        limits: densities above which products are dense.
        remake: how often the chain was made anew before, as a whole; it changes no number.
        data: the data set; "": the network's.
    """

    network: str | Network
    profile: str | Profile
    seed: int
    schedule: Schedule = "iterative"
    criterion: str = "large_final"
    mask1: str = "rewind"
    mask0: str = "zero"
    weights: Weights = "init"
    trained: bool = True
    rewind_to: int = 0
    final_at: int | None = None
    compounding: bool = False
    rescale: bool = False
    init_score: float = 0.0
    permuted: Permuted = "none"
    numerics: int = 1
    precision: str = "float32"
    layout: str = "contiguous"
    form: str = "compact"
    limits: Limits = LIMITS
    remake: int = 0
    data: str = ""

    def __post_init__(self) -> None:
        check("schedule", self.schedule, get_args(Schedule))
        if not parts.is_path(self.criterion):
            check("criterion", self.criterion, (*ls.pruning.CRITERIA, DENSE))
        check("mask1", self.mask1, ls.pruning.MASK1_ACTIONS)
        check("mask0", self.mask0, ls.pruning.MASK0_ACTIONS)
        check("weights", self.weights, get_args(Weights))
        check("permuted", self.permuted, get_args(Permuted))
        for name, values in LITERALS.items():
            check(name, getattr(self, name), values)
        if self.remake < 0:
            raise ValueError(f"remake must be 0 (made once) or more, got {self.remake}.")
        if self.schedule == "learned" and self.criterion != DENSE:
            raise ValueError(f"a learned mask has no criterion, got {self.criterion!r}.")
        if self.schedule == "one_shot" and self.trained:
            raise ValueError("one-shot masks are for networks that are not trained: trained=False.")
        if self.schedule == "iterative" and not self.trained:
            raise ValueError("rounds train: a network that is not trained has schedule one_shot.")
        kind = "dense" if self.criterion == DENSE and self.trained else ""
        kind = "learned" if self.schedule == "learned" else kind or self.schedule
        for name in NOT_READ[kind]:  # an id must not say what its rows do not depend on
            if getattr(self, name) != (default := DEFAULTS[name]):
                raise ValueError(
                    f"{name} must be {default!r}, got {getattr(self, name)!r}: {READ_BY[name]}."
                )
        if parts.is_path(self.network):  # what it names is asked when it is computed with
            return
        self._check_arithmetic()
        for name in ("rewind_to", "final_at"):
            at = getattr(self, name)
            if at is not None and not 0 <= at <= self.iterations:
                raise ValueError(
                    f"{name} must be an iteration of the dense run, 0 to {self.iterations}; "
                    f"got {at}."
                )

    def _check_arithmetic(self) -> None:
        """Refuse what the engine does not compute."""
        if self.net.is_plain:
            return
        told = (
            f"float32, contiguous and compact; got {self.precision}, {self.layout} and {self.form}."
        )
        if self.schedule == "learned":
            raise ValueError(f"learned masks are computed in {told}")
        if not self.net.has_convolutions:
            raise ValueError(f"{self.net.name} has no convolutions, and is computed in {told}")
        if self.precision == "bfloat16" and self.form == "compact":
            raise ValueError(
                "bfloat16 products of studies are the dense library's, so form must be 'masked'; "
                "got 'compact'."
            )

    @property
    def net(self) -> Network:
        """The network with the iterations of the profile, as the run computes it."""
        network, share = _of(self.network, find), self.protocol.iterations
        return replace(
            network,
            iterations=share(network.iterations),
            score_iterations=share(network.score_iterations),
            precision=self.precision,
            layout=self.layout,
            form=self.form,
        )

    @property
    def protocol(self) -> Profile:
        return _of(self.profile, profile_of)

    @property
    def is_ticket(self) -> bool:
        return self.schedule == "iterative" and self.criterion != DENSE

    @property
    def patience(self) -> int | None:
        """Iterations without a lower validation loss after which a round's training stops."""
        share = self.protocol.patience if self.is_ticket else None
        return None if share is None else math.ceil(share * self.iterations)

    @property
    def stride(self) -> int:
        """The rounds whose shares each training of a chain prunes."""
        return self.protocol.stride if self.is_ticket else 1

    @property
    def iterations(self) -> int:
        return self.net.iterations

    @property
    def dataset(self) -> str:
        return self.data or self.protocol.dataset(self.net.dataset)

    @property
    def changed(self) -> dict[str, Any]:
        """What differs from the defaults; network, profile and seed do always."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    @cached_property
    def id(self) -> str:
        """Readable, and unique for what decides the numbers: fc-one_shot-movement-s0-paper-1f0c55…

        The hash is one of what differs from the defaults (so that a new field leaves old ids
        alone) and of the numbers of the protocol.
        """
        network = self.net
        numbers: dict[str, Any] = {
            "schema": SCHEMA,
            "dataset": self.dataset,
            "evaluate_every": self.protocol.evaluate_every,
            "iterations": network.iterations,
            "lr": network.lr,
            "batch_size": network.batch_size,
            "keep": {kind: str(share) for kind, share in network.keep.items()},
        }
        if self.patience is not None:
            numbers["patience"] = self.patience
        if self.stride > 1:
            numbers["stride"] = self.stride
        if self.schedule == "learned":
            numbers |= {
                "score_lr": network.score_lr,
                "score_iterations": network.score_iterations,
                "score_batch_size": network.score_batch_size,
            }
        if paths := [p for p in (network.name, self.criterion, self.dataset) if parts.is_path(p)]:
            numbers["files"] = {path: parts.digest(path) for path in paths}
        text = json.dumps(self.changed | numbers, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        words = [network.name, *self._words(), f"s{self.seed}", self.protocol.name, digest]
        return "-".join(words).replace(":", ".")

    def _words(self) -> Iterable[str]:
        if self.schedule != "iterative":
            yield self.schedule
        if self.criterion != DENSE or self.schedule == "iterative":
            yield "dense" if self.criterion == DENSE else self.criterion
        changed = self.changed
        for name in ("mask1", "mask0", "weights", "permuted", "data"):
            if name in changed:
                yield str(changed[name])
        for name in (
            "rewind_to",
            "final_at",
            "init_score",
            "compounding",
            "rescale",
            "numerics",
            "remake",
        ):
            if name in changed:
                value = changed[name]
                yield name if isinstance(value, bool) else f"{name}_{value:g}"
        if self.schedule == "learned" and self.trained:
            yield "trained"

    @property
    def dense(self) -> "Run":
        """The dense run that this one starts from: round 0, of the same arithmetic and remake."""
        return Run(
            network=self.network,
            profile=self.profile,
            seed=self.seed,
            criterion=DENSE,
            **{name: getattr(self, name) for name in LATER},
        )

    @property
    def named(self) -> dict[str, Any]:
        """The fields that a row says; of `LATER` ones, what differs from the defaults.

        Rows were committed before runs had these fields, and stay as they are.
        """
        silent = {name for name in LATER if name not in self.changed}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in silent}


DEFAULTS = {field.name: field.default for field in fields(Run)}


def run_in(profile: str, network: str, seed: int, **changes: Any) -> Run:
    """The run as a profile computes it."""
    schedule = changes.get("schedule", DEFAULTS["schedule"])
    literals = PROFILES[profile].literals(find(network), schedule)
    return Run(network=network, profile=profile, seed=seed, **{**literals, **changes})


def run_of(row: Mapping[str, Any]) -> Run:
    """The run of a row: `Run.named` and back. Of `limits` JSON makes lists."""
    found = {name: row[name] for name in DEFAULTS if name in row}
    if "limits" in found:
        found["limits"] = tuple(map(tuple, found["limits"]))
    return Run(**found)


def rounds_of(run: Run, rounds: int) -> set[int]:
    """The rounds that a run has rows of when it is done."""
    if run.schedule == "learned":
        return {1}
    return {0} if run.criterion == DENSE else set(range(0, rounds + 1, run.stride))


def _of(chosen: Any, named: Callable[[str], Any]) -> Any:
    """The network or profile of a run, which gives itself or a name."""
    return named(chosen) if isinstance(chosen, str) else chosen
