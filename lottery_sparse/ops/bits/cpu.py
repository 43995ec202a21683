"""Masks as bits, and what they keep."""

from __future__ import annotations

import torch
from torch import Tensor

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops

_ops = torch.ops.lottery_sparse_native


def pack_mask(mask: Tensor) -> Tensor:
    if mask.dim() == 2:
        return _ops.pack_mask(mask)
    bits = _ops.pack_mask(_as_rows(mask))
    return bits.view(mask.shape[:-1] + bits.shape[-1:])


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    return _ops.unpack_mask(_as_rows(bits), columns).view(bits.shape[:-1] + (columns,))


def _as_rows(values: Tensor) -> Tensor:
    """[..., K] -> [rows, K], also where there are no elements."""
    return values.reshape(values.shape[:-1].numel(), values.shape[-1])


def count_kept(mask: Tensor) -> int:
    """Number of True entries of a bool mask on the CPU."""
    return _ops.count_kept(mask)


def as_bool(mask: Tensor, weight: Tensor) -> Tensor:
    """A bool or packed mask as bool."""
    return mask if mask.dtype == torch.bool else unpack_mask(mask, weight.shape[-1])


def select_kept(values: Tensor, mask: Tensor, others: Tensor | None) -> Tensor:
    """where(mask, values, others or 0), bit by bit; contiguous."""
    return _ops.select_kept(values, mask, others)


def put_back_(weight: Tensor, mask: Tensor, frozen: Tensor | None) -> bool:
    """weight = where(mask, weight, frozen or 0), in place and contiguous; whether it wrote."""
    return _ops.put_back_(weight, mask, frozen)
