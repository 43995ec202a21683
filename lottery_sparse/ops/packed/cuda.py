"""Products with packed weights for the backend "cuda".

They are for few rows of x, where a product takes as long as reading its weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.limits import BY_ROWS, GPU_DTYPES, MOST_PLACES
from lottery_sparse.ops.packed import formats
from lottery_sparse.ops.packed.arguments import BitmapArgs, CsrArgs, TernaryArgs

_ops = torch.ops.lottery_sparse_cuda

MOST_ROWS = 16  # kCudaBatch
MOST_FLOAT_ROWS = MOST_ROWS // 3  # of float32 in a launch
SHARED = 163 << 10  # bytes of shared memory of a block on sm_80


def why_not(a: TernaryArgs | CsrArgs | BitmapArgs, scale: Tensor | None = None) -> str | None:
    if a.x.dtype not in GPU_DTYPES:
        return f"its kernels take x as float32, float16 or bfloat16, got {a.x.dtype}."
    if a.x.shape[0] > MOST_ROWS:
        return f"its kernels take up to {MOST_ROWS} rows of x, got {a.x.shape[0]}."
    for name, tensor in (("scale", scale), ("bias", a.bias)):
        if tensor is not None and tensor.dtype not in GPU_DTYPES:
            return f"its kernels take {name} as float32, float16 or bfloat16, got {tensor.dtype}."
    return None


def _why_not_ternary(a: TernaryArgs) -> str | None:
    return why_not(a, a.scale)


def _why_not_kept(a: CsrArgs | BitmapArgs) -> str | None:
    wanted = torch.bfloat16 if a.x.dtype == torch.float32 else a.x.dtype
    why = why_not(a)
    if why is None and a.values.dtype != wanted:
        return (
            "its kernels take values in the dtype of x, and bfloat16 ones for float32 x, got "
            f"{a.values.dtype} and {a.x.dtype}."
        )
    return why


@dispatch.limited(_why_not_ternary)
def ternary_linear(a: TernaryArgs) -> Tensor:
    def product(x: Tensor) -> Tensor:
        return _ops.ternary_linear(x, a.codes, a.scale, a.bias, a.rows, a.int8)

    return _rows_of(a.x, product, a.int8)


@dispatch.limited(_why_not_kept)
def csr_linear(a: CsrArgs) -> Tensor:
    if _by_rows(a):
        return _ops.csr_linear(*a)
    return _tiled("csr", a, a.columns)


@dispatch.limited(_why_not_kept)
def bitmap_linear(a: BitmapArgs) -> Tensor:
    return _tiled("bitmap", a, a.bits)


def _rows_of(x: Tensor, product: Callable[[Tensor], Tensor], int8: bool = False) -> Tensor:
    """The product, of a float32 x a few rows at a time: each is three rows of a kernel's."""
    if x.dtype != torch.float32 or int8 or len(x) <= MOST_FLOAT_ROWS:
        return product(x)
    return torch.cat([product(rows) for rows in x.split(MOST_FLOAT_ROWS)])


def _by_rows(a: CsrArgs) -> bool:
    """Whether the entries are read as they are, see BY_ROWS."""
    x, values, columns = a.x, a.values, a.columns
    for rows, density, blocks in BY_ROWS:
        if x.shape[0] <= rows:
            return (
                columns.dtype == torch.int16
                and x.dtype != torch.float32
                and x.shape[1] * rows * x.element_size() <= _shared(x.device) // blocks - 1024
                and len(values) <= density * a.rows * x.shape[1]
                and values.data_ptr() % 16 == columns.data_ptr() % 16 == 0
            )
    return False


@functools.cache
def _shared(device: torch.device) -> int:
    if device.type != "cuda":  # emulated
        return SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _tiled(format: str, a: CsrArgs | BitmapArgs, where: Tensor) -> Tensor:
    """The product on the tiles of a weight, which the first call makes and keeps.

    They live as long as `values`, and are made anew when it or `where` has been written to.
    """
    x, values, starts = a.x, a.values, a.starts
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
    return _rows_of(x, lambda x: _ops.tiles_linear(x, begins, data, a.bias, a.rows, bitmap))


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
