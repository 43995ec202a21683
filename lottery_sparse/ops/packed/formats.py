"""Packed layouts of a pruned weight, each with its packing and unpacking in plain PyTorch.

ternary   weights of -c, 0 and +c: two bits each, and c
csr       kept weights by row: value and 16-bit column
tiles     kept weights of 16 bits by tiles of 64 x 64, for the matrix unit of a GPU
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- ternary -----------------------------------------------------------------------------------
# A block holds 16 rows and 16 columns in 16 words, one per row; column 16 w + 4 j + b of a row is
# at bits 8 b + 2 j of word w. See csrc/packed/ternary_linear.h for what that makes fast.

BLOCK = 16


def pack_ternary(signs: Tensor) -> Tensor:
    """[N, K] of -1, 0 and 1, any dtype -> int32 [ceil(N / 16), ceil(K / 16), 16].

    The code of a weight is its sign + 1; padding has the code of 0.
    """
    rows, columns = signs.shape
    codes = F.pad(signs.to(torch.int8) + 1, (0, -columns % BLOCK, 0, -rows % BLOCK), value=1)
    codes = codes.unflatten(1, (-1, 4, 4)).unflatten(0, (-1, BLOCK))  # [blocks, row, w, j, b]
    j, b = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    shifts = (8 * b + 2 * j).to(signs.device)
    words = torch.zeros(codes.shape[:3], dtype=torch.int64, device=signs.device)
    for i in range(4):  # by slot: a word a code at once would be 64 times the memory
        words += (codes[..., i, :].to(torch.int64) << shifts[i]).sum(-1)
    return words.transpose(1, 2).to(torch.int32).contiguous()  # keeps the low 32 bits


def unpack_ternary(codes: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_ternary`: int8 [rows, columns]."""
    j, b = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    shifts = (8 * b + 2 * j).flatten().to(codes.device, torch.int32)
    signs = ((codes.transpose(1, 2).unsqueeze(-1) >> shifts) & 3).to(torch.int8) - 1
    return signs.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()


def ternary_weight(codes: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """scale · t, dense [rows, columns] in the dtype of `scale` [1] or [rows]."""
    return scale.unsqueeze(1) * unpack_ternary(codes, rows, columns).to(scale.dtype)


# ---- kept weights by row -----------------------------------------------------------------------
# csr: `starts` int64 [N + 1] and `columns` [C], int16 (the bits of uint16) or int32, as in
# compact.KeptLists. bitmap: `starts`, and the mask as bits. Values are in row-major order in both.


def row_starts(kept: Tensor) -> Tensor:
    """bool [N, K] -> int64 [N + 1]: the entries of row r are starts[r] … starts[r + 1] - 1."""
    return F.pad(kept.sum(1).cumsum(0), (1, 0))


def pack_csr(weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] and its bool mask -> (values [C], starts [N + 1], columns [C])."""
    columns = kept.nonzero()[:, 1]
    numbers = torch.int16 if kept.shape[1] <= 2**16 else torch.int32
    return weight[kept], row_starts(kept), columns.to(numbers)  # int16 keeps the low 16 bits


def unpack_csr(values: Tensor, starts: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """The inverse of `pack_csr`: dense [N, K], 0 where nothing is kept."""
    rows = torch.repeat_interleave(starts.diff())
    dense = values.new_zeros(len(starts) - 1, in_features)
    return dense.index_put_((rows, csr_columns(columns)), values)


def csr_columns(columns: Tensor) -> Tensor:
    """The columns of all entries as int64 [C]."""
    return columns.to(torch.int64) & (0xFFFF if columns.dtype == torch.int16 else -1)


def unpack_bitmap(values: Tensor, kept: Tensor) -> Tensor:
    """Values in row-major order -> dense [N, K], 0 where the bool mask does not keep."""
    return values.new_zeros(kept.shape).masked_scatter_(kept, values)


# ---- tiles for the matrix unit of a GPU --------------------------------------------------------
# Kept weights of 16 bits by tiles of 64 x 64, with 12-bit places in the order in which the matrix
# unit takes them: csrc/packed/tile_fragments.h has the layout, and why. 3.5 bytes a kept weight, in
# groups of 64; `starts` says where each tile begins, in units of 64 bytes.

TILE = 64
GROUP = 64
_VALUE, _LOW, _HIGH = 16, 8, 16  # units of 8 bytes: of a group, a group, and 4 groups
_BANKS = 32


def tile_places(row: Tensor, column: Tensor) -> Tensor:
    """Rows and columns in a tile -> places 0 … 4095 of 16 bits in it."""
    fragment = row // 16 * 4 + column % 16 // 4
    lane = row % 8 * 4 + column // 16
    word = row % 16 // 8 + column % 4 // 2 * 2
    return fragment * 256 + lane * 8 + word * 2 + column % 2


def pack_tiles(
    values: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Kept weights of a matrix -> (starts int32 [tiles + 1], data int64 [units, 8]).

    Args:
        values: [C], float16 or bfloat16.
        rows, columns: int64 [C], where they are.
        shape: N and K. Tiles go by rows of tiles; there are ceil(N / 64) · ceil(K / 64).
    """
    across = -(-shape[1] // TILE)
    tiles = -(-shape[0] // TILE) * across
    tile = rows // TILE * across + columns // TILE
    place = tile_places(rows % TILE, columns % TILE)
    bank = place // 2 % _BANKS

    # in a tile: one entry of each bank of shared memory after another
    order = torch.argsort(tile * _BANKS + bank)
    rank = torch.empty_like(order)
    rank[order] = _position_in_run((tile * _BANKS + bank)[order])
    order = torch.argsort((tile * TILE * TILE + rank) * _BANKS + bank)
    place, bits = place[order], values.view(torch.int16)[order]

    # groups, the last of a tile filled with its last entry
    count = torch.bincount(tile, minlength=tiles)
    layout = TileLayout((count + GROUP - 1) // GROUP)
    position = layout.group.unsqueeze(1) * GROUP + torch.arange(GROUP, device=values.device)
    last = (count[layout.tile] - 1).unsqueeze(1)
    entry = (count.cumsum(0) - count)[layout.tile].unsqueeze(1) + position.minimum(last)

    place, bits = _by_lane(place[entry]), _by_lane(bits[entry])
    high = (place[..., 0] >> 8) | (place[..., 1] >> 8) << 4  # [groups, lane]
    data = torch.zeros(layout.size, dtype=torch.int64, device=values.device)
    data[layout.values] = bits.flatten(1).view(torch.int64)
    data[layout.low] = (place & 0xFF).to(torch.uint8).flatten(1).view(torch.int64)
    data.view(torch.uint8)[layout.high] = high.to(torch.uint8)
    return layout.starts.to(torch.int32), data.view(-1, 8)


class TileLayout:
    """Where the groups of tiles are, given how many each tile has."""

    def __init__(self, groups: Tensor):
        device = groups.device
        highs = (groups + 3) // 4
        sizes = groups * (_VALUE + _LOW) + highs * _HIGH
        begins = sizes.cumsum(0) - sizes
        self.size = int(sizes.sum())
        self.starts = F.pad(sizes.cumsum(0), (1, 0)) // 8
        self.tile = torch.repeat_interleave(torch.arange(len(groups), device=device), groups)
        before = (groups.cumsum(0) - groups)[self.tile]
        self.group = torch.arange(len(self.tile), device=device) - before  # in its tile
        values = begins[self.tile]
        low = values + groups[self.tile] * _VALUE
        high = low + groups[self.tile] * _LOW
        # in units of 8 bytes, [groups, 16] and [groups, 8]; in bytes, [groups, 32]
        self.values = (values + self.group * _VALUE).unsqueeze(1) + torch.arange(
            _VALUE, device=device
        )
        self.low = (low + self.group * _LOW).unsqueeze(1) + torch.arange(_LOW, device=device)
        first = (high + self.group // 4 * _HIGH) * 8 + self.group % 4
        self.high = first.unsqueeze(1) + 4 * torch.arange(32, device=device)


# bitmap tiles: the mask of a tile, 128 words, and its values in the order of its bits, padded to 16
# bytes: csrc/packed/bitmap_fragments.h. `starts` counts units of 16 bytes.

BITMAP_UNITS = 32


def bitmap_places(place: Tensor) -> tuple[Tensor, Tensor]:
    """Places in a tile -> 32 · word + bit in its mask, and their order among values."""
    half, register = place // 128 % 2, place // 256 * 4 + place % 8 // 2
    bit = place // 8 % 16 * 2 + place % 2
    return (half * 64 + register) * 32 + bit, (register * 2 + half) * 32 + bit


def pack_bitmap_tiles(
    values: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """As `pack_tiles` -> (starts int32 [tiles + 1], data int64 [units, 2])."""
    across = -(-shape[1] // TILE)
    tiles = -(-shape[0] // TILE) * across
    tile = rows // TILE * across + columns // TILE
    bit, order = bitmap_places(tile_places(rows % TILE, columns % TILE))
    count = torch.bincount(tile, minlength=tiles)
    units = torch.where(count > 0, BITMAP_UNITS + (count + 7) // 8, 0)
    starts = F.pad(units.cumsum(0), (1, 0))
    data = torch.zeros(int(starts[-1]), 8, dtype=torch.int16, device=values.device)

    sorting = torch.argsort(tile * TILE * TILE + order)
    tile, bit, bits = tile[sorting], bit[sorting], values.view(torch.int16)[sorting]
    at = (starts[tile] + BITMAP_UNITS) * 8 + _position_in_run(tile)
    data.view(-1)[at] = bits
    words = torch.zeros(len(data) * 4, dtype=torch.int64, device=values.device)
    words.index_add_(0, starts[tile] * 4 + bit // 32, 1 << bit % 32)
    data.view(-1).view(torch.int32).bitwise_or_(words.to(torch.int32))
    return starts.to(torch.int32), data.view(torch.int64)


def _by_lane(entries: Tensor) -> Tensor:
    """[groups, 64] -> [groups, 32, 2]: a lane has entries l and 32 + l."""
    return entries.view(-1, 2, GROUP // 2).mT.contiguous()


def _position_in_run(sorted_keys: Tensor) -> Tensor:
    """0, 1, 2, … within each run of equal keys."""
    index = torch.arange(len(sorted_keys), device=sorted_keys.device)
    if not len(index):
        return index
    starts = F.pad(sorted_keys[1:] != sorted_keys[:-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(0).values
