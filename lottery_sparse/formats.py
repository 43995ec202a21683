"""Packed layouts of a pruned weight, each with its packing and unpacking in plain PyTorch.

ternary   weights of -c, 0 and +c: two bits each, and c
csr       kept weights by row: value and 16-bit column
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- ternary -----------------------------------------------------------------------------------
# A block holds 16 rows and 16 columns in 16 words, one per row; column 16 w + 4 j + b of a row is
# at bits 8 b + 2 j of word w. See csrc/ternary_linear.h for what that makes fast.

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
    numbers = columns.to(torch.int64) & (0xFFFF if columns.dtype == torch.int16 else -1)
    rows = torch.repeat_interleave(starts.diff())
    dense = values.new_zeros(len(starts) - 1, in_features)
    return dense.index_put_((rows, numbers), values)


def unpack_bitmap(values: Tensor, kept: Tensor) -> Tensor:
    """Values in row-major order -> dense [N, K], 0 where the bool mask does not keep."""
    return values.new_zeros(kept.shape).masked_scatter_(kept, values)
