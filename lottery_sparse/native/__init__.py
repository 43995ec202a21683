"""The compiled CPU kernels as the backend "cpu": the functions of `reference`, same signatures.

Importing this package loads lottery_sparse._C; ImportError means that it is not built.
"""

from __future__ import annotations

import torch

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops
from lottery_sparse.native.conv2d import (
    compact_conv2d,
    compact_conv2d_backward,
    kept_conv2d,
    kept_conv2d_backward,
)
from lottery_sparse.native.dispatch import (
    MAX_DENSITY_COMPACT,
    MAX_DENSITY_QUICK,
    MAX_DENSITY_SAMPLED,
    NEVER,
    masked_linear_least_rows,
    masked_linear_wins,
    refuses,
    wins,
)
from lottery_sparse.native.linear import (
    compact_linear,
    compact_linear_backward,
    masked_linear,
    masked_linear_backward,
    scatter_kept_,
)
from lottery_sparse.native.masks import (
    count_kept,
    pack_mask,
    put_back_,
    select_kept,
    unpack_mask,
)
from lottery_sparse.native.packed import bitmap_linear, csr_linear, delta_linear, ternary_linear
from lottery_sparse.native.random import (
    keep_top,
    random_normal,
    random_signs,
    random_uniform,
    random_words,
    sample_bits,
    sample_mask,
)

# Called by backends.numerics.
numerics = torch.ops.lottery_sparse_native.numerics.default
# Called by optim.py: -1, or the position of a Parameter that they do not take.
sgd_step = torch.ops.lottery_sparse_native.sgd_step.default
adam_step = torch.ops.lottery_sparse_native.adam_step.default

__all__ = [
    "MAX_DENSITY_COMPACT",
    "MAX_DENSITY_QUICK",
    "MAX_DENSITY_SAMPLED",
    "NEVER",
    "adam_step",
    "bitmap_linear",
    "compact_conv2d",
    "compact_conv2d_backward",
    "compact_linear",
    "compact_linear_backward",
    "count_kept",
    "csr_linear",
    "delta_linear",
    "keep_top",
    "kept_conv2d",
    "kept_conv2d_backward",
    "masked_linear",
    "masked_linear_backward",
    "masked_linear_least_rows",
    "masked_linear_wins",
    "numerics",
    "pack_mask",
    "put_back_",
    "random_normal",
    "random_signs",
    "random_uniform",
    "random_words",
    "refuses",
    "sample_bits",
    "sample_mask",
    "scatter_kept_",
    "select_kept",
    "sgd_step",
    "ternary_linear",
    "unpack_mask",
    "wins",
]
