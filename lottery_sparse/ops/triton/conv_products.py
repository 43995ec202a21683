"""The kernels of masked_conv2d: its weight laid out anew, products, and the sum of dw's parts.

A product has the output channels of a group as rows and the pixels of all images as columns; its
depth runs over taps (places in the kernel) and channels. Numbers named `_h` count rows of an image,
those named `_w` columns. Offsets within a tile are 32 bits, see conv_tiles.refuses.
"""
# pyright: reportArgumentType=false
# ... since a call takes plain numbers for constexpr

from __future__ import annotations

import triton
import triton.language as tl

from lottery_sparse.ops.triton.sources import load_constant
from lottery_sparse.ops.triton.tiles import aligned, dot, in_order, load_effective, load_mask


@triton.jit
def within(position, size):
    """0 <= position < size, in one comparison."""
    return position.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def over(number, reciprocal):
    """number // d, for a reciprocal of (2^32 - 1) // d and 0 <= number < 2^32 / d - 1."""
    return tl.umulhi((number + 1).to(tl.uint32), reciprocal).to(tl.int32)


@triton.jit
def first_tap(offset, taps, dilation, stride):
    """The first r < taps for which `stride` divides offset - r * dilation; taps if none does."""
    first = taps
    for i in range(taps):
        r = taps - 1 - i
        first = tl.where((offset - r * dilation) % stride == 0, r, first)
    return first


@triton.jit(do_not_specialize=["rows", "channels", "rows_held", "channels_held", "taps", "groups"])
def conv_arrange(
    weight, mask, frozen, signs, out,
    rows, channels, rows_held, channels_held, taps, groups, mask_stride, signs_stride,
    PACKED: tl.constexpr, FROZEN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[e g, t, o, c] = where(m, w, f)[e g, o, c, t], and 0 up to the rows and channels held."""
    group = tl.program_id(2).to(tl.int64)
    tap = tl.program_id(1)
    blocks = tl.cdiv(channels_held, CHANNELS)
    o = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    e = group // groups
    constant = load_constant(frozen, e, FROZEN)
    w = load_effective(
        weight, mask, frozen, signs, constant, channels * taps, mask_stride, signs_stride,
        group * rows + o, (c * taps + tap).to(tl.int64), (o < rows) & (c < channels),
        PACKED, FROZEN,
    )  # fmt: skip
    out += (group * taps + tap) * rows_held * channels_held
    held = (o < rows_held) & (c < channels_held)
    tl.store(out + o * channels_held + c, w.to(out.dtype.element_ty), mask=held)


@triton.jit(
    do_not_specialize=[
        "rows", "depth", "count", "down", "across", "x_h", "x_w", "y_h", "y_w", "taps_h", "taps_w",
        "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "skip_h", "skip_w",
        "groups", "networks", "x_network", "x_image", "x_row", "x_column", "y_network", "y_image",
        "y_row", "y_column", "w_group", "w_tap",
    ]
)  # fmt: skip
def conv_product(
    x, weight, bias, y,
    rows, depth, count, down, across, x_h, x_w, y_h, y_w, taps_h, taps_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, skip_h, skip_w, groups, networks,
    x_network, x_image, x_channel, x_row, x_column,
    y_network, y_image, y_channel, y_row, y_column, w_group, w_tap, w_row, w_depth,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr, BACK: tl.constexpr,
    SUM: tl.constexpr, BIAS: tl.constexpr, EDGE: tl.constexpr, ROWS_BY: tl.constexpr,
    DEPTH_BY: tl.constexpr, X_BY: tl.constexpr, Y_BY: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y = the convolution of x with arranged weights [e g, t, row, depth]; BACK: its dx, from dy.

    BACK, x is dy and y is dx. What a pixel of dx adds up depends on its place modulo the stride,
    so programs take those of one remainder, `down` times `across` of them per image, and the taps
    that reach them, every `skip`-th one. SUM: over all `networks`.
    """
    rows, depth = aligned(rows, ROWS_BY), aligned(depth, DEPTH_BY)
    x_network, x_image = aligned(x_network, X_BY), aligned(x_image, X_BY)
    x_row, x_column = aligned(x_row, X_BY), aligned(x_column, X_BY)
    y_network, y_image = aligned(y_network, Y_BY), aligned(y_image, Y_BY)
    y_row, y_column = aligned(y_row, Y_BY), aligned(y_column, Y_BY)
    w_group, w_tap = aligned(w_group, 16), aligned(w_tap, 16)
    row_tile, column_tile = in_order(rows, count, ROWS, BATCH)
    n0, m0 = row_tile * ROWS, column_tile * BATCH
    e, group = tl.program_id(2).to(tl.int64) // groups, tl.program_id(2) % groups

    m = m0 + tl.arange(0, BATCH)
    first_image = m0 // (down * across)
    image = m // (down * across) - first_image
    i, j = m // across % down, m % across
    if BACK:
        rest_h, rest_w = tl.program_id(1) // stride_w, tl.program_id(1) % stride_w
        first_r = first_tap(rest_h + pad_h, taps_h, dilation_h, stride_h)
        first_s = first_tap(rest_w + pad_w, taps_w, dilation_w, stride_w)
        below_first = (rest_h + pad_h - first_r * dilation_h) // stride_h
        beside_first = (rest_w + pad_w - first_s * dilation_w) // stride_w
        farther_h = -(skip_h * dilation_h // stride_h)
        farther_w = -(skip_w * dilation_w // stride_w)
        top, left = i, j
        out_h, out_w = rest_h + i * stride_h, rest_w + j * stride_w
    else:
        first_r, first_s, below_first, beside_first = 0, 0, 0, 0
        farther_h, farther_w = dilation_h, dilation_w
        top, left = i * stride_h - pad_h, j * stride_w - pad_w
        out_h, out_w = i, j
    origin = image * x_image + top * x_row + left * x_column
    top = tl.where(m < count, top, -(2**30))  # so that no tap of it is within the image
    x += first_image.to(tl.int64) * x_image + group * depth * x_channel

    n, d = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    weight += n0 * w_row
    tile = n[:, None] * w_row + d[None, :] * w_depth
    taps = tl.cdiv(taps_h - first_r, skip_h) * tl.cdiv(taps_w - first_s, skip_w)
    steps = taps * tl.cdiv(depth, DEPTH) * (networks if SUM else 1)
    d0, r, s, below, beside = 0, first_r, first_s, below_first, beside_first
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for _ in range(steps):
        inside = within(top + below, x_h) & within(left + beside, x_w)
        some = inside[None, :] & (d < depth - d0)[:, None] if EDGE else inside[None, :]
        at = x + e * x_network + (below * x_row + beside * x_column + d0 * x_channel)
        at += origin[None, :] + (d * x_channel)[:, None]
        pixels = tl.load(at, mask=some, other=0.0, cache_modifier=".ca")
        of_tap = weight + (e * groups + group) * w_group + (r * taps_w + s) * w_tap
        w = tl.load(of_tap + d0 * w_depth + tile)
        sum = dot(w, pixels, sum, PRECISION, WIDEN)
        # taps first: what they read of the image then lies in the nearest cache
        s += skip_w
        beside += farther_w
        next_row = s >= taps_w
        s = tl.where(next_row, first_s, s)
        beside = tl.where(next_row, beside_first, beside)
        r = tl.where(next_row, r + skip_h, r)
        below = tl.where(next_row, below + farther_h, below)
        all_taps = r >= taps_h
        r = tl.where(all_taps, first_r, r)
        below = tl.where(all_taps, below_first, below)
        d0 = tl.where(all_taps, d0 + DEPTH, d0)
        if SUM:
            all_depth = d0 >= depth
            d0 = tl.where(all_depth, 0, d0)
            e = tl.where(all_depth, e + 1, e)
    if BIAS:
        here = (e * groups + group) * rows + n0 + n
        sum += tl.load(bias + here, mask=n < rows - n0, other=0.0).to(tl.float32)[:, None]
    y += e * y_network + first_image.to(tl.int64) * y_image + (group * rows + n0) * y_channel
    to = image * y_image + out_h * y_row + out_w * y_column
    inside = (m < count) & (out_h < y_h) & (out_w < y_w)
    held = (n < rows - n0)[:, None] & inside[None, :]
    tl.store(y + (n * y_channel)[:, None] + to[None, :], sum.to(y.dtype.element_ty), mask=held)


@triton.jit(
    do_not_specialize=[
        "rows", "channels", "channels_held", "count", "down", "across", "x_h", "x_w",
        "taps_h", "taps_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w",
        "groups", "x_network", "x_image", "x_row", "x_column",
        "y_network", "y_image", "y_row", "y_column", "steps", "part",
    ]
)  # fmt: skip
def conv_dw(
    dy, x, out,
    rows, channels, channels_held, count, down, across, x_h, x_w, taps_h, taps_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups,
    x_network, x_image, x_channel, x_row, x_column,
    y_network, y_image, y_channel, y_row, y_column, steps, part,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr, ROWS_BY: tl.constexpr,
    DEPTH_BY: tl.constexpr, X_BY: tl.constexpr, Y_BY: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out[s, e g, o, t, c]: what the pixels of part s add to dw, for all channels held."""
    rows, channels = aligned(rows, ROWS_BY), aligned(channels, DEPTH_BY)
    channels_held = aligned(channels_held, 16)
    x_network, x_image = aligned(x_network, X_BY), aligned(x_image, X_BY)
    x_row, x_column = aligned(x_row, X_BY), aligned(x_column, X_BY)
    y_network, y_image = aligned(y_network, Y_BY), aligned(y_image, Y_BY)
    y_row, y_column = aligned(y_row, Y_BY), aligned(y_column, Y_BY)
    columns = taps_h * taps_w * channels_held
    row_tile, column_tile = in_order(rows, columns, ROWS, BATCH)
    n0, k0 = row_tile * ROWS, column_tile * BATCH
    e, group = tl.program_id(2).to(tl.int64) // groups, tl.program_id(2) % groups
    dy += e * y_network + (group * rows + n0) * y_channel
    x += e * x_network + group * channels * x_channel

    n, k = tl.arange(0, ROWS), k0 + tl.arange(0, BATCH)
    tap, c = k // channels_held, k % channels_held
    below, beside = tap // taps_w * dilation_h, tap % taps_w * dilation_w
    offset = below * x_row + beside * x_column + c * x_channel
    # a column that is none lies beyond the image
    below = tl.where((k < columns) & (c < channels), below, 2**30)

    # what row and image of a pixel add to its offset, beyond its number times the column's stride
    y_next_row, y_next_image = y_row - across * y_column, y_image - down * y_row
    x_next_row = stride_h * x_row - across * (stride_w * x_column)
    x_next_image = x_image - down * (stride_h * x_row)
    x -= pad_h * x_row + pad_w * x_column
    area = down * across
    most = tl.full((), 0xFFFFFFFF, tl.uint32)
    per_row, per_column = most // across.to(tl.uint32), most // down.to(tl.uint32)
    b = tl.arange(0, DEPTH)
    first = tl.program_id(1) * steps * DEPTH
    last = tl.minimum(first + steps * DEPTH, count)
    sum = tl.zeros((ROWS, BATCH), tl.float32)
    for m0 in range(first, last, DEPTH):
        first_image = m0 // area
        m = m0 - first_image * area + b
        row = over(m, per_row)  # of all images, one below the other
        image = over(row, per_column)
        some = b < last - m0
        at = dy + first_image.to(tl.int64) * y_image + (n * y_channel)[:, None]
        at += (m * y_column + row * y_next_row + image * y_next_image)[None, :]
        grads = tl.load(at, mask=(n < rows - n0)[:, None] & some[None, :], other=0.0)
        top = row * stride_h - image * (down * stride_h) - pad_h
        left = m * stride_w - row * (across * stride_w) - pad_w
        origin = m * (stride_w * x_column) + row * x_next_row + image * x_next_image
        inside = within(top[:, None] + below[None, :], x_h) & some[:, None]
        inside &= within(left[:, None] + beside[None, :], x_w)
        at = x + first_image.to(tl.int64) * x_image + origin[:, None] + offset[None, :]
        pixels = tl.load(at, mask=inside, other=0.0, cache_modifier=".ca")
        sum = dot(grads, pixels, sum, PRECISION, WIDEN)
    out += (
        tl.program_id(1).to(tl.int64) * part + (tl.program_id(2).to(tl.int64) * rows + n0) * columns
    )
    held = (n < rows - n0)[:, None] & (k < columns)[None, :]
    tl.store(out + n[:, None] * columns + k[None, :], sum, mask=held)


@triton.jit(do_not_specialize=["count", "part", "rows", "channels", "channels_held", "taps"])
def conv_dw_finish(
    parts, mask, dw, count, part, rows, channels, channels_held, taps, mask_stride,
    PARTS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dw[o, c, t] = the sum over s of parts[s, o, t, c] where kept, else 0."""
    tap = tl.program_id(1)
    blocks = tl.cdiv(channels, CHANNELS)
    o = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    c = (tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = (o < rows) & (c < channels)
    at = (o * taps + tap) * channels_held + c
    s = tl.arange(0, PARTS)[:, None, None]
    sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    for s0 in range(0, count, PARTS):
        some = (s < count - s0) & inside[None, :, :]
        mine = parts + (s0 + s).to(tl.int64) * part + at[None, :, :]
        sum += tl.sum(tl.load(mine, mask=some, other=0.0), 0)
    column = (c * taps + tap).to(tl.int64)
    kept = load_mask(mask, mask_stride, o, column, inside, PACKED)
    to = dw + o * (channels * taps) + column
    tl.store(to, tl.where(kept, sum, 0.0).to(dw.dtype.element_ty), mask=inside)
