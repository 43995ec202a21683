"""The CUDA kernels, built for the host and run thread by thread: see emulate_cuda.h."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(__file__).resolve().parent
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Werror", "-fPIC", "-ffp-contract=off"]
FLAGS += ['-DLS_MACHINE="emulate_cuda.h"']  # see csrc/common/cuda_kernel.h
NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SHARED = 163 << 10  # bytes of a block, as sm_80 has them


class Linear(ctypes.Structure):  # CudaLinear of csrc/packed/cuda_linear.h
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("type", ctypes.c_int),
        ("bias_type", ctypes.c_int),
        ("splits", ctypes.c_int64),
        ("y_type", ctypes.c_int),
        ("parts", ctypes.c_int),
        ("x_scale", ctypes.c_void_p),
    ]


class Scale(ctypes.Structure):  # CudaScale
    _fields_ = [
        ("scale", ctypes.c_void_p),
        ("type", ctypes.c_int),
        ("by_row", ctypes.c_bool),
        ("factor", ctypes.c_float),
    ]


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    return found or pytest.skip("no C++ compiler for the emulated kernels")


@functools.cache
def library() -> ctypes.CDLL:
    """Built into build/, once for each state of the sources."""
    csrc = ROOT / "csrc"
    kernels = sorted(csrc.rglob("*_cuda.cu"))
    sources = [*sorted(HOST.glob("emulate_cuda*.cpp")), *kernels]
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted([*sources, *csrc.rglob("*.h"), *HOST.glob("*.h")]):
        digest.update(path.read_bytes())
    built = ROOT / "build" / "emulated" / f"{digest.hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        ours = built.with_suffix(f".{os.getpid()}")
        options = [*FLAGS, f"-I{csrc}", f"-I{HOST}", "-shared", "-x", "c++"]
        command = [*compiler().split(), *options, *sources, "-o", ours]
        done = subprocess.run([str(part) for part in command], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        ours.replace(built)
    loaded = ctypes.CDLL(str(built))
    loaded.ls_ternary_splits.restype = ctypes.c_int64
    loaded.ls_ternary_splits.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    loaded.ls_emulate_rows.restype = ctypes.c_char_p
    loaded.ls_emulate_readable.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.ls_tiles_splits.restype = ctypes.c_int64
    sizes = [ctypes.c_bool, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    loaded.ls_tiles_splits.argtypes = sizes
    loaded.ls_emulate_tiles.restype = ctypes.c_char_p
    loaded.ls_csr_fits.restype = ctypes.c_bool
    loaded.ls_csr_fits.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    loaded.ls_emulate_csr.restype = ctypes.c_char_p
    loaded.ls_emulate_ternary.restype = ctypes.c_char_p
    for name in ("pack", "linear", "dvalues"):
        getattr(loaded, f"ls_emulate_compact_{name}").restype = ctypes.c_char_p
    for name in ("scatter_kept", "sgd_step", "adam_step", "count_steps", "mask_bits"):
        getattr(loaded, f"ls_emulate_{name}").restype = ctypes.c_char_p
    return loaded


@pytest.fixture(params=[False, True], ids=["first lanes first", "last lanes first"])
def thread_order(request):
    """Both orders of the threads between barriers: a barrier that is missing shows in one."""
    library().ls_emulate_descending(ctypes.c_bool(request.param))
    yield
    library().ls_emulate_descending(ctypes.c_bool(False))


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def linear(
    x: Tensor, rows: int, bias: Tensor | None, splits: Callable[[int], int], int8: bool = False
) -> tuple[Linear, Tensor, tuple]:
    """The struct of a product, y filled with NaN, and what else its pointers point to.

    x of float32, or int8, is made rows of 16 bits, as bindings_cuda_packed.cpp does.
    """
    y = torch.full((len(x), rows), torch.nan, dtype=x.dtype)
    parts, made, scale = 1, x, None
    if x.dtype == torch.float32 or int8:
        parts = 1 if int8 else 3
        made = torch.full((parts * len(x), x.shape[1]), torch.nan, dtype=torch.bfloat16)
        scale = torch.full((len(x),), torch.nan) if int8 else None
        fault = library().ls_emulate_rows(
            ctypes.c_void_p(x.data_ptr()), NUMBERS[x.dtype], ctypes.c_int64(len(x)),
            ctypes.c_int64(x.shape[1]), ctypes.c_void_p(made.data_ptr()),
            ctypes.c_void_p(pointer(scale)),
        )  # fmt: skip
        assert fault is None, fault.decode()
    count = splits(len(made))
    partial = torch.full((count, len(x), rows), torch.nan) if count > 1 else None
    struct = Linear(
        len(x), x.shape[1], rows, pointer(made), pointer(bias), pointer(y), pointer(partial),
        NUMBERS[made.dtype], NUMBERS[torch.float32 if bias is None else bias.dtype], count,
        NUMBERS[y.dtype], parts, pointer(scale),
    )  # fmt: skip
    return struct, y, (made, scale, partial)


def readable(*weights: Tensor) -> None:
    """Kernels may stream these, and nothing else."""
    library().ls_emulate_readable(None, 0)
    for weight in weights:
        library().ls_emulate_readable(weight.data_ptr(), weight.numel() * weight.element_size())


def ternary_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: int,
    int8: bool = False,
    processors: int = 2,
    shared: int = SHARED,
) -> Tensor:
    struct, y, _held = linear(
        x, rows, bias, lambda n: library().ls_ternary_splits(n, x.shape[1], shared), int8
    )
    readable(codes)
    by_row = Scale(pointer(scale), NUMBERS[scale.dtype], scale.numel() > 1, 0.0)
    fault = library().ls_emulate_ternary(
        ctypes.byref(struct), ctypes.byref(by_row), ctypes.c_void_p(codes.data_ptr()),
        processors, shared,
    )  # fmt: skip
    assert fault is None, fault.decode()
    return y


def tiles_linear(
    bitmap: bool,
    x: Tensor,
    starts: Tensor,
    data: Tensor,
    bias: Tensor | None,
    rows: int,
    processors: int = 2,
    shared: int = SHARED,
) -> Tensor:
    struct, y, _held = linear(
        x, rows, bias, lambda n: library().ls_tiles_splits(bitmap, n, x.shape[1], shared)
    )
    readable(data)
    fault = library().ls_emulate_tiles(
        ctypes.c_bool(bitmap), ctypes.byref(struct), ctypes.c_void_p(starts.data_ptr()),
        ctypes.c_void_p(data.data_ptr()), processors, shared,
    )  # fmt: skip
    assert fault is None, fault.decode()
    return y


def csr_linear(
    x: Tensor,
    values: Tensor,
    starts: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    processors: int = 2,
    shared: int = SHARED,
) -> Tensor:
    struct, y, _ = linear(x, len(starts) - 1, bias, lambda _: 1)
    readable(values, columns)
    assert library().ls_csr_fits(len(x), x.shape[1], shared)
    fault = library().ls_emulate_csr(
        ctypes.byref(struct),
        ctypes.c_void_p(starts.data_ptr()),
        ctypes.c_void_p(columns.data_ptr()),
        ctypes.c_void_p(values.data_ptr()),
        processors,
        shared,
    )
    assert fault is None, fault.decode()
    return y
