"""How far a result may be from the exact one: from the length of its sum and its dtype alone.

Each operation rounds its result by a factor of at most 1 ± u, where u is half the epsilon of the
dtype. After n of them a result is off by at most n u, relative to the largest numbers on the way,
and by 6 √n u where the roundings are as good as independent, up to a chance as small as that of six
standard deviations (Higham & Mary 2019, A New Approach to Probabilistic Rounding Error Analysis).
Both hold for any order of a sum, with and without fused multiply-adds. So no number here was found
by trying on a machine, and a wrong kernel is off by more: one product of n is 1/n of their sum.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Roundings of an entry of a result, for `close`. Of small models in float32 or float64: products
# through all layers, forward and backward. In less: a stored number and the two that make it.
USUAL, STORED = 256, 3
# The interpreter of Triton rounds products of bfloat16 tiles, and their sums, to bfloat16 (D7).
INTERPRETED = 4 if os.environ.get("TRITON_INTERPRET") == "1" else 1


def unit(dtype: torch.dtype) -> float:
    """u: what one rounding changes at most, relative to the number."""
    return torch.finfo(dtype).eps / 2


def after(roundings: float, dtype: torch.dtype) -> float:
    """The relative error after so many roundings."""
    n = min(roundings, 6 * math.sqrt(roundings)) * unit(dtype)
    return n / (1 - n)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of `dtype` run in."""
    return torch.promote_types(dtype, torch.float32)


def of_sum(
    expected: Tensor, size: Tensor, terms: int, dtype: torch.dtype, stored: int = 1
) -> Tensor:
    """What each entry of a sum of products may be off.

    Args:
        expected: the sums, computed in float64.
        size: the sums of the absolute products.
        terms: products per sum; a bias or a factor counts as one more.
        dtype: of the result. Sums run in float32 or, where it is wider, in this dtype.
        stored: how often a narrower dtype holds the sum or a part of it. Once, if the sum is
            rounded when it is complete; the error is then relative to the sum itself.
    """
    stored = max(stored, INTERPRETED) if dtype == torch.bfloat16 else stored
    sums = (after(terms + 2, wide(dtype)) + after(terms, torch.float64)) * size
    sums = sums + terms * torch.finfo(wide(dtype)).smallest_normal
    if wide(dtype) == dtype:
        return sums
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of the smallest numbers
    if stored == 1:
        return sums + unit(dtype) * (expected.abs() + sums) + step / 2
    return sums + after(stored, dtype) * size + stored * step


def close(
    got: Any,
    expected: Any,
    roundings: float | None = None,
    dtype: torch.dtype | None = None,
    size: float | None = None,
    **options: Any,
) -> None:
    """Fail unless two ways to compute the same agree: tensors, or tuples and dicts of them.

    The absolute products are not known here, so errors are measured by the largest number of the
    result, which partial sums of random signs seldom exceed.

    Args:
        got, expected: both may be rounded.
        roundings: of one entry: products of its sum, over all layers that it goes through, over
            all steps of a training. USUAL or STORED if not given.
        dtype: in which the arithmetic was; that of the narrower tensor where not given.
        size: the largest number on the way, where results cancel.
        options: of torch.testing.assert_close.
    """
    if isinstance(expected, Mapping):
        assert got.keys() == expected.keys()
        got, expected = list(got.values()), list(expected.values())
    if isinstance(expected, (tuple, list)):
        for one, other in zip(got, expected, strict=True):
            close(one, other, roundings, dtype, size, **options)
        return
    atol = 0.0
    if expected.is_floating_point() and expected.numel():
        dtype = dtype or max(got.dtype, expected.dtype, key=unit)
        if roundings is None:
            roundings = USUAL if wide(dtype) == dtype else STORED
        if size is None:
            finite = expected.detach().double().nan_to_num(0.0, 0.0, 0.0)
            size = float(finite.abs().max())
        atol = 2 * after(roundings, dtype) * size
    torch.testing.assert_close(got, expected, rtol=0, atol=atol, **options)
