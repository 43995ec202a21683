"""The CUDA C++ kernels as the backend "cuda": the functions of `reference`, same signatures.

Those of packed weights are for few rows of x, where a product takes as long as reading its weight;
those of training are in ops/compact and ops/steps. Importing this module loads
lottery_sparse._C_cuda; ImportError means that it is not built. Its rules are those of all ops.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import lottery_sparse._C_cuda as _built  # pyright: ignore[reportMissingImports]
from lottery_sparse.ops.compact import cuda as compact_cuda
from lottery_sparse.ops.packed import formats

_ops = torch.ops.lottery_sparse_cuda

MOST_ROWS = 16  # kCudaBatch
MOST_FLOAT_ROWS = MOST_ROWS // 3  # of float32 in a launch
_SCALARS = (torch.float32, torch.float16, torch.bfloat16)  # of x, scale and bias
# A weight by rows needs no tiles where it is sparse enough and x fits in shared memory: (most rows
# of x, they are padded to these; most density; blocks that share a multiprocessor's memory).
BY_ROWS = ((1, 0.12, 2), (2, 0.12, 2), (4, 0.12, 2), (8, 0.08, 1))
SHARED = 163 << 10  # bytes of shared memory of a block on sm_80
# Up to this density, tiles with places are fewer bytes and instructions than bitmap tiles.
MOST_PLACES = 0.24


def ternary_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, rows: int, int8: bool
) -> Tensor:
    return _rows_of(x, lambda x: _ops.ternary_linear(x, codes, scale, bias, rows, int8), int8)


def csr_linear(
    x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None
) -> Tensor:
    return (
        _ops.csr_linear(x, values, starts, columns, bias)
        if _by_rows(x, values, starts, columns)
        else _tiled("csr", x, values, starts, columns, bias)
    )


def bitmap_linear(
    x: Tensor, values: Tensor, starts: Tensor, bits: Tensor, bias: Tensor | None
) -> Tensor:
    return _tiled("bitmap", x, values, starts, bits, bias)


def _rows_of(x: Tensor, product: Callable[[Tensor], Tensor], int8: bool = False) -> Tensor:
    """The product, of a float32 x a few rows at a time: each is three rows of a kernel's."""
    if x.dtype != torch.float32 or int8 or len(x) <= MOST_FLOAT_ROWS:
        return product(x)
    return torch.cat([product(rows) for rows in x.split(MOST_FLOAT_ROWS)])


def _by_rows(x: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> bool:
    """Whether the entries are read as they are, see BY_ROWS."""
    for rows, density, blocks in BY_ROWS:
        if x.shape[0] <= rows:
            return (
                columns.dtype == torch.int16
                and x.dtype != torch.float32
                and x.shape[1] * rows * x.element_size() <= _shared(x.device) // blocks - 1024
                and len(values) <= density * (len(starts) - 1) * x.shape[1]
                and values.data_ptr() % 16 == columns.data_ptr() % 16 == 0
            )
    return False


@functools.cache
def _shared(device: torch.device) -> int:
    if device.type != "cuda":  # emulated
        return SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _tiled(
    format: str, x: Tensor, values: Tensor, starts: Tensor, where: Tensor, bias: Tensor | None
) -> Tensor:
    """The product on the tiles of a weight, which the first call makes and keeps.

    They live as long as `values`, and are made anew when it or `where` has been written to.
    """
    state = (x.shape[1], len(starts), where.data_ptr(), _version(values), _version(where))
    found = _tiles.get(values)
    if found is None or found[0] != state:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "this weight has no tiles yet, and a CUDA graph is being captured; call the layer "
                "once before, as warm-up."
            )
        found = _tiles[values] = state, tiles_of(format, values, starts, where, x.shape[1])
    begins, data, bitmap = found[1]
    rows = len(starts) - 1
    return _rows_of(x, lambda x: _ops.tiles_linear(x, begins, data, bias, rows, bitmap))


_tiles: MutableMapping[Tensor, Any] = WeakTensorKeyDictionary()


def tiles_of(
    format: str, values: Tensor, starts: Tensor, where: Tensor, in_features: int
) -> tuple[Tensor, Tensor, bool]:
    """A weight by rows, "csr" or "bitmap", as tiles: (starts, data, whether bitmap)."""
    shape = (len(starts) - 1, in_features)
    rows = torch.repeat_interleave(starts.diff())
    if format == "csr":
        columns = where.to(torch.int64) & (0xFFFF if where.dtype == torch.int16 else -1)
    else:
        bit = torch.arange(32, device=where.device, dtype=torch.int32)
        columns = ((where.unsqueeze(-1) >> bit & 1).flatten(1)).nonzero()[:, 1]
    bitmap = len(values) > MOST_PLACES * shape[0] * shape[1]
    pack = formats.pack_bitmap_tiles if bitmap else formats.pack_tiles
    return *pack(values, rows, columns, shape), bitmap


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def refuses(op: str, *args: Any) -> str | None:
    """Why `op` cannot run here with these arguments, in a sentence; None if it can."""
    if op in ("pack_mask", "unpack_mask"):
        return _refuses_device_of(args[0])
    if op in compact_cuda.OPS:
        return compact_cuda.refuses(op, *args) or _refuses_device_of(args[0])
    x = args[0]
    if x.dtype not in _SCALARS:
        return f"its kernels take x as float32, float16 or bfloat16, got {x.dtype}."
    if x.shape[0] > MOST_ROWS:
        return f"its kernels take up to {MOST_ROWS} rows of x, got {x.shape[0]}."
    if op == "ternary_linear":
        _, _, scale, bias, _, _ = args
        others = {"scale": scale, "bias": bias}
    else:
        _, values, _, _, bias = args
        if values.dtype != (torch.bfloat16 if x.dtype == torch.float32 else x.dtype):
            return (
                "its kernels take values in the dtype of x, and bfloat16 ones for float32 x, got "
                f"{values.dtype} and {x.dtype}."
            )
        others = {"bias": bias}
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype not in _SCALARS:
            return f"its kernels take {name} as float32, float16 or bfloat16, got {tensor.dtype}."
    return _refuses_device_of(x)


def _refuses_device_of(x: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"its kernels run on CUDA devices, got {x.device}."
    return None


def wins(op: str, *args: Any) -> bool:
    """Whether this backend is the faster one for a call that it does not refuse."""
    return True


@functools.cache
def fails_on(device: torch.device) -> str | None:
    """Why no kernel runs on this GPU, in a sentence: its architecture, or the driver."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here, or none with a driver that it can use."
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(_built.architectures, capability):
        return (
            f"it is built for compute capabilities {_built.architectures}, and {device} has "
            f"{capability[0]}.{capability[1]}; set TORCH_CUDA_ARCH_LIST and build again."
        )
    # of one major version, code runs on older drivers, too; what PTX needs, a launch says itself
    driver = torch._C._cuda_getDriverVersion()  # pyright: ignore[reportAttributeAccessIssue]
    if driver // 1000 < _built.toolkit // 1000:
        return (
            f"it is built with CUDA {_version_text(_built.toolkit)}, and the driver is for CUDA "
            f"{_version_text(driver)}; update the driver, or build again with an older toolkit."
        )
    return None


def _version_text(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


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
        elif (built[0] == capability[0] and built <= capability) or (
            found[4] and built <= capability
        ):
            return True
    return False
