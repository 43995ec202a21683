"""Tiles of convolutions: their sizes, and how kernels read and write images.

An image tensor is [B, C, H, W] or [E, B, C, H, W], of any strides. Kernels take these, but 16-bit
numbers are worth reading only eight channels at a time, so `by_channels` lays those out anew.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops.triton import tiles
from lottery_sparse.ops.triton.tiles import precision

# Within a tile offsets are 32 bits, and one may reach over this many pixels.
WIDEST = 256
LONGEST = 1500  # of rows or columns, so that rows * columns^2 < 2^32, see `over`
# Rows (channels), columns (pixels) and depth of tiles, warps, stages; the largest first.
_SIZES: dict[str, tuple[tuple[int, int, int, int, int], ...]] = {
    "half": ((128, 256, 64, 8, 3), (64, 256, 64, 8, 3), (64, 64, 64, 4, 3)),
    "tf32": ((128, 128, 32, 8, 2), (64, 64, 32, 8, 3)),
    "ieee": ((64, 64, 32, 8, 3),),
}


def pixel_tile(dtype: torch.dtype, rows: int, columns: int, copies: int) -> dict[str, int]:
    """The largest tile that is filled to more than half and has a program for each processor."""
    kind = precision(dtype, conv=True)["PRECISION"] if dtype == torch.float32 else "half"
    sizes = [
        {"ROWS": r, "BATCH": b, "DEPTH": d, "num_warps": warps, "num_stages": stages}
        for r, b, d, warps, stages in _SIZES[kind]
    ]
    fitting = (
        s
        for s in sizes
        if s["ROWS"] < 2 * rows
        and s["BATCH"] < 2 * columns
        and tiles.tiles(rows, columns, s) * copies >= tiles.MULTIPROCESSORS
    )
    return next(fitting, sizes[-1])


def depth_of(largest: int, channels: int) -> int:
    """Channels per step: of 16, 32, … `largest`, what divides them, or holds them, or 16."""
    sizes = [size for size in (64, 32, 16) if size <= largest]
    holding = [size for size in sizes if channels <= size]
    return next((size for size in sizes if channels % size == 0), min(holding, default=16))


def output_shape(x: Tensor, weight: Tensor, geometry: Any) -> list[int]:
    """Shape of y: [B, O, H', W'] or [E, B, O, H', W']."""
    stride, padding, dilation, _ = geometry
    sizes = zip(x.shape[-2:], weight.shape[-2:], stride, padding, dilation, strict=True)
    image = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return [*weight.shape[:-4], x.shape[-4], weight.shape[-4], *image]


def strides(name: str, images: Tensor) -> dict[str, int]:
    """Those of `images`, as arguments of a kernel; network 0 = there is one, or all share it."""
    axes = ("network", "image", "channel", "row", "column")
    every = (0, *images.stride()) if images.dim() == 4 else images.stride()
    return {f"{name}_{axis}": n for axis, n in zip(axes, every, strict=True)}


def alignment(images: Tensor) -> int:
    """The largest of 1, 2, … 16 that divides all strides but that of a channel."""
    return math.gcd(*images.stride()[:-3], *images.stride()[-2:], 16)


def is_channels_last(images: Tensor) -> bool:
    last = images.is_contiguous(memory_format=torch.channels_last)
    return last and not images.is_contiguous()


def by_channels(images: Tensor) -> Tensor:
    """As kernels read them: 16-bit numbers with the channels, if many, of a pixel side by side."""
    if images.stride(-3) == 1 or images.shape[-3] < 8 or images.dtype == torch.float32:
        return images
    return images.movedim(-3, -1).contiguous().movedim(-1, -3)
