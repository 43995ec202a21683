"""Kept weights as lists."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# 16 bits hold a row or column number up to here; a kernel then reads half the bytes
NARROW = 2**16

# Positions are 32 bits, and kernels go beyond the last one by a vector.
MOST_SLOTS = 2**31 - 2**16


class KeptLists(NamedTuple):
    """Where the kept entries of a mask [N, K] or [E, N, K] are, by row and by column.

    Entries in row-major order fill the first slots of C; the other slots are spare and hold
    zeros. Column and row numbers are int16 (the bits of uint16) where those hold them, else int32.
    """

    starts: Tensor  # int64 [N + 1] or [E, N + 1]: row r holds slots starts[r] … starts[r + 1] - 1
    columns: Tensor  # [C] or [E, C]
    column_starts: Tensor  # int64 [K + 1] or [E, K + 1], into the entries ordered by column
    rows: Tensor  # [C] or [E, C], by column, ascending within one
    positions: Tensor  # int32 [C] or [E, C]: the slot of an entry by column

    @classmethod
    def of(cls, mask: Tensor, capacity: int | None = None) -> KeptLists:
        """The lists of a bool mask.

        Args:
            mask: [N, K] or [E, N, K], True = kept.
            capacity: slots C per network; None = as many as the fullest network needs.

        Raises:
            ValueError: not bool, not two or three dimensions, on the meta device, more kept
                entries than slots, or more slots than 32 bits count.
        """
        if mask.dtype != torch.bool or mask.dim() not in (2, 3):
            raise ValueError(
                f"mask must be bool [N, K] or [E, N, K], got {mask.dtype} {tuple(mask.shape)}."
            )
        if mask.is_meta:
            raise ValueError("mask is on the meta device, which holds no values to list; load it.")
        most = int(mask.flatten(-2).sum(-1).max()) if mask.numel() else 0
        slots = most if capacity is None else capacity
        if slots < most:
            raise ValueError(f"capacity is {slots}, but a network keeps {most} entries.")
        if max(slots, *mask.shape[-2:]) > MOST_SLOTS:
            raise ValueError(
                f"mask {tuple(mask.shape)} with {slots} slots is too large for lists of up to "
                f"{MOST_SLOTS} rows, columns and kept entries; split the layer, or leave it masked."
            )
        if mask.dim() == 2:
            return cls(*_lists(mask, slots))
        return cls(*map(torch.stack, zip(*(_lists(m, slots) for m in mask), strict=True)))

    @property
    def kept(self) -> Tensor:
        """Kept entries per network: int64, [] or [E]."""
        return self.starts[..., -1]


def _lists(mask: Tensor, slots: int) -> tuple[Tensor, ...]:
    narrow = max(mask.shape) <= NARROW
    row, column = mask.nonzero().unbind(1)
    by_column, order = torch.sort(column, stable=True)
    numbers = torch.int16 if narrow else torch.int32
    return (
        _starts(row, mask.shape[0]),
        _padded(column, slots, numbers),
        _starts(by_column, mask.shape[1]),
        _padded(row[order], slots, numbers),
        _padded(order, slots, torch.int32),
    )


def _starts(sorted_numbers: Tensor, count: int) -> Tensor:
    edges = torch.arange(count + 1, device=sorted_numbers.device)
    return torch.searchsorted(sorted_numbers, edges)


def _padded(values: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(slots, dtype=dtype, device=values.device)
    out[: len(values)] = values.to(dtype)  # int16 keeps the low 16 bits
    return out
