"""The limits of dispatch: up to which densities and sizes kernels run, and win.

Sizes that only one backend's kernels have (the tiles of Triton, the rows of a CUDA launch) are in
its files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Up to these densities the CPU kernels, which skip zeros, beat the dense product:
# benchmarks/results/cpu.md. A compact layer has lists of what is kept: for its forward and dx, for
# these where the kernels are quick or dense is slow, and for dvalues.
MAX_DENSITY_LINEAR, MAX_DENSITY_CONV, MAX_DENSITY_CONV_1X1 = 0.45, 0.4, 0.2
MAX_DENSITY_QUICK = 0.52
MAX_DENSITY_SAMPLED = 0.45
# A masked layer has none: listing and gathering kept weights wins up to these, at batches 1 to 1000
# of ten layers. With few rows of x the listing dominates.
MAX_DENSITY_MASKED, MAX_DENSITY_MASKED_SMALL_BATCH = 0.25, 0.15
SMALL_BATCH = 32
# Up to this size a call costs more than the product, and one kernel call is the cheapest.
SMALL_WEIGHT = 4096
# bfloat16, masked and compact, on a processor that multiplies it: 2.2 times as fast dense as
# float32. From this many rows of x on, up to this density.
MAX_DENSITY_BFLOAT16 = ((32, 0.18), (8, 0.12), (0, 0.06))
# Up to this share of slots the Triton kernel computes dvalues alone; above, dW is the library's.
MAX_DENSITY_SAMPLED_TRITON = 0.5
NEVER = 2**62  # rows of x
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of Triton and CUDA kernels

# The CPU kernels take convolutions up to this product of strides: kMaxPhases of
# csrc/conv2d/sparse_conv2d.h.
MOST_STRIDE = 128
# They pack images 16 at a time, one line of 16 floats a pixel, and number lines in 32 bits. Beyond
# so many lines, 1 GiB, a few images are not worth it: the dense library makes no such copy.
MOST_LINES = 2**31 - 1
MANY_LINES, FEW_IMAGES = 2**24, 4
# int8 sums of ternary weights hold so many columns: kTernaryMostColumns.
MOST_COLUMNS_INT8 = 2**18


def max_density(effective: Tensor) -> float:
    """The one of the limits above for a weight [N, K], [O, I, kh, kw], or E of them."""
    if effective.dim() <= 3:
        return MAX_DENSITY_LINEAR
    return MAX_DENSITY_CONV_1X1 if effective.shape[-2:] == (1, 1) else MAX_DENSITY_CONV


def may_lag(effective: Tensor, starts: Tensor, zero: bool, stride: Sequence[int] = ()) -> bool:
    """Whether `effective` may lack the newest `values`, since the kernels do not read it.

    `stride` is that of a convolution. Calls that kernels refuse for other reasons, such as the size
    of x, must not read `effective` where this says that it may.
    """
    kernels = effective.is_cpu and effective.dtype == torch.float32
    kernels = kernels and (not stride or kernels_take(stride))
    return zero and kernels and kept_share(starts, effective) <= max_density(effective)


def kernels_take(stride: Sequence[int]) -> bool:
    """Whether the CPU kernels run convolutions of this stride."""
    return math.prod(stride) <= MOST_STRIDE


def kept_share(starts: Tensor, effective: Tensor) -> float:
    """Kept entries per weight, over all networks."""
    last = starts[-1] if starts.dim() == 1 else starts[:, -1].sum()
    return int(last) / max(effective.numel(), 1)


def rounds(x: Tensor) -> bool:
    """Whether the dense library rounds its float32 sums to the dtype of x.

    What is added to such a result is rounded twice. The sum must then be a part of the product.
    """
    return x.dtype.itemsize < 4
