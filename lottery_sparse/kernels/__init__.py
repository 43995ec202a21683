"""The Triton kernels as the backend "triton": the functions of `reference`, same signatures.

One file per op. They run on CUDA devices, and with TRITON_INTERPRET=1 on the CPU, slowly: that is
how they are tested without a GPU.
"""

from __future__ import annotations

from typing import Any

from lottery_sparse.kernels.bits import pack_mask, unpack_mask
from lottery_sparse.kernels.compact_conv2d import compact_conv2d, compact_conv2d_backward
from lottery_sparse.kernels.compact_linear import (
    compact_linear,
    compact_linear_backward,
    gather_kept,
    scatter_kept_,
)
from lottery_sparse.kernels.keep_top import keep_top
from lottery_sparse.kernels.limits import fails_on, refuses
from lottery_sparse.kernels.masked_conv2d import masked_conv2d, masked_conv2d_backward
from lottery_sparse.kernels.masked_linear import masked_linear, masked_linear_backward
from lottery_sparse.kernels.masked_optim import adam_step, prepare_step, sgd_step
from lottery_sparse.kernels.packed_linear import bitmap_linear, csr_linear
from lottery_sparse.kernels.random import (
    random_normal,
    random_signs,
    random_uniform,
    random_words,
)
from lottery_sparse.kernels.sampling import sample_bits
from lottery_sparse.kernels.supermask import (
    supermask_linear,
    supermask_linear_backward,
    supermask_linear_sgd,
)
from lottery_sparse.kernels.supermask_conv2d import supermask_conv2d, supermask_conv2d_backward
from lottery_sparse.kernels.ternary_linear import ternary_linear


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
    "fails_on",
    "gather_kept",
    "keep_top",
    "masked_conv2d",
    "masked_conv2d_backward",
    "masked_linear",
    "masked_linear_backward",
    "pack_mask",
    "prepare_step",
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
    "supermask_linear_sgd",
    "ternary_linear",
    "unpack_mask",
    "wins",
]
