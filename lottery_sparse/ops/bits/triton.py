"""pack_mask and unpack_mask: a program moves 256 words of masks as bits."""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits import reference
from lottery_sparse.ops.triton import limits
from lottery_sparse.ops.triton.tiles import aligned

_WORDS = 256  # of a program


@triton.jit(do_not_specialize=["total"])
def _move(
    mask,
    bits,
    rows,
    columns,
    words,
    total,
    PACK: tl.constexpr,
    BY: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Bit j of word w of a row is column 32 w + j: packs them, or spreads them."""
    columns = aligned(columns, BY)
    # 64 bits where `total` has them
    index = (tl.program_id(0) + 0 * total) * WORDS + tl.arange(0, WORDS)
    row, word, j = index // words, index % words, tl.arange(0, 32)
    column = (word * 32)[:, None] + j[None, :]
    at = (row.to(tl.int64) * columns + word * 32)[:, None] + j[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    if PACK:
        kept = tl.load(mask + at, mask=inside, other=0) != 0
        packed = tl.sum(kept.to(tl.int32) << j[None, :], 1)
        tl.store(bits + index, packed, mask=row < rows)
    else:
        held = tl.load(bits + index, mask=row < rows, other=0)
        tl.store(mask + at, ((held[:, None] >> j[None, :]) & 1).to(tl.uint8), mask=inside)


def _why_not_pack(mask: Tensor) -> str | None:
    return limits.why_not((), longest=mask.shape[-1])


def _why_not_unpack(bits: Tensor, columns: int) -> str | None:
    return limits.why_not((), longest=columns)


@dispatch.limited(_why_not_pack)
def pack_mask(mask: Tensor) -> Tensor:
    """[..., K] bool -> [..., W] int32: bit j of word w is column 32 w + j; spare bits are 0."""
    words = reference.words_per_row(mask.shape[-1])
    bits = mask.new_empty((*mask.shape[:-1], words), dtype=torch.int32)
    _launch(mask.contiguous(), bits, pack=True)
    return bits


@dispatch.limited(_why_not_unpack)
def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    """[..., W] int32 -> [..., columns] bool, the inverse of `pack_mask`."""
    mask = bits.new_empty((*bits.shape[:-1], columns), dtype=torch.bool)
    _launch(mask, bits.contiguous(), pack=False)
    return mask


def _launch(mask: Tensor, bits: Tensor, pack: bool) -> None:
    columns, rows = mask.shape[-1], mask.shape[:-1].numel()
    if bits.numel() == 0:
        return
    with torch.cuda.device_of(mask):
        _move[(triton.cdiv(bits.numel(), _WORDS),)](
            mask.view(torch.uint8), bits, rows, columns, bits.shape[-1], bits.numel(),
            PACK=pack, BY=math.gcd(columns, 16), WORDS=_WORDS,
        )  # fmt: skip
