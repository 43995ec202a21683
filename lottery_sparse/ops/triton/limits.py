"""What the Triton kernels take: devices, dtypes, sizes."""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops.triton import conv_tiles
from lottery_sparse.ops.triton.tiles import interpreted

OLDEST = 8, 0  # compute capability that Triton supports
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Offsets within a tile, of up to 256 rows, are 32 bits: most rows and columns of a matrix.
LARGEST = 2**22
# Numbers that kernels count in 32 bits, and the vectors that they count them by.
LONGEST = 2**31 - 2**16
MOST_NETWORKS = 2**16 - 1  # that dimension of a grid
# How many of an op's first arguments are matrices that kernels read by tiles:
_MATRICES = {
    "masked_linear": 2,
    "masked_linear_backward": 3,
    "compact_linear_backward": 2,
    "ternary_linear": 2,
    "supermask_linear": 2,
    "supermask_linear_backward": 3,
}
# The argument that says how many networks there are, and its dimensions if it is one:
_NETWORK = {
    "masked_linear": (1, 2),
    "masked_linear_backward": (2, 2),
    "compact_linear": (1, 1),
    "compact_linear_backward": (2, 1),
    "compact_conv2d": (1, 1),
    "compact_conv2d_backward": (2, 1),
    "scatter_kept_": (1, 1),
    "sample_bits": (0, 2),
    "supermask_linear": (1, 2),
    "supermask_linear_backward": (2, 2),
    "supermask_conv2d": (1, 4),
    "supermask_conv2d_backward": (2, 4),
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
    if op == "ternary_linear":
        largest = max(largest, args[4])
    if largest > LARGEST:
        return f"its kernels take matrices of up to {LARGEST} rows and columns, got {largest}."
    place, rank = _NETWORK.get(op, (0, 0))
    if rank and args[place].dim() > rank and args[place].shape[0] > MOST_NETWORKS:
        return (
            f"its kernels take up to {MOST_NETWORKS} networks side by side, got "
            f"{args[place].shape[0]}."
        )
    longest = _longest(op, args)
    if longest > LONGEST:
        return f"its kernels count up to {LONGEST} numbers of a row or network, got {longest}."
    return None


def wins(op: str, *args: Any) -> bool:
    """Whether this backend is the faster one for a call that it does not refuse."""
    return True


def _longest(op: str, args: tuple) -> int:
    """What the kernels of an op count in 32 bits."""
    if op in ("pack_mask", "sample_bits"):  # columns
        return args[0].shape[-1]
    if op == "unpack_mask":
        return args[1]
    if op in ("csr_linear", "bitmap_linear"):  # values
        return args[1].shape[0]
    if op.startswith("supermask_conv2d"):  # weights
        return args[_NETWORK[op][0]].shape[-4:].numel()
    return 0  # kept weights of a network: `KeptLists` holds no more


@triton.jit
def _touch(out):
    tl.store(out, 1)


@cache
def fails_on(device: torch.device) -> str | None:
    """Why no kernel runs on this GPU, in a sentence: it is too old, or a first launch fails.

    That takes half a second, once in a process, and waits for nothing on the device.
    """
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here, or none with a driver that it can use."
    if torch.cuda.is_current_stream_capturing():
        return None  # a graph takes no trials
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST:
        return (
            f"Triton takes compute capability {OLDEST[0]}.{OLDEST[1]} and newer, and {device} has "
            f"{capability[0]}.{capability[1]}."
        )
    try:
        with torch.cuda.device(device):
            _touch[(1,)](torch.empty(1, dtype=torch.int32, device=device))
    except torch.OutOfMemoryError:
        raise  # which says nothing of kernels
    except Exception as error:  # whatever stands in its way: compiler, driver, cache folder
        return (
            f"a first kernel of Triton {triton.__version__} does not start on {device} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); it needs a C "
            "compiler, a folder for its cache, and a driver as new as its CUDA."
        )
    return None
