"""masked_conv2d as products of matrices, with no unfolded image in memory.

Every tile of pixels reads the whole weight, a thousand tiles at 256 images of 32 x 32. So mask and
frozen values are applied once, by a kernel that lays the weight out tap by tap, channels side by
side as in an image that is channels last. Picked from the rows as they lie, entries of a tap would
be loads of one number each, again for every tile.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.masked.arguments import Geometry, MaskedArgs
from lottery_sparse.ops.triton import limits
from lottery_sparse.ops.triton.conv_products import (
    conv_arrange,
    conv_dw,
    conv_dw_finish,
    conv_product,
)
from lottery_sparse.ops.triton.conv_tiles import (
    LONGEST,
    WIDEST,
    alignment,
    by_channels,
    depth_of,
    is_channels_last,
    output_shape,
    pixel_tile,
    strides,
)
from lottery_sparse.ops.triton.tiles import Parts, precision, source, tiles


def why_not(a: MaskedArgs, dy: Tensor | None = None, *needs: bool) -> str | None:
    why = limits.why_not((*a, dy))
    if why is not None:
        return why
    x, weight, groups = a.x, a.weight, a.geometry.groups
    shape = output_shape(x, weight, a.geometry)
    area, taps = shape[-2] * shape[-1], weight.shape[-2:].numel()
    remainders = math.prod(a.geometry.stride)
    if min(shape[-2:]) < 1:
        return f"the kernel is larger than the padded image, which leaves {shape[-2:]} pixels."
    longest = max(*shape[-2:], *x.shape[-2:])
    if longest > LONGEST:
        return f"its kernels take images of up to {LONGEST} rows and columns, got {longest}."
    pixels = x.shape[-4] * max(area, x.shape[-2:].numel())
    if pixels > 2**30:
        return f"its kernels take up to 2**30 pixels in all, got {pixels}."
    reach = 2 + WIDEST // max(min(area, x.shape[-2:].numel() // remainders), 1)
    images = (x,) if dy is None else (x, dy)
    largest = max(_extent(t) * min(reach, t.shape[-4] + 1) for t in images)
    largest = max(largest, shape[-3] * area * min(reach, shape[-4] + 1))
    largest = max(largest, taps * (shape[-3] // groups + WIDEST) * (weight.shape[-3] + WIDEST))
    if largest > 2**30:
        return "its kernels take images and weights of up to 2**30 numbers in a tile's reach."
    copies = groups * _networks(weight)
    if max(copies, taps, remainders) > limits.MOST_NETWORKS:
        return (
            f"its kernels take up to {limits.MOST_NETWORKS} groups of all networks, places in a "
            f"kernel and places in a stride, got {copies}, {taps} and {remainders}."
        )
    return None


def _extent(images: Tensor) -> int:
    """Numbers from one image to the next, or that one spans."""
    inner = zip(images.shape[-3:], images.stride()[-3:], strict=True)
    return max(images.stride(-4), 1 + sum((n - 1) * s for n, s in inner))


@dispatch.limited(why_not)
def masked_conv2d(a: MaskedArgs) -> Tensor:
    x, weight, groups = a.x, a.weight, a.geometry.groups
    rows, depth = weight.shape[-4] // groups, weight.shape[-3]
    last = weight.dim() == 4 and (is_channels_last(x) or is_channels_last(weight))
    y = torch.empty(
        output_shape(x, weight, a.geometry), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip
    if y.numel() == 0:
        return y
    x = by_channels(x)
    count, networks = y.shape[-4] * y.shape[-2:].numel(), _networks(weight)
    size = pixel_tile(x.dtype, rows, count, networks * groups)
    size["DEPTH"] = depth_of(size["DEPTH"], depth)
    with torch.cuda.device_of(x):
        w = _arranged(a, _up(rows, size["ROWS"]), _up(depth, size["DEPTH"]))
        conv_product[(tiles(rows, count, size), 1, networks * groups)](
            x, w, w if a.bias is None else a.bias.contiguous(), y, rows, depth, count,
            down=y.shape[-2], across=y.shape[-1], skip_h=1, skip_w=1, networks=1,
            w_group=w.stride(0), w_tap=w.stride(1), w_row=w.stride(2), w_depth=1,
            BACK=False, SUM=False, BIAS=a.bias is not None, EDGE=depth % size["DEPTH"] != 0,
            **_geometry(weight, a.geometry), **_images(x, y), y_h=y.shape[-2],
            y_w=y.shape[-1], **_options(rows, depth, size, x.dtype),
        )  # fmt: skip
    return y


@dispatch.limited(why_not)
def masked_conv2d_backward(
    a: MaskedArgs, dy: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    x = a.x
    dx, dw = x.new_empty(0), x.new_empty(0)
    read = by_channels(dy)
    with torch.cuda.device_of(x):
        if need_dx:
            dx = torch.empty_like(x)
            _fill_dx(dx, read, a)
        if need_dw:
            dw = torch.empty_like(a.weight, memory_format=torch.contiguous_format)
            _fill_dw(dw, read, by_channels(x), a)
    return dx, dw


def _fill_dx(dx: Tensor, dy: Tensor, a: MaskedArgs) -> None:
    if dx.numel() == 0:
        return
    weight, (stride, _, dilation, groups) = a.weight, a.geometry
    rows, depth = weight.shape[-3], weight.shape[-4] // groups
    networks = _networks(weight)
    together, outputs = (networks, 1) if dx.dim() == 4 else (1, networks)
    down, across = (triton.cdiv(n, s) for n, s in zip(dx.shape[-2:], stride, strict=True))
    count, remainders = dx.shape[-4] * down * across, stride[0] * stride[1]
    size = pixel_tile(dx.dtype, rows, count, outputs * groups * remainders)
    size["DEPTH"] = depth_of(size["DEPTH"], depth)
    w = _arranged(a, _up(depth, size["DEPTH"]), _up(rows, size["ROWS"]))
    skip_h, skip_w = (s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True))
    conv_product[(tiles(rows, count, size), remainders, outputs * groups)](
        dy, w, w, dx, rows, depth, count,
        down=down, across=across, skip_h=skip_h, skip_w=skip_w, networks=together,
        w_group=w.stride(0), w_tap=w.stride(1), w_row=1, w_depth=w.stride(2),
        BACK=True, SUM=together != 1, BIAS=False, EDGE=depth % size["DEPTH"] != 0,
        **_geometry(weight, a.geometry), **_images(dy, dx),
        y_h=dx.shape[-2], y_w=dx.shape[-1], **_options(rows, depth, size, dx.dtype),
    )  # fmt: skip


def _fill_dw(dw: Tensor, dy: Tensor, x: Tensor, a: MaskedArgs) -> None:
    if dw.numel() == 0:
        return
    mask, groups = a.mask, a.geometry.groups
    rows, channels = dw.shape[-4] // groups, dw.shape[-3]
    taps, held, copies = dw.shape[-2:].numel(), _up(channels, 16), _networks(dw) * groups
    count = dy.shape[-4] * dy.shape[-2:].numel()
    size = pixel_tile(x.dtype, rows, taps * held, copies * max(count // 256, 1))
    steps = triton.cdiv(count, size["DEPTH"])
    parts = Parts.of(rows, taps * held, steps, copies, size)
    workspace = x.new_empty((parts.grid[1], copies * rows, taps, held), dtype=torch.float32)
    conv_dw[parts.grid](
        dy, x, workspace, rows, channels, held, count, down=dy.shape[-2], across=dy.shape[-1],
        steps=parts.steps, part=workspace[0].numel(),
        **_geometry(dw, a.geometry), **_images(x, dy),
        **_options(rows, channels, size, x.dtype),
    )  # fmt: skip
    grid = triton.cdiv(copies * rows, 8) * triton.cdiv(channels, 32), taps
    conv_dw_finish[grid](
        workspace, _bytes(mask), dw, parts.grid[1], workspace[0].numel(), copies * rows,
        channels, held, taps, _mask_stride(mask, channels * taps),
        PARTS=8, ROWS=8, CHANNELS=32, PACKED=mask.dtype == torch.int32,
    )  # fmt: skip


def _arranged(a: MaskedArgs, rows_held: int, channels_held: int) -> Tensor:
    """The effective weight as [E groups, taps, rows held, channels held]."""
    weight, mask, frozen, signs, groups = a.weight, a.mask, a.frozen, a.signs, a.geometry.groups
    copies, rows = _networks(weight) * groups, weight.shape[-4] // groups
    channels, taps = weight.shape[-3], weight.shape[-2:].numel()
    out = weight.new_empty((copies, taps, rows_held, channels_held))
    weight = weight.contiguous()
    conv_arrange[(triton.cdiv(rows_held, 64) * triton.cdiv(channels_held, 32), taps, copies)](
        weight, _bytes(mask), weight if frozen is None else frozen.contiguous(),
        weight if signs is None else signs.contiguous(), out,
        rows, channels, rows_held, channels_held, taps, groups,
        _mask_stride(mask, channels * taps),
        0 if signs is None else signs.shape[-1],
        PACKED=mask.dtype == torch.int32, FROZEN=source(frozen, signs),
        ROWS=64, CHANNELS=32,
    )  # fmt: skip
    return out


def _geometry(weight: Tensor, geometry: Geometry) -> dict[str, int]:
    stride, padding, dilation, groups = geometry
    pairs = {"taps": weight.shape[-2:], "stride": stride, "pad": padding, "dilation": dilation}
    by_axis = {
        f"{name}_{axis}": n
        for name, two in pairs.items()
        for axis, n in zip("hw", two, strict=True)
    }
    return by_axis | {"groups": groups}


def _images(x: Tensor, y: Tensor) -> dict[str, int]:
    """What kernels are told of the images that they call x and y."""
    return {
        **strides("x", x),
        **strides("y", y),
        "x_h": x.shape[-2],
        "x_w": x.shape[-1],
        "X_BY": alignment(x),
        "Y_BY": alignment(y),
    }


def _options(rows: int, depth: int, size: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
    by = {"ROWS_BY": math.gcd(rows, 16), "DEPTH_BY": math.gcd(depth, 16)}
    return {**by, **precision(dtype, conv=True), **size}


def _networks(weight: Tensor) -> int:
    return weight.shape[0] if weight.dim() == 5 else 1


def _up(number: int, by: int) -> int:
    return -(-number // by) * by


def _mask_stride(mask: Tensor, columns: int) -> int:
    return mask.shape[-1] if mask.dtype == torch.int32 else columns


def _bytes(mask: Tensor) -> Tensor:
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask
