"""The Triton kernels as the backend "triton": the functions of `reference`, same signatures.

One file per op. They run on CUDA devices, and with TRITON_INTERPRET=1 on the CPU, slowly: that is
how they are tested without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.kernels.masked_linear import masked_linear, masked_linear_backward
from lottery_sparse.kernels.sampling import sample_bits
from lottery_sparse.kernels.supermask import supermask_linear, supermask_linear_backward
from lottery_sparse.kernels.supermask_conv2d import supermask_conv2d, supermask_conv2d_backward

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refuses(op: str, *args: Any) -> str | None:
    """Why `op` cannot run here with these arguments, in a sentence; None if it can."""
    floating = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
    if not floating <= set(_DTYPES):
        return f"its kernels run float32, float16 and bfloat16, got {min(map(str, floating))}."
    return None


def wins(op: str, *args: Any) -> bool:
    """Whether this backend is the faster one for a call that it does not refuse."""
    return True


__all__ = [
    "masked_linear",
    "masked_linear_backward",
    "refuses",
    "sample_bits",
    "supermask_conv2d",
    "supermask_conv2d_backward",
    "supermask_linear",
    "supermask_linear_backward",
    "wins",
]
