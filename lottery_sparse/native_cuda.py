"""The CUDA C++ kernels as the backend "cuda": the functions of `reference`, same signatures.

They are for few rows of x, where a product takes as long as reading its weight. Importing this
module loads lottery_sparse._C_cuda; ImportError means that it is not built.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor

import lottery_sparse._C_cuda as _built  # pyright: ignore[reportMissingImports]

_ops = torch.ops.lottery_sparse_cuda

MOST_ROWS = 16  # kCudaBatch
_DTYPES = (torch.float16, torch.bfloat16)
_SCALARS = (*_DTYPES, torch.float32)  # of scale and bias


def ternary_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, rows: int, int8: bool
) -> Tensor:
    return _ops.ternary_linear(x, codes, scale, bias, rows)


def refuses(op: str, *args: Any) -> str | None:
    """Why `op` cannot run here with these arguments, in a sentence; None if it can."""
    x = args[0]
    if x.dtype not in _DTYPES:
        return f"its kernels take x as float16 or bfloat16, got {x.dtype}."
    if x.shape[0] > MOST_ROWS:
        return f"its kernels take up to {MOST_ROWS} rows of x, got {x.shape[0]}."
    if op == "ternary_linear":
        _, _, scale, bias, _, int8 = args
        if int8:
            return "its kernels have no int8 activations."
        others = {"scale": scale, "bias": bias}
    else:
        others = {"values": args[1], "bias": args[4]}
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype not in _SCALARS:
            return f"its kernels take {name} as float32, float16 or bfloat16, got {tensor.dtype}."
    if x.device.type != "cuda":
        return f"its kernels run on CUDA devices, got {x.device}."
    return _refuses_device(x.device.index)


def wins(op: str, *args: Any) -> bool:
    """Whether this backend is the faster one for a call that it does not refuse."""
    return True


@functools.cache
def _refuses_device(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if runs_on(_built.architectures, capability):
        return None
    return (
        f"it is built for compute capabilities {_built.architectures}, and cuda:{index} has "
        f"{capability[0]}.{capability[1]}; set TORCH_CUDA_ARCH_LIST and build again."
    )


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for e.g. "8.0 9.0a 10.0+PTX" runs on a device of this capability.

    Machine code runs on later minor versions, architecture-specific code (9.0a) on its own
    version only, and PTX on whatever is newer.
    """
    for name in architectures.split():
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        assert found is not None, name
        built = int(found[1]), int(found[2])
        if found[3]:
            if capability == built:
                return True
        elif built[0] == capability[0] and built <= capability:
            return True
        elif found[4] and built <= capability:
            return True
    return False
