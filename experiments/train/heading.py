"""Were pruned weights on their way to zero? Counts beside a round's row, and shares of them.

The article's reason why zero is the value to freeze pruned weights at: criteria prune weights that
training was already moving towards zero. The counts lie in the store's curves, whose entry of a
training or of masks they belong to.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

Counts = dict[str, list[int]]  # layer -> pruned, of these towards zero, kept, of these


def towards_zero(
    w_start: Mapping[str, Tensor],
    w_final: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> Counts:
    """Of the weights that a round prunes and of those it keeps, how many moved towards zero.

    Towards zero: |w_final| < |w_start|, as mask-0 actions say it. Weights that `before` had pruned
    do not count.

    Args:
        before, after: the masks that the round begins with, and those that it makes.
    """
    found: Counts = {}
    for name, mask in after.items():
        shrank = w_final[name].abs() < w_start[name].abs()
        pruned, kept = before[name] & ~mask, before[name] & mask
        sides = (pruned, pruned & shrank, kept, kept & shrank)
        found[name] = [int(side.sum()) for side in sides]
    return found


def share(counts: Mapping[str, Sequence[int]], of: str, layer: str | None = None) -> float | None:
    """The share that moved towards zero "of" the "pruned" or the "kept"; None where there are none.

    layer: None: of all layers together.
    """
    at = {"pruned": 0, "kept": 2}[of]
    chosen = list(counts.values()) if layer is None else [counts[layer]]
    every = sum(numbers[at] for numbers in chosen)
    return sum(numbers[at + 1] for numbers in chosen) / every if every else None
