"""Learned masks, sampled."""

from __future__ import annotations

import torch
from torch import Tensor

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops
from lottery_sparse.ops.bits.cpu import count_kept, pack_mask

_ops = torch.ops.lottery_sparse_native


def sample_mask(score: Tensor, key: Tensor) -> Tensor:
    networks = score if key.dim() == 2 else score.unsqueeze(0)
    return _drawn(networks, key).to(score.dtype).view(score.shape)


def sample_bits(score: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    if key.dim() == 1:
        mask = _ops.sample_mask(score.to(torch.float32), *key.tolist())
        return _ops.pack_mask(mask), torch.tensor(_ops.count_kept(mask))
    masks = _drawn(score, key)
    kept = torch.tensor([count_kept(mask) for mask in masks], dtype=torch.int64)
    return pack_mask(masks), kept


def _drawn(score: Tensor, key: Tensor) -> Tensor:
    """Masks of [E, ...], each network with its key, as bool."""
    score = score.to(torch.float32)
    keys = zip(score, key.view(-1, 3).tolist(), strict=True)
    masks = [_ops.sample_mask(one, seed, stream, step) for one, (seed, stream, step) in keys]
    return masks[0].unsqueeze(0) if len(masks) == 1 else torch.stack(masks) if masks else score > 0
