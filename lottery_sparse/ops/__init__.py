"""Functional ops. Each file is the contract of one op: check, schema, fake, gradient, vmap."""

from lottery_sparse.ops.bits.op import pack_mask, unpack_mask
from lottery_sparse.ops.common.checks import SignConstant
from lottery_sparse.ops.compact.op import compact_conv2d, compact_linear
from lottery_sparse.ops.masked.conv2d import masked_conv2d
from lottery_sparse.ops.masked.linear import masked_linear
from lottery_sparse.ops.packed.op import (
    bitmap_linear,
    csr_linear,
    ternary_linear,
)
from lottery_sparse.ops.selection.op import keep_top
from lottery_sparse.ops.supermask.op import sample_bits, supermask_conv2d, supermask_linear
from lottery_sparse.ops.supermask.sampling import sample_mask

__all__ = [
    "SignConstant",
    "bitmap_linear",
    "compact_conv2d",
    "compact_linear",
    "csr_linear",
    "keep_top",
    "masked_conv2d",
    "masked_linear",
    "pack_mask",
    "sample_bits",
    "sample_mask",
    "supermask_conv2d",
    "supermask_linear",
    "ternary_linear",
    "unpack_mask",
]
