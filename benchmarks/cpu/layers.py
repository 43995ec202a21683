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
# compact layers: the shapes and batches of perf-anchors, and the paper's layers at its batch
COMPACT_LAYERS = tuple(
    (layer, batch) for layer in ("lenet fc1", "1024 x 1024", "4096 x 4096") for batch in (64, 256)
) + tuple(
    (layer, 60)
    for layer in ("lenet fc1", "lenet fc2", "lenet output", "conv2 fc1", "conv6 fc1", "conv fc2")
)
BFLOAT16_COMPACT_LAYERS = (("1024 x 1024", 256), ("4096 x 4096", 256))
BFLOAT16_DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)
QUICK_COMPACT_LAYERS = (("lenet fc1", 60), ("1024 x 1024", 64))
# enough for --quick: one small, one large
QUICK_LAYERS = ("lenet fc1", "1024 x 1024")

BATCHES = (60, 256)  # the paper's, and one of several tiles
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
QUICK_DENSITIES = (0.2, 0.05)

SELECTION_SIZE = 1 << 26  # 67,108,864 scores
QUICK_SELECTION_SIZE = 1 << 22


class Conv(NamedTuple):
    in_channels: int
    out_channels: int
    size: int  # height and width of input and output
    batch: int


# 3 x 3, padding 1: those of perf-anchors, and three of the paper's Conv-6 at its batch
CONVS = {
    "64 ch, 32 x 32": Conv(64, 64, 32, 64),
    "128 ch, 16 x 16": Conv(128, 128, 16, 64),
    "256 ch, 8 x 8": Conv(256, 256, 8, 32),
    "conv6 1": Conv(3, 64, 32, 60),
    "conv6 3": Conv(64, 128, 16, 60),
    "conv6 6": Conv(256, 256, 8, 60),
}
QUICK_CONVS = ("256 ch, 8 x 8",)
CONV_DENSITIES = (0.2, 0.1, 0.05, 0.01)

PACKED_LAYERS = {
    "4096 x 4096": Layer(4096, 4096),
    "11008 x 4096": Layer(4096, 11008),
}
PACKED_BATCHES = (1, 4, 16, 32, 64)
QUICK_PACKED_BATCHES = (1, 16)

LENET_NETWORKS = 45  # nine criteria, five seeds
LENET_DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)
QUICK_LENET_DENSITIES = (0.5, 0.05)
