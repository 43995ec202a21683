"""Limits that ops, layers and kernels share: densities, strides, and how dense products round."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Up to these densities the CPU kernels, which skip zeros, beat the dense product:
# benchmarks/results/cpu.md.
MAX_DENSITY_LINEAR, MAX_DENSITY_CONV, MAX_DENSITY_CONV_1X1 = 0.45, 0.4, 0.2

# They take convolutions up to this product of strides: kMaxPhases of csrc/conv2d/sparse_conv2d.h.
MOST_STRIDE = 128


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
    kernels = effective.is_cpu and effective.dtype == torch.float32 and kernels_take(stride)
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
