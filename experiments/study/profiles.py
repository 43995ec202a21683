"""How much of the paper's protocol is run: profiles, each with its deviations in words."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from experiments.study.networks import Network


@dataclass(frozen=True)
class Profile:
    """How much of the paper's protocol is run.

    Attributes:
        share: of the network's iterations, of a round and of a learned mask alike.
        evaluate_every: iterations between two looks at the validation part.
        rounds: at most so many of a study's; None: all.
        seeds: at most so many of a study's, where the user gives no number; None: all.
        stride: a chain trains every so many rounds, and each training prunes the shares of all.
        patience: the share of its iterations after which a training stops that has not lowered
            the validation loss; None: none does. The dense network takes all iterations.
        convolutions: literals of the runs of convolutional networks, learned masks apart.
        mini: whether MNIST is the subset that ships here.
        train_accuracy: whether the training part is evaluated at the end of a round.
        deviations: from the protocol, in words; they stand in every figure's title.
    """

    name: str
    share: float = 1.0
    evaluate_every: int = 100
    rounds: int | None = None
    seeds: int | None = None
    stride: int = 1
    patience: float | None = None
    convolutions: tuple[tuple[str, str], ...] = ()
    mini: bool = False
    train_accuracy: bool = True
    deviations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.evaluate_every < 1 or self.stride < 1 or self.patience == 0:
            raise ValueError(
                "evaluate_every and stride must be at least 1 and patience above 0 (or None); got "
                f"{self.evaluate_every}, {self.stride} and {self.patience}."
            )

    def iterations(self, of: int) -> int:
        return max(1, math.ceil(self.share * of))

    def literals(self, network: Network, schedule: str) -> dict[str, str]:
        """Those of `LITERALS` that the profile asks for where they are not the defaults."""
        masked = schedule != "learned" and network.has_convolutions
        return dict(self.convolutions) if masked else {}

    def dataset(self, name: str) -> str:
        return "mnist-mini" if self.mini and name == "mnist" else name


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("paper"),
        Profile(
            "coarse",
            seeds=3,
            stride=4,
            patience=0.1,
            convolutions=(
                ("precision", "bfloat16"),
                ("layout", "channels_last"),
                ("form", "masked"),
            ),
            deviations=(
                "tickets of rounds 4, 8, 12, 16 and 20 only, each pruned by four rounds at once",
                "a ticket's training ends after a tenth of its iterations without a lower "
                "validation loss",
                "conv nets in bfloat16",
                "three seeds where no more are named",
            ),
        ),
        Profile(
            "patience",
            patience=0.1,
            deviations=(
                "a ticket's training ends after a tenth of its iterations without a lower "
                "validation loss",
            ),
        ),
        Profile("short", share=0.1, deviations=("a tenth of the iterations",)),
        Profile(
            "smoke",
            share=0.001,
            evaluate_every=20,
            rounds=3,
            mini=True,
            deviations=("a thousandth of the iterations", "three rounds", "a subset of MNIST"),
        ),
    )
}


def profile_of(name: str) -> Profile:
    """A profile by name.

    Raises:
        ValueError: there is none.
    """
    check("profile", name, PROFILES)
    return PROFILES[name]


def check(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raise ValueError unless a value is one of those known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}.")
