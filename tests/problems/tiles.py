"""The inverses of the tile formats that CUDA kernels read, which nothing but tests needs."""

from __future__ import annotations

import torch
from torch import Tensor

from lottery_sparse.ops.packed.formats import (
    BITMAP_UNITS,
    TILE,
    TileLayout,
    bitmap_places,
    tile_places,
)


def unpack_tiles(
    starts: Tensor, data: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The inverse of `pack_tiles`: dense [N, K], 0 where nothing is kept."""
    across = max(-(-shape[1] // TILE), 1)
    units = starts.to(torch.int64).diff()
    rest = units % 14  # of 4 groups: 3 units each, and 2
    layout = TileLayout(units // 14 * 4 + (rest - 2).clamp(min=0) // 3)
    data = data.flatten()
    bits = data[layout.values].view(torch.int16).view(-1, 32, 2)
    low = data[layout.low].view(torch.uint8).view(-1, 32, 2).to(torch.int64)
    high = data.view(torch.uint8)[layout.high].to(torch.int64)
    place = low | torch.stack([high & 15, high >> 4], -1) << 8

    grid = torch.arange(TILE, device=data.device)
    where = torch.argsort(tile_places(*torch.meshgrid(grid, grid, indexing="ij")).flatten())[place]
    height = -(-shape[0] // TILE) * TILE
    dense = torch.zeros(height, across * TILE, dtype=torch.int16, device=data.device)
    tile = layout.tile.view(-1, 1, 1)
    rows, columns = tile // across * TILE + where // TILE, tile % across * TILE + where % TILE
    dense[rows, columns] = bits
    return dense[: shape[0], : shape[1]].contiguous().view(dtype)


def unpack_bitmap_tiles(
    starts: Tensor, data: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The inverse of `pack_bitmap_tiles`: dense [N, K], 0 where nothing is kept."""
    down, across = -(-shape[0] // TILE), -(-shape[1] // TILE)
    begins = starts.to(torch.int64)
    full = (begins.diff() > 0).nonzero().flatten()
    grid = torch.arange(TILE, device=data.device)
    bit, order = bitmap_places(tile_places(*torch.meshgrid(grid, grid, indexing="ij")).flatten())
    words = data.flatten().view(torch.int32)
    masks = words[(begins[full] * 4).unsqueeze(1) + bit // 32] >> bit % 32 & 1  # by row, column
    kept = torch.zeros(len(full), TILE * TILE, dtype=torch.bool, device=data.device)
    kept[:, order] = masks.bool()
    inside = kept.to(torch.int64).cumsum(1) - 1  # by order
    at = ((begins[full] + BITMAP_UNITS) * 8).unsqueeze(1) + inside.clamp(min=0)
    bits = torch.where(kept, data.flatten().view(torch.int16)[at], 0)[:, order]
    dense = torch.zeros(down * across, TILE * TILE, dtype=torch.int16, device=data.device)
    dense[full] = bits
    dense = dense.view(down, across, TILE, TILE).transpose(1, 2).reshape(down * TILE, across * TILE)
    return dense[: shape[0], : shape[1]].contiguous().view(dtype)
