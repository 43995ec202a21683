"""What every op means, in plain PyTorch. Tests compare kernels to this package; it is not tuned.

Shapes: weight [N, K] or [E, N, K] (convolution: [O, I, kh, kw] or [E, O, I, kh, kw]), E networks
side by side; x [B, K], shared by all of them, or [E, B, K]; a mask is bool like the weight, or
packed int32 [..., N, W] (see `pack_mask`). Frozen values are given by two arguments:

    frozen None,  signs None    zero
    frozen like weight          a tensor
    frozen [] or [E], signs     sign x constant; signs are packed like a mask, bit 1 = plus
    frozen, signs int64         drawn from the key `signs`, [3] or [E, 3], see `drawn`
"""

from __future__ import annotations

from lottery_sparse.reference.compact import (
    MAX_DENSITY_LINEAR,
    MOST_STRIDE,
    compact_conv2d,
    compact_conv2d_backward,
    compact_linear,
    compact_linear_backward,
    gather_kept,
    kept_positions,
    kept_share,
    kept_weight,
    kernels_take,
    max_density,
    may_lag,
    scatter_kept_,
    spread_kept,
)
from lottery_sparse.reference.masked import (
    WORDS_PER_CHUNK,
    conv2d,
    conv2d_backward,
    effective_weight,
    linear,
    linear_backward,
    mask_as_bool,
    masked_conv2d,
    masked_conv2d_backward,
    masked_linear,
    masked_linear_backward,
    pack_mask,
    source,
    unpack_mask,
    words_per_row,
)
from lottery_sparse.reference.packed import (
    binary_linear,
    binary_weight,
    bitmap_linear,
    csr_linear,
    delta_linear,
    drawn_signs,
    seeded_linear,
    seeded_weight,
    ternary_linear,
)
from lottery_sparse.reference.random import (
    drawn,
    keep_top,
    philox,
    random_normal,
    random_signs,
    random_uniform,
    random_words,
    sample_mask,
)
from lottery_sparse.reference.supermask import (
    rescaling,
    sample_bits,
    supermask_conv2d,
    supermask_conv2d_backward,
    supermask_gradients,
    supermask_linear,
    supermask_linear_backward,
    supermask_linear_sgd,
    supermask_weight,
)

__all__ = [
    "MAX_DENSITY_LINEAR",
    "MOST_STRIDE",
    "WORDS_PER_CHUNK",
    "binary_linear",
    "binary_weight",
    "bitmap_linear",
    "compact_conv2d",
    "compact_conv2d_backward",
    "compact_linear",
    "compact_linear_backward",
    "conv2d",
    "conv2d_backward",
    "csr_linear",
    "delta_linear",
    "drawn",
    "drawn_signs",
    "effective_weight",
    "gather_kept",
    "keep_top",
    "kept_positions",
    "kept_share",
    "kept_weight",
    "kernels_take",
    "linear",
    "linear_backward",
    "mask_as_bool",
    "masked_conv2d",
    "masked_conv2d_backward",
    "masked_linear",
    "masked_linear_backward",
    "max_density",
    "may_lag",
    "pack_mask",
    "philox",
    "random_normal",
    "random_signs",
    "random_uniform",
    "random_words",
    "rescaling",
    "sample_bits",
    "sample_mask",
    "scatter_kept_",
    "seeded_linear",
    "seeded_weight",
    "source",
    "spread_kept",
    "supermask_conv2d",
    "supermask_conv2d_backward",
    "supermask_gradients",
    "supermask_linear",
    "supermask_linear_backward",
    "supermask_linear_sgd",
    "supermask_weight",
    "ternary_linear",
    "unpack_mask",
    "words_per_row",
]
