"""The layers we measure: those of the paper's networks, and two square ones."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    in_features: int
    out_features: int


LAYERS = {
    "lenet fc1": Layer(784, 300),
    "lenet fc2": Layer(300, 100),
    "lenet output": Layer(100, 10),
    "conv2 fc1": Layer(16384, 256),
    "conv6 fc1": Layer(4096, 256),
    "conv fc2": Layer(256, 256),
    "1024 x 1024": Layer(1024, 1024),
    "4096 x 4096": Layer(4096, 4096),
}
# enough for --quick: one small, one large
QUICK_LAYERS = ("lenet fc1", "1024 x 1024")

BATCHES = (60, 256)  # the paper's, and one of several tiles
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
QUICK_DENSITIES = (0.2, 0.05)

SELECTION_SIZE = 1 << 26  # 67,108,864 scores
QUICK_SELECTION_SIZE = 1 << 22
