"""What a network costs in bits: its mask, and a seed or the weights that it keeps.

A mask of n weights, k of them kept, costs n H(k / n) bits, H the entropy of one weight: what an
arithmetic coder needs with one density for all layers, one per layer would save a little. Initial
weights and signed constants are made from a seed of 64 bits; trained weights cost 32 bits each.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from experiments.study.networks import find, skeleton

SEED, FLOAT = 64, 32


def mask_bits(kept: int, total: int) -> int:
    """n H(k / n), rounded up; 0 where all or none are kept."""
    if kept in (0, total):
        return 0
    share = kept / total
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    return math.ceil(total * entropy)


@cache
def sizes(network: str) -> tuple[int, int]:
    """Weights that can be pruned, and biases."""
    shapes = [p.shape for p in skeleton(find(network)).parameters()]
    weights = sum(shape.numel() for shape in shapes if len(shape) > 1)
    return weights, sum(shape.numel() for shape in shapes) - weights


def dense_bits(network: str) -> int:
    """All weights and biases as float32."""
    return FLOAT * sum(sizes(network))


def bits(row: Mapping[str, Any]) -> int:
    """Of the network of a row. Networks that were not trained have no biases but zeros."""
    weights, biases = sizes(row["network"])
    mask = mask_bits(row["kept"], weights)
    return mask + (FLOAT * (row["kept"] + biases) if row["trained"] else SEED)


def share(row: Mapping[str, Any]) -> float:
    """Bits over those of the dense network."""
    return bits(row) / dense_bits(row["network"])
