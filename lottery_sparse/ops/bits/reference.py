"""Masks as bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS_PER_CHUNK = 4  # rows are padded to 128 bits, one vector load


def words_per_row(columns: int) -> int:
    return WORDS_PER_CHUNK * -(-columns // (32 * WORDS_PER_CHUNK))


def pack_mask(mask: Tensor) -> Tensor:
    """[..., K] bool -> [..., W] int32: bit j of word w is column 32 w + j; spare bits are 0."""
    columns = mask.shape[-1]
    padded = F.pad(mask, (0, 32 * words_per_row(columns) - columns)).unflatten(-1, (-1, 32))
    bits = padded.to(torch.int64) << torch.arange(32, device=mask.device)
    return bits.sum(-1).to(torch.int32)  # keeps the low 32 bits


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    """[..., W] int32 -> [..., columns] bool, the inverse of `pack_mask`."""
    spread = bits.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=bits.device)
    return (spread & 1).to(torch.bool).flatten(-2)[..., :columns].contiguous()


def mask_as_bool(mask: Tensor, weight: Tensor, rank: int) -> Tensor:
    """A bool or packed mask as bool of the weight's shape; rank = that of one weight."""
    if mask.dtype == torch.bool:
        return mask
    columns = weight.shape[1 - rank :].numel()
    return unpack_mask(mask, columns).view(weight.shape)
