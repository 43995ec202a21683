"""The processor, libraries and kernels of this process, for records of how rows were made."""

import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lottery_sparse as ls
from lottery_sparse.ops import dispatch

# What of a processor's flags dense libraries choose their instructions by.
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile", "amx_int8")
# With these a user holds a library back, to fewer instructions or to other sums.
HOLDS = (
    "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE", "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "DNNL_DEFAULT_FPMATH_MODE",
    "ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE",
)  # fmt: skip


@cache
def machine() -> dict[str, Any]:
    """Of this process: it does not change while it runs. Unknown is None."""
    host = kernel_library()
    return {
        "cpu": cpu_model(),
        "cpu_flags": [flag for flag in FLAGS if flag in _cpu_fields().get("flags", "").split()],
        "os": platform.platform(),
        "kernels": {
            "variant": host and host.cpu_variant(),
            "numerics": numerics(),
            "compiler": host and host.build_info()["compiler"],
        },
        "blas": blas(),
    }


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "lottery_sparse": ls.__version__,
    }


def cpu_model() -> str:
    """Its name, and family and model: machines that are lent may have one name for several."""
    fields = _cpu_fields()
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    numbers = "family {cpu family}, model {model}, stepping {stepping}"
    return f"{fields['model name']} ({numbers})".format_map(_Unknown(fields))


class _Unknown(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "unknown"


@cache
def _cpu_fields() -> dict[str, str]:
    """Of the first processor, as Linux tells them; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def blas() -> dict[str, Any]:
    """The dense libraries of torch, and what is known of the instructions that they use.

    `isa` is that of torch's own loops, which torch tells. MKL and oneDNN tell theirs only on their
    verbose output: they choose by the processor (`cpu`, `cpu_flags`), held back by `held`.
    """
    try:
        text = torch.__config__.show()
    except RuntimeError:  # a CUDA device without torch's CUDA library
        text = ""

    def found(pattern: str) -> str | None:
        match = re.search(pattern, text)
        return match and match[1]

    return {
        "library": found(r"BLAS_INFO=(\w+)"),
        "mkl": found(r"Math Kernel Library Version ([\d.]+)"),
        "onednn": found(r"(?:MKL-DNN|oneDNN) (v\S+)"),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "held": {name: value for name in HOLDS if (value := os.environ.get(name))},
    }


def kernel_library() -> Any:
    """The module that knows how the CPU kernels were built; None where it is not here."""
    try:
        from lottery_sparse import _host  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return None
    return _host


def numerics() -> int:
    """`backends.numerics` of this process.

    Raises:
        ValueError: LS_CPU names a variant that does not run here.
    """
    try:
        return dispatch.numerics()
    except RuntimeError as error:
        raise ValueError(str(error)) from None
