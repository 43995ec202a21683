"""pack_mask and unpack_mask for the backend "cuda"."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.lottery_sparse_cuda


def pack_mask(mask: Tensor) -> Tensor:
    """[..., K] bool -> [..., W] int32: bit j of word w is column 32 w + j; spare bits are 0."""
    bits = _ops.pack_mask(_as_rows(mask))
    return bits.view(mask.shape[:-1] + bits.shape[-1:])


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    """[..., W] int32 -> [..., columns] bool, the inverse of `pack_mask`."""
    return _ops.unpack_mask(_as_rows(bits), columns).view(bits.shape[:-1] + (columns,))


def _as_rows(values: Tensor) -> Tensor:
    """[..., K] -> [rows, K], also where there are no elements."""
    return values.reshape(values.shape[:-1].numel(), values.shape[-1])
