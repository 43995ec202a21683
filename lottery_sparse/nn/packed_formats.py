"""The table of packed formats: how each packs, unpacks, checks and multiplies. See `formats`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_sparse.ops import (
    bitmap_linear,
    csr_linear,
    pack_mask,
    ternary_linear,
)
from lottery_sparse.ops.bits import reference as bits_reference
from lottery_sparse.ops.packed import formats


@dataclass(frozen=True)
class Format:
    """One way to hold a weight [N, K]. `parts` are its tensors, in the order of `names`.

    Attributes:
        names: of the tensors, as a state_dict has them.
        pack: weight -> parts; ValueError if the format cannot hold the weight.
        unpack: (N, K, *parts) -> the weight.
        fits: (N, K, *parts) -> whether tensors of a checkpoint are such a weight; kernels trust
            them later.
        multiply: (x, *parts, bias, rows=N, activations="exact" or "int8") -> x wᵀ + b.
    """

    names: tuple[str, ...]
    pack: Callable[[Tensor], tuple[Tensor, ...]]
    unpack: Callable[..., Tensor]
    fits: Callable[..., bool]
    multiply: Callable[..., Tensor]


def format_of(names: Iterable[str]) -> str | None:
    """The format whose tensors have these names, all of them and no others; None: no tensor of any.

    Raises:
        ValueError: they are a part of a format, or of several, or all of one that is gone.
    """
    names = set(names)
    for format, gone in GONE.items():
        if names.issuperset(gone):
            raise ValueError(
                f'{", ".join(gone)}: a packed weight in the format "{format}", which is no longer '
                "read; pack the model it was made of again, or load the file with lottery_sparse "
                f"at commit {LAST_TO_READ_GONE}, `ls.densify_` it there and `ls.pack_` it here."
            )
    parts = {name for form in FORMATS.values() for name in form.names}.intersection(names)
    if not parts:
        return None
    for format, form in FORMATS.items():
        if parts == set(form.names):
            return format
    whole = "; ".join(f"{format}: {', '.join(form.names)}" for format, form in FORMATS.items())
    raise ValueError(
        f"{', '.join(sorted(parts))}: no whole packed weight, so none of it is loaded; give all "
        f"tensors of one format, and none of another ({whole})."
    )


def check_tensor(name: str, part: Any) -> None:
    """Raises ValueError for anything but an ordinary tensor with numbers."""
    if not isinstance(part, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(part).__name__}.")
    if part.is_meta:
        raise ValueError(f"{name} is on the meta device, which holds no numbers.")
    if part.layout != torch.strided or part.is_quantized:
        kind = "a quantized one" if part.is_quantized else str(part.layout)
        raise ValueError(f"{name} must be an ordinary dense tensor, got {kind}.")


def check_parts(format: str, parts: dict[str, Any], rows: int, columns: int) -> None:
    """Check that tensors of a checkpoint are a packed weight [rows, columns].

    Kernels trust these tensors later.

    Raises:
        ValueError: the tensors do not fit; the message begins with a tensor's name.
    """
    names = FORMATS[format].names
    for name in names:
        check_tensor(name, parts[name])
    if len({parts[name].device for name in names}) > 1:
        raise ValueError(f"{', '.join(names)} must be on one device.")
    if not FORMATS[format].fits(rows, columns, *(parts[name] for name in names)):
        raise ValueError(f"{names[0]} is no {format} weight of {rows} x {columns}.")


# ---- weights of one magnitude --------------------------------------------------------------------


def scale_of(weight: Tensor) -> Tensor | None:
    """The one magnitude of all nonzero weights, [1], or one per row, [N]; None if there are more.

    A matrix, or row, of zeros has the magnitude 0.
    """
    magnitude = weight.abs()
    for most in (magnitude.amax().view(1), magnitude.amax(1)):
        if ((magnitude == 0) | (magnitude == most.unsqueeze(1))).all():
            return most
    return None


def _scale(format: str, weight: Tensor) -> Tensor:
    scale = scale_of(weight) if weight.numel() else weight.new_zeros(1)
    if scale is None:
        raise ValueError(
            f'format "{format}" holds weights of one magnitude (per matrix or per row) and '
            'zeros, but this weight has more; use "csr" or "bitmap".'
        )
    return scale


def _pack_ternary(weight: Tensor) -> tuple[Tensor, ...]:
    scale = _scale("ternary", weight)
    return formats.pack_ternary(weight.sign()), scale


def _fits_ternary(rows: int, columns: int, codes: Tensor, scale: Tensor) -> bool:
    blocks = (-(-rows // formats.BLOCK), -(-columns // formats.BLOCK), formats.BLOCK)
    fits = codes.dtype == torch.int32 and codes.shape == blocks and _fits_scale(rows, scale)
    # no code is 3, both bits set: kernels would differ in its meaning
    return fits and not bool((codes & (codes >> 1) & 0x55555555).any())


# ---- kept weights by row -------------------------------------------------------------------------


def _fits_csr(rows: int, columns: int, values: Tensor, starts: Tensor, numbers: Tensor) -> bool:
    fits = _fits_rows(rows, values, starts) and numbers.shape == values.shape
    if not fits or numbers.dtype not in (torch.int16, torch.int32):
        return False
    return _fits_columns(formats.csr_columns(numbers), starts, columns)


def _pack_bitmap(weight: Tensor) -> tuple[Tensor, ...]:
    kept = weight != 0
    return weight[kept], formats.row_starts(kept), pack_mask(kept)


def _fits_bitmap(rows: int, columns: int, values: Tensor, starts: Tensor, bits: Tensor) -> bool:
    if not (_fits_rows(rows, values, starts) and _fits_bits(rows, columns, bits)):
        return False
    return torch.equal(bits_reference.unpack_mask(bits, columns).sum(1), starts.diff())


# ---- what several share --------------------------------------------------------------------------


def _exact(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`multiply` of a format whose op, (x, *parts, bias), needs no row count and rounds nothing."""

    def multiply(*args: Tensor | None, rows: int, activations: str) -> Tensor:
        return op(*args)

    return multiply


def _fits_scale(rows: int, scale: Tensor) -> bool:
    return scale.shape in ((1,), (rows,)) and scale.is_floating_point()


def _fits_bits(rows: int, columns: int, bits: Tensor) -> bool:
    if bits.dtype != torch.int32 or bits.shape != (rows, bits_reference.words_per_row(columns)):
        return False
    # spare bits are 0: a kernel that counts them would read beyond the values
    return torch.equal(bits_reference.pack_mask(bits_reference.unpack_mask(bits, columns)), bits)


def _fits_columns(numbers: Tensor, starts: Tensor, columns: int) -> bool:
    """Whether int64 [C] ascend within each row, and are columns of the weight."""
    if not len(numbers):
        return True
    first = torch.zeros_like(numbers, dtype=torch.bool)
    first[starts[:-1][starts.diff() > 0]] = True
    ascend = first[1:] | (numbers.diff() > 0)
    return int(numbers.min()) >= 0 and int(numbers.max()) < columns and bool(ascend.all())


def _fits_rows(rows: int, values: Tensor, starts: Tensor) -> bool:
    """Whether `starts` are those of `rows` rows of the values."""
    fits = starts.dtype == torch.int64 and starts.shape == (rows + 1,)
    fits = fits and values.dim() == 1 and values.is_floating_point()
    fits = fits and int(starts[0]) == 0 and int(starts[-1]) == len(values)
    return fits and bool((starts.diff() >= 0).all())


# Formats that were packed until LAST_TO_READ_GONE, and the names of their tensors.
LAST_TO_READ_GONE = "1e96751"
GONE = {
    "binary": ("signs", "scale"),
    "seeded": ("mask", "key", "scale"),
    "delta": ("values", "starts", "gaps"),
}

# n, k: rows and columns of the weight
FORMATS: dict[str, Format] = {
    "ternary": Format(
        ("codes", "scale"),
        pack=_pack_ternary,
        unpack=lambda n, k, codes, scale: formats.ternary_weight(codes, scale, n, k),
        fits=_fits_ternary,
        multiply=lambda x, codes, scale, bias, rows, activations: ternary_linear(
            x, codes, scale, rows, bias, activations
        ),
    ),
    "csr": Format(
        ("values", "starts", "columns"),
        pack=lambda weight: formats.pack_csr(weight, weight != 0),
        unpack=lambda n, k, *csr: formats.unpack_csr(csr[0], csr[1], csr[2], k),
        fits=_fits_csr,
        multiply=_exact(csr_linear),
    ),
    "bitmap": Format(
        ("values", "starts", "bits"),
        pack=_pack_bitmap,
        unpack=lambda n, k, values, _, bits: formats.unpack_bitmap(
            values, bits_reference.unpack_mask(bits, k)
        ),
        fits=_fits_bitmap,
        multiply=_exact(bitmap_linear),
    ),
    "dense": Format(
        ("weight",),
        pack=lambda weight: (weight.clone(),),
        unpack=lambda n, k, weight: weight,
        fits=lambda n, k, weight: weight.shape == (n, k) and weight.is_floating_point(),
        multiply=_exact(F.linear),
    ),
}
