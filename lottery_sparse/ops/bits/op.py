"""pack_mask and unpack_mask: a bool mask as bits, 1/8 of its memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits import reference


def pack_mask(mask: Tensor) -> Tensor:
    """Pack the last dimension of a bool mask into 32-bit words.

    >>> ls.ops.pack_mask(mask).shape
    torch.Size([10, 4])

    Args:
        mask: [..., K], bool.

    Returns:
        [..., W], int32, W = 4 ceil(K / 128): bit j of word w is column 32 w + j, spare bits are
        zero. Rows start on 128-bit boundaries.

    Raises:
        ValueError: the mask is not bool, or has no dimension.
    """
    if mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool (True = kept), got {mask.dtype}; "
            "use mask.bool() if it holds only 0 and 1."
        )
    if mask.dim() == 0:
        raise ValueError("mask must have at least one dimension, got a single number.")
    return _pack(mask)


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_mask`.

    >>> torch.equal(ls.ops.unpack_mask(ls.ops.pack_mask(mask), 20), mask)
    True

    Args:
        bits: [..., W], int32.
        columns: K, the columns of the mask; W must be 4 ceil(K / 128).

    Returns:
        [..., K], bool.

    Raises:
        ValueError: the dtype is not int32, or W does not fit K.
    """
    if bits.dtype != torch.int32 or bits.dim() == 0:
        raise ValueError(
            f"bits must be int32 with at least one dimension, got {bits.dtype} "
            f"of shape {tuple(bits.shape)}."
        )
    if columns < 0 or bits.shape[-1] != reference.words_per_row(columns):
        raise ValueError(
            f"bits has {bits.shape[-1]} words a row, but {columns} columns need "
            f"{reference.words_per_row(max(columns, 0))}."
        )
    return _unpack(bits, columns)


torch.library.define("lottery_sparse::pack_mask", "(Tensor mask) -> Tensor")
torch.library.define("lottery_sparse::unpack_mask", "(Tensor bits, SymInt columns) -> Tensor")
_pack = torch.ops.lottery_sparse.pack_mask.default
_unpack = torch.ops.lottery_sparse.unpack_mask.default


@torch.library.impl("lottery_sparse::pack_mask", "default")
def _run_pack(mask: Tensor) -> Tensor:
    return dispatch.kernel("pack_mask", mask.device, (mask,))(mask)


@torch.library.impl("lottery_sparse::unpack_mask", "default")
def _run_unpack(bits: Tensor, columns: int) -> Tensor:
    return dispatch.kernel("unpack_mask", bits.device, (bits, columns))(bits, columns)


@torch.library.register_fake("lottery_sparse::pack_mask")
def _fake_pack(mask: Tensor) -> Tensor:
    words = reference.words_per_row(mask.shape[-1])
    return mask.new_empty(mask.shape[:-1] + (words,), dtype=torch.int32)


@torch.library.register_fake("lottery_sparse::unpack_mask")
def _fake_unpack(bits: Tensor, columns: int) -> Tensor:
    return bits.new_empty(bits.shape[:-1] + (columns,), dtype=torch.bool)


# Both work on the last dimension only, so a vmapped dimension is one more leading dimension.
@torch.library.register_vmap("lottery_sparse::pack_mask")
def _vmap_pack(info, in_dims, mask):
    return _pack(mask.movedim(in_dims[0], 0)), 0


@torch.library.register_vmap("lottery_sparse::unpack_mask")
def _vmap_unpack(info, in_dims, bits, columns):
    return _unpack(bits.movedim(in_dims[0], 0), columns), 0
