"""The arguments of products with packed weights, as kernels get them; see masked/arguments.py."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class TernaryArgs(NamedTuple):
    x: Tensor
    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    rows: int
    int8: bool


class CsrArgs(NamedTuple):
    x: Tensor
    values: Tensor
    starts: Tensor
    columns: Tensor
    bias: Tensor | None

    @property
    def rows(self) -> int:
        return self.starts.shape[0] - 1


class BitmapArgs(NamedTuple):
    x: Tensor
    values: Tensor
    starts: Tensor
    bits: Tensor
    bias: Tensor | None

    @property
    def rows(self) -> int:
        return self.starts.shape[0] - 1


def ternary_linear(*args: Any) -> tuple[TernaryArgs]:
    return (TernaryArgs(*args),)


def csr_linear(*args: Any) -> tuple[CsrArgs]:
    return (CsrArgs(*args),)


def bitmap_linear(*args: Any) -> tuple[BitmapArgs]:
    return (BitmapArgs(*args),)
