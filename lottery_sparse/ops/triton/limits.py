"""What the Triton kernels take: devices, dtypes, sizes."""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops.limits import GPU_DTYPES
from lottery_sparse.ops.triton.tiles import interpreted

OLDEST = 8, 0  # compute capability that Triton supports
# Offsets within a tile, of up to 256 rows, are 32 bits: most rows and columns of a matrix.
LARGEST = 2**22
# Numbers that kernels count in 32 bits, and the vectors that they count them by.
LONGEST = 2**31 - 2**16
MOST_NETWORKS = 2**16 - 1  # that dimension of a grid


def why_not_dtypes(*args: Any) -> str | None:
    """Why kernels cannot run with arguments of these dtypes; None if they can."""
    floating = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
    if not floating <= set(GPU_DTYPES):
        return f"its kernels run float32, float16 and bfloat16, got {min(map(str, floating))}."
    return None


def sizes_of(*matrices: Tensor | None) -> Iterator[int]:
    """The rows and columns of the matrices that there are."""
    return (n for t in matrices if t is not None for n in t.shape[-2:])


def why_not(
    args: Iterable[Any], sizes: Iterable[int] = (), networks: int = 1, longest: int = 0
) -> str | None:
    """Why kernels cannot run with these arguments, in a sentence; None if they can.

    Args:
        args: the arguments, for `why_not_dtypes`.
        sizes: rows and columns of the matrices that they read by tiles.
        networks: how many are side by side.
        longest: the most numbers that they count in 32 bits.
    """
    why = why_not_dtypes(*args)
    if why is not None:
        return why
    largest = max(sizes, default=0)
    if largest > LARGEST:
        return f"its kernels take matrices of up to {LARGEST} rows and columns, got {largest}."
    if networks > MOST_NETWORKS:
        return f"its kernels take up to {MOST_NETWORKS} networks side by side, got {networks}."
    if longest > LONGEST:
        return f"its kernels count up to {LONGEST} numbers of a row or network, got {longest}."
    return None


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
