"""The tensors of a packed weight, by format: made, read, and checked. See `formats`."""

from __future__ import annotations

import torch
from torch import Tensor

from lottery_sparse import formats, reference
from lottery_sparse.ops import pack_mask

# the tensors of a format, in the order that its op takes them
FORMATS: dict[str, tuple[str, ...]] = {
    "ternary": ("codes", "scale"),
    "binary": ("signs", "scale"),
    "seeded": ("mask", "key", "scale"),
    "csr": ("values", "starts", "columns"),
    "delta": ("values", "starts", "gaps"),
    "bitmap": ("values", "starts", "bits"),
    "dense": ("weight",),
}


def scale_of(weight: Tensor) -> Tensor | None:
    """The one magnitude of all weights but zeros, [1], or of each row, [N]; None if there are more.

    A matrix, or row, of zeros has the magnitude 0.
    """
    magnitude = weight.abs()
    for most in (magnitude.amax().view(1), magnitude.amax(1)):
        if ((magnitude == 0) | (magnitude == most.unsqueeze(1))).all():
            return most
    return None


def packed(weight: Tensor, format: str, key: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a weight [N, K] in a format; ValueError if it cannot hold them."""
    if format == "dense":
        return {"weight": weight.clone()}
    kept = weight != 0
    if format in ("ternary", "binary", "seeded"):
        scale = scale_of(weight) if weight.numel() else weight.new_zeros(1)
        if scale is None:
            raise ValueError(
                f'format "{format}" holds weights of one magnitude (per matrix or per row) and '
                'zeros, but this weight has more; use "csr" or "bitmap".'
            )
        if format == "ternary":
            return {"codes": formats.pack_ternary(weight.sign()), "scale": scale}
        if format == "seeded":
            return {"mask": pack_mask(kept), "key": _drawn(weight, key), "scale": scale}
        if (weight.abs() != scale.unsqueeze(1)).any():
            raise ValueError(
                'format "binary" holds no zeros between weights, but this weight has some; use '
                '"ternary".'
            )
        return {"signs": pack_mask(weight > 0), "scale": scale}
    if format == "bitmap":
        starts = formats.row_starts(kept)
        return {"values": weight[kept], "starts": starts, "bits": pack_mask(kept)}
    pack = formats.pack_delta if format == "delta" else formats.pack_csr
    return dict(zip(FORMATS[format], pack(weight, kept), strict=True))


def _drawn(weight: Tensor, key: Tensor | None) -> Tensor:
    """The key, if it draws the signs of the weight."""
    if key is None or key.dtype != torch.int64 or key.shape != (3,):
        raise ValueError(
            'format "seeded" needs key=ls.random.key(seed, stream, step), int64 [3], got '
            f"{key if key is None else (key.dtype, tuple(key.shape))}."
        )
    other = int((weight.sign() * reference.drawn_signs(key, weight) < 0).sum())
    if other:
        raise ValueError(
            f"key draws other signs than {other} of the weights have; give the key that they were "
            'drawn with, or use "ternary".'
        )
    return key.to(weight.device, copy=True)


def unpacked(format: str, parts: list[Tensor], rows: int, columns: int) -> Tensor:
    """The weight that the tensors of a format are: [rows, columns]."""
    if format == "ternary":
        codes, scale = parts
        return formats.ternary_weight(codes, scale, rows, columns)
    if format == "binary":
        signs, scale = parts
        return reference.binary_weight(signs, scale, columns)
    if format == "seeded":
        mask, key, scale = parts
        return reference.seeded_weight(mask, key, scale, columns)
    if format == "csr":
        values, starts, numbers = parts
        return formats.unpack_csr(values, starts, numbers, columns)
    if format == "delta":
        values, starts, gaps = parts
        numbers = formats.delta_columns(starts, gaps).to(torch.int32)
        return formats.unpack_csr(values, starts, numbers, columns)
    if format == "bitmap":
        values, _, bits = parts
        return formats.unpack_bitmap(values, reference.unpack_mask(bits, columns))
    return parts[0]


def unfit(format: str, tensors: dict[str, Tensor], rows: int, columns: int) -> str | None:
    """Why the tensors of a checkpoint are no weight [rows, columns]; kernels trust them later."""
    if format == "dense":
        fits = tensors["weight"].shape == (rows, columns)
    elif format == "ternary":
        blocks = (-(-rows // formats.BLOCK), -(-columns // formats.BLOCK), formats.BLOCK)
        codes, scale = tensors["codes"], tensors["scale"]
        fits = codes.dtype == torch.int32 and codes.shape == blocks
        fits = fits and scale.shape in ((1,), (rows,))
    elif format in ("binary", "seeded"):
        bits, scale = tensors[FORMATS[format][0]], tensors["scale"]
        fits = bits.dtype == torch.int32
        fits = fits and bits.shape == (rows, reference.words_per_row(columns))
        fits = fits and scale.shape in ((1,), (rows,))
        if format == "seeded":
            fits = fits and tensors["key"].dtype == torch.int64 and tensors["key"].shape == (3,)
    else:
        values, starts = tensors["values"], tensors["starts"]
        fits = starts.dtype == torch.int64 and starts.shape == (rows + 1,) and values.dim() == 1
        fits = fits and int(starts[0]) == 0 and int(starts[-1]) == len(values)
        fits = fits and bool((starts.diff() >= 0).all())
        if fits and format == "csr":
            numbers = tensors["columns"]
            fits = numbers.shape == values.shape and numbers.dtype in (torch.int16, torch.int32)
            if fits and len(values):
                numbers = numbers.long() & (0xFFFF if numbers.dtype == torch.int16 else -1)
                fits = int(numbers.min()) >= 0 and int(numbers.max()) < columns
        elif fits and format == "delta":
            gaps = tensors["gaps"]
            fits = gaps.dtype == torch.uint8 and gaps.shape == values.shape
            if fits and len(values):
                fits = int(formats.delta_columns(starts, gaps).max()) < columns
        elif fits:
            bits = tensors["bits"]
            fits = bits.dtype == torch.int32
            fits = fits and bits.shape == (rows, reference.words_per_row(columns))
            ones = reference.unpack_mask(bits, columns).sum(1) if fits else None
            fits = fits and torch.equal(ones, starts.diff())  # pyright: ignore[reportArgumentType]
    return None if fits else f"{FORMATS[format][0]} is no {format} weight of {rows} x {columns}."
