"""The Triton kernels as the backend "triton": the functions of `reference`, same signatures.

One file per op. They run on CUDA devices, and with TRITON_INTERPRET=1 on the CPU, slowly: that is
how they are tested without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.kernels import conv_tiles
from lottery_sparse.kernels.bits import pack_mask, unpack_mask
from lottery_sparse.kernels.compact_conv2d import compact_conv2d, compact_conv2d_backward
from lottery_sparse.kernels.compact_linear import (
    compact_linear,
    compact_linear_backward,
    gather_kept,
    scatter_kept_,
)
from lottery_sparse.kernels.keep_top import keep_top
from lottery_sparse.kernels.masked_conv2d import masked_conv2d, masked_conv2d_backward
from lottery_sparse.kernels.masked_linear import masked_linear, masked_linear_backward
from lottery_sparse.kernels.masked_optim import adam_step, sgd_step
from lottery_sparse.kernels.packed_linear import bitmap_linear, csr_linear
from lottery_sparse.kernels.random import (
    random_normal,
    random_signs,
    random_uniform,
    random_words,
)
from lottery_sparse.kernels.sampling import sample_bits
from lottery_sparse.kernels.supermask import supermask_linear, supermask_linear_backward
from lottery_sparse.kernels.supermask_conv2d import supermask_conv2d, supermask_conv2d_backward
from lottery_sparse.kernels.ternary_linear import ternary_linear

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Offsets within a tile, of up to 256 rows, are 32 bits. How many of an op's first arguments are
# matrices that kernels read by tiles:
LARGEST = 2**22
_MATRICES = {
    "masked_linear": 2,
    "masked_linear_backward": 3,
    "compact_linear_backward": 2,
    "ternary_linear": 2,
    "supermask_linear": 2,
    "supermask_linear_backward": 3,
}


def refuses(op: str, *args: Any) -> str | None:
    """Why `op` cannot run here with these arguments, in a sentence; None if it can."""
    floating = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
    if op == "keep_top":
        floating = {score.dtype for score in args[0]}
    if not floating <= set(_DTYPES):
        return f"its kernels run float32, float16 and bfloat16, got {min(map(str, floating))}."
    if op == "ternary_linear" and args[-1]:
        return "its kernels take exact activations."
    if op.startswith("masked_conv2d"):
        return conv_tiles.refuses(op, *args)
    matrices = args[: _MATRICES.get(op, 0)]
    largest = max((n for a in matrices for n in a.shape[-2:]), default=0)
    if largest > LARGEST:
        return f"its kernels take matrices of up to {LARGEST} rows and columns, got {largest}."
    return None


def wins(op: str, *args: Any) -> bool:
    """Whether this backend is the faster one for a call that it does not refuse."""
    return True


__all__ = [
    "adam_step",
    "bitmap_linear",
    "compact_conv2d",
    "compact_conv2d_backward",
    "compact_linear",
    "compact_linear_backward",
    "csr_linear",
    "gather_kept",
    "keep_top",
    "masked_conv2d",
    "masked_conv2d_backward",
    "masked_linear",
    "masked_linear_backward",
    "pack_mask",
    "random_normal",
    "random_signs",
    "random_uniform",
    "random_words",
    "refuses",
    "sample_bits",
    "scatter_kept_",
    "sgd_step",
    "supermask_conv2d",
    "supermask_conv2d_backward",
    "supermask_linear",
    "supermask_linear_backward",
    "ternary_linear",
    "unpack_mask",
    "wins",
]
