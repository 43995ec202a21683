"""Numbers that were published, and which curve of which figure each belongs to.

Claims are judged against them, figures show them as ticks. Sources: Zhou et al. 2019 and their
article for readers (MNIST 10%, 40%, 80%, 86%; CIFAR-10 24%, 41%; learned masks 95.3%, 65.4%),
Frankle & Carbin 2019 (early stopping, the ranges of sparsity).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNTRAINED: Mapping[str, Any] = {"schedule": "one_shot", "trained": False}
LEARNED: Mapping[str, Any] = {"schedule": "learned", "trained": False, "criterion": "none"}


@dataclass(frozen=True)
class Published:
    """A number of a figure: accuracy as a share, or how many times as fast.

    Attributes:
        fields: of the runs of its curve.
        within: how far from it a reproduction may lie.
        words: as the source says it.
    """

    network: str
    fields: Mapping[str, Any]
    value: float
    within: float
    words: str

    def of(self, row: Mapping[str, Any]) -> bool:
        return row["network"] == self.network and all(
            row[name] == value for name, value in self.fields.items()
        )


def _masks(network: str, criterion: str, weights: str, value: float, within: float, words: str):
    fields = {**UNTRAINED, "criterion": criterion, "weights": weights}
    return Published(network, fields, value, within, words)


# The article names the data set of its untrained masks, not the network: for CIFAR-10 all three
# convolutional networks are shown beside the number, and Conv4 is judged.
MASKS = (
    _masks("fc", "large_final", "init", 0.40, 0.10, "nearly 40%"),
    _masks("fc", "large_final_same_sign", "init", 0.80, 0.05, "80%"),
    _masks("conv4", "large_final_same_sign", "init", 0.24, 0.05, "24%"),
    _masks("fc", "large_final_same_sign", "signed_constant", 0.86, 0.05, "86%"),
    _masks("conv4", "large_final_same_sign", "signed_constant", 0.41, 0.05, "41%"),
)
LEARNED_MASKS = tuple(
    Published(
        network, {**LEARNED, "weights": "init", "rescale": False}, value, within, f"{value:.1%}"
    )
    for network, value, within in (("fc", 0.953, 0.02), ("conv4", 0.654, 0.03))
)
CHANCE = 0.10
