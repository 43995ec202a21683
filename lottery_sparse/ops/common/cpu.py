"""The library of the CPU kernels, and the densities up to which they win on this processor."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops
from lottery_sparse.ops.common.torch_private import multiplies_bfloat16
from lottery_sparse.ops.limits import (
    MAX_DENSITY_AUTOCAST,
    MAX_DENSITY_BFLOAT16,
    MAX_DENSITY_MASKED,
    MAX_DENSITY_MASKED_SMALL_BATCH,
    NEVER,
    SMALL_BATCH,
    SMALL_WEIGHT,
)

# called by dispatch.numerics
numerics = torch.ops.lottery_sparse_native.numerics.default

DTYPES = (torch.float32, torch.bfloat16)  # of linear kernels, all of a call's tensors alike

_multiplies_bfloat16 = cache(multiplies_bfloat16)


def most_density(x: Tensor, most: float, effective: Tensor | None = None) -> float:
    """Up to which density sparse products of `x` win; `most` is that of float32.

    A float32 `effective` is one under autocast. The dense product has to make a weight of its dtype
    first, in each call.
    """
    if x.dtype != torch.bfloat16:
        return most
    if effective is None or effective.dtype == x.dtype:
        return _most_density_bfloat16(x.shape[-2], most)
    vectors, tiles = _multiplies_bfloat16()
    many = x.shape[-2] >= SMALL_BATCH
    return min(most, MAX_DENSITY_AUTOCAST) if many and (vectors or tiles) else most


def _most_density_bfloat16(rows: int, most: float) -> float:
    vectors, tiles = _multiplies_bfloat16()
    if tiles:
        return 0.0  # never measured
    if not vectors and rows >= SMALL_BATCH:  # the dense library takes eight times as long
        return most
    return next(density for least, density in MAX_DENSITY_BFLOAT16 if rows >= least)


def masked_linear_least_rows(dtype: torch.dtype, kept: int, count: int) -> int:
    """From so many rows of x on the kernel is faster, for `kept` of `count` weights, zeros else."""
    if count <= SMALL_WEIGHT:
        return 0
    for rows in sorted({0, SMALL_BATCH, *(least for least, _ in MAX_DENSITY_BFLOAT16)}):
        most = MAX_DENSITY_MASKED if rows >= SMALL_BATCH else MAX_DENSITY_MASKED_SMALL_BATCH
        if dtype == torch.bfloat16:
            most = _most_density_bfloat16(rows, most)
        if kept <= most * count:
            return rows
    return NEVER
