"""Products with packed weights, for inference: see `formats`.

They have no gradients. Sums run in float32 (float64 for a float64 `x`) and are rounded once to the
dtype of `x`, whatever that of the weight is. Under torch.autocast `x` is cast, and with it the
result, as for F.linear; the weight is used as it was packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits.reference import words_per_row
from lottery_sparse.ops.common.autograd import Direct, cast_one
from lottery_sparse.ops.common.checks import check_devices
from lottery_sparse.ops.common.torch_private import forward_ad
from lottery_sparse.ops.compact.lists import (
    check_bitmap,
    check_codes,
    check_csr,
    once,
    readable,
)
from lottery_sparse.ops.packed.formats import BLOCK


def ternary_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    rows: int,
    bias: Tensor | None = None,
    activations: str = "exact",
) -> Tensor:
    """Linear layer on weights of -c, 0 and +c: y = c · (x tᵀ) + b.

    >>> layer = ls.nn.PackedLinear(weight.sign() * mask, format="ternary")
    >>> ls.ops.ternary_linear(x, layer.codes, layer.scale, rows=10).shape
    torch.Size([8, 10])

    Args:
        x: [..., K], any floating dtype.
        codes: int32 [ceil(N / 16), ceil(K / 16), 16], see `formats.pack_ternary`.
        scale: c: [1], or one for each row, [N].
        rows: N.
        bias: [N], or None.
        activations: "exact", or "int8": each row of x is rounded to 255 steps between plus and
            minus its largest magnitude.

    Returns:
        [..., N], dtype of `x`.

    Raises:
        ValueError: a shape, dtype, device, list or code does not fit; the message names the
            argument.
        RuntimeError: x requires grad while gradients are recorded.
    """
    if activations not in ("exact", "int8"):
        raise ValueError(f'activations must be "exact" or "int8", got {activations!r}.')
    check_x(x)
    expected = (-(-rows // BLOCK), -(-x.shape[-1] // BLOCK), BLOCK)
    if codes.dtype != torch.int32 or tuple(codes.shape) != expected:
        raise ValueError(
            f"codes must be int32 {expected} for {rows} rows of {x.shape[-1]} columns, got "
            f"{codes.dtype} {tuple(codes.shape)}; use formats.pack_ternary."
        )
    _check_scale(scale, rows)
    _check_bias(bias, rows)
    check_devices(x, codes=codes, scale=scale, bias=bias)
    once(check_codes, codes)
    return _by_rows(_ternary, x, rows, codes, scale, bias, rows, activations == "int8")


def csr_linear(
    x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Linear layer on kept weights by row, with their columns: y = x wᵀ + b.

    >>> layer = ls.nn.PackedLinear(weight * mask, format="csr")
    >>> ls.ops.csr_linear(x, layer.values, layer.starts, layer.columns).shape
    torch.Size([8, 10])

    Args:
        x: [..., K], any floating dtype.
        values: [C], floating; bfloat16 values are read as such.
        starts: int64 [N + 1]: row r has entries starts[r] … starts[r + 1] - 1. Ascending from 0
            to at most C.
        columns: [C], int32, or int16 holding the bits of uint16; below K.
        bias: [N], or None.

    A NaN or Inf in x goes where F.linear lets it: where no entry is stored for it, y is NaN.

    Returns, raises: as `ternary_linear`.
    """
    check_x(x)
    _check_entries(values, starts)
    if columns.dtype not in (torch.int16, torch.int32) or columns.shape != values.shape:
        raise ValueError(
            f"columns must be int16 or int32 {tuple(values.shape)} like values, got "
            f"{columns.dtype} {tuple(columns.shape)}."
        )
    rows = starts.shape[0] - 1
    _check_bias(bias, rows)
    check_devices(x, values=values, starts=starts, columns=columns, bias=bias)
    check = check_csr, columns, starts, x.shape[-1]
    return _checked(check, _csr, x, rows, values, starts, columns, bias)


def bitmap_linear(
    x: Tensor, values: Tensor, starts: Tensor, bits: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Linear layer on kept weights by row, with their mask as bits: y = x wᵀ + b.

    >>> layer = ls.nn.PackedLinear(weight * mask, format="bitmap")
    >>> ls.ops.bitmap_linear(x, layer.values, layer.starts, layer.bits).shape
    torch.Size([8, 10])

    Args:
        x, values, starts, bias: as in `csr_linear`.
        bits: the mask, int32 [N, W], see `pack_mask`; row r has starts[r + 1] - starts[r] ones.
            On the CPU a row with more or fewer gives a wrong sum, and is refused only where it
            asks for values that are not there.

    Returns, raises: as `ternary_linear`.
    """
    check_x(x)
    _check_entries(values, starts)
    rows = starts.shape[0] - 1
    if _check_bits(bits, x.shape[-1]) != rows:
        raise ValueError(f"bits has {len(bits)} rows, but starts has {rows}.")
    _check_bias(bias, rows)
    check_devices(x, values=values, starts=starts, bits=bits, bias=bias)
    check = check_bitmap, bits, starts, len(values)
    return _checked(check, _bitmap, x, rows, values, starts, bits, bias)


def check_x(x: Tensor) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(
            f"x must be a floating tensor [..., K], got {x.dtype} of shape {tuple(x.shape)}."
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "x requires grad, but packed layers are for inference and have no gradients; use "
            "torch.inference_mode(), or train the model that was packed."
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            "x has a tangent (torch.func.jvp, forward_ad), but packed layers are for inference and "
            "have no gradients; take the jvp of the model that was packed."
        )


def _check_entries(values: Tensor, starts: Tensor) -> None:
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"values must be floating [C], got {values.dtype} {tuple(values.shape)}.")
    if starts.dtype != torch.int64 or starts.dim() != 1 or starts.shape[0] == 0:
        raise ValueError(f"starts must be int64 [N + 1], got {starts.dtype} {tuple(starts.shape)}.")


def _check_bits(bits: Tensor, columns: int) -> int:
    """How many rows they have."""
    words = words_per_row(columns)
    if bits.dtype != torch.int32 or bits.dim() != 2 or bits.shape[1] != words:
        raise ValueError(
            f"bits must be int32 [N, {words}] for {columns} columns, got {bits.dtype} "
            f"{tuple(bits.shape)}; use ops.pack_mask."
        )
    return bits.shape[0]


def _check_scale(scale: Tensor, rows: int) -> None:
    if tuple(scale.shape) not in ((1,), (rows,)) or not scale.is_floating_point():
        raise ValueError(
            f"scale must be one floating number or one per row, [1] or [{rows}], got "
            f"{scale.dtype} {tuple(scale.shape)}."
        )


def _check_bias(bias: Tensor | None, rows: int) -> None:
    if bias is not None and (tuple(bias.shape) != (rows,) or not bias.is_floating_point()):
        raise ValueError(
            f"bias must be floating [{rows}], got {bias.dtype} of shape {tuple(bias.shape)}."
        )


def _checked(check: tuple, op: Callable, x: Tensor, rows: int, *args: Any) -> Tensor:
    """`_by_rows`; the CPU's kernels check lists as they read them, others' are checked before."""
    if x.device.type != "cpu":
        once(*check)
    try:
        return _by_rows(op, x, rows, *args)
    except (RuntimeError, IndexError):
        if readable(*check[1:]):
            check[0](*check[1:])
        raise


def _by_rows(op, x: Tensor, rows: int, *args) -> Tensor:
    """The op on [B, K], for x of any number of dimensions."""
    if x.dim() == 2:
        return op(x, *args)
    flat = x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)
    return op(flat, *args).view(x.shape[:-1] + (rows,))


SCHEMAS = {
    "ternary_linear": "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, SymInt rows, "
    "bool int8)",
    "csr_linear": "(Tensor x, Tensor values, Tensor starts, Tensor columns, Tensor? bias)",
    "bitmap_linear": "(Tensor x, Tensor values, Tensor starts, Tensor bits, Tensor? bias)",
}


class Packed(Direct):
    """An op on a packed weight; autocast casts x alone."""

    casts = True

    def __init__(self, stem: str) -> None:
        torch.library.define(f"lottery_sparse::{stem}", f"{SCHEMAS[stem]} -> Tensor")
        super().__init__(stem)

    def fake(self, *args: Any) -> Tensor:
        (own,) = dispatch.own_arguments(self.stem, args)
        return own.x.new_empty(own.x.shape[0], own.rows)

    def cast(self, args: tuple, device: str) -> tuple:
        x, *rest = args
        return cast_one(x, device, torch.get_autocast_dtype(device)), *rest

    def vmap(self, info: Any, in_dims: tuple, x: Tensor, *args: Any) -> tuple[Tensor, int]:
        """More inputs of one weight are a larger batch; other weights are a loop."""
        of_x, *others = in_dims
        if all(d is None for d in others):
            x = x.movedim(of_x, 0)
            return self(x.flatten(0, 1), *args).unflatten(0, x.shape[:2]), 0
        pairs = list(zip((x, *args), in_dims, strict=True))
        each = [
            self(*(a if d is None else a.select(d, i) for a, d in pairs))
            for i in range(info.batch_size)
        ]
        return torch.stack(each), 0


_ternary, _csr, _bitmap = map(Packed, SCHEMAS)
