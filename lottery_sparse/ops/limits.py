"""The limits of dispatch: the densities and sizes up to which kernels run, and win.

What limits the kernels of one backend alone, such as the rows of a CUDA launch, is in its files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lottery_sparse.measurements import dense_rate

# ---- densities -----------------------------------------------------------------------------------
# The CPU kernels skip zeros. Up to these densities they beat the dense product: measured on Zen 4,
# benchmarks/results/cpu.md, where the dense library multiplies MEASURED_AT times as fast as the
# kernels (planning/rate.py). Where that was found to be otherwise, the densities of float32 scale
# with it. They hold for the whole process, as layers are built by them. Rates that differ by less
# than NOISE count as one.
MEASURED_AT, NOISE = 2.2, 0.1


def scale_of(rate: float | None) -> float:
    """What the densities are multiplied with where the rate is this one."""
    if rate is None or abs(rate / MEASURED_AT - 1) <= NOISE:
        return 1.0
    return MEASURED_AT / rate


SCALE = scale_of(dense_rate())


def _scaled(*densities: float) -> tuple[float, ...]:
    return tuple(min(1.0, SCALE * density) for density in densities)


# y and dx of compact layers, which have lists of what is kept.
MAX_DENSITY_LINEAR, MAX_DENSITY_CONV, MAX_DENSITY_CONV_1X1 = _scaled(0.45, 0.4, 0.2)
# The same of a linear layer where the kernels are quick, or the dense library is slow. The kernels
# are quick where tiles of CACHED_FEATURES stay in the first-level cache, beside a product's sums
# and results. The library is slow where y reads the weight across its rows: up to
# SMALL_BATCH_DENSE rows of x and SMALL_FEATURES_DENSE features.
(MAX_DENSITY_QUICK,) = _scaled(0.52)
CACHED_FEATURES, SMALL_BATCH_DENSE, SMALL_FEATURES_DENSE = 320, 64, 1024
# dvalues of a compact linear layer.
(MAX_DENSITY_SAMPLED,) = _scaled(0.45)
# A layer's output and the gradient of its input in `ls.train_step`; the gradients of its weights.
MAX_DENSITY_STEP, MAX_DENSITY_STEP_SAMPLED = _scaled(0.45, 0.45)
# Masked layers, which list and gather what is kept in each call: measured at batches 1 to 1000 of
# ten layers. With fewer rows of x than SMALL_BATCH the listing dominates. Up to SMALL_WEIGHT a call
# costs more than the product, and one kernel call is the cheapest.
MAX_DENSITY_MASKED, MAX_DENSITY_MASKED_SMALL_BATCH = _scaled(0.25, 0.15)
SMALL_BATCH, SMALL_WEIGHT = 32, 4096
# Masked and compact layers in bfloat16, on a processor that multiplies it, which makes the dense
# product 2.2 times as fast as in float32: from so many rows of x on, up to this density.
MAX_DENSITY_BFLOAT16 = ((32, 0.18), (8, 0.12), (0, 0.06))
# Compact layers under autocast, from SMALL_BATCH rows of x on.
MAX_DENSITY_AUTOCAST = 0.28
NEVER = 2**62  # more rows than any x has

# GPUs, by bytes and instructions. Up to this share of slots the Triton kernel computes dvalues
# alone; above, dW is the library's, and gathered.
MAX_DENSITY_SAMPLED_TRITON = 0.5
# From this batch on Triton writes a ternary weight out once for the dense library. Only where
# scale · t is exact in the dtype of x, as the contract has it.
LIBRARY_FROM = 1024
# A csr weight is read by rows where it is sparse enough and x fits in shared memory: (most rows of
# x, which is padded to these; most density; blocks that share a multiprocessor's memory). Else it
# is made into tiles, with places up to MOST_PLACES, with bits above.
BY_ROWS = ((1, 0.12, 2), (2, 0.12, 2), (4, 0.12, 2), (8, 0.08, 1))
MOST_PLACES = 0.24

# ---- sizes and dtypes ----------------------------------------------------------------------------

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

# Packed weights: up to these densities a format beats the dense library at every batch from 1 to
# 32, by element size; measured at 4096 x 4096 on one Zen 4 core. Half-precision dense weights are
# half the bytes, and the dense library has twice the products.
MOST_CSR = {4: 0.25, 2: 0.15}
MOST_BITMAP = {4: 0.7, 2: 0.0}
# Smaller weights are in the cache, and a packed call takes 12 µs more than a dense one.
LEAST_CSR, LEAST_BITMAP = 2**16, 2**20


class CompactLimits(NamedTuple):
    """What the C++ node of compact linear layers goes by; csrc/linear/eager_compact.h reads it."""

    product: float = MAX_DENSITY_LINEAR  # densities: of forward and dx,
    quick: float = MAX_DENSITY_QUICK  # of these where the kernels are quick, or dense is slow,
    sampled: float = MAX_DENSITY_SAMPLED  # and of dvalues
    cached_features: float = CACHED_FEATURES
    small_batch: float = SMALL_BATCH_DENSE
    small_features: float = SMALL_FEATURES_DENSE


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
