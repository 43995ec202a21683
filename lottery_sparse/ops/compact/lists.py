"""Lists of kept weights and packed codes: whether they stay within what they number.

The CPU kernels check what they read in every call, and say which list does not fit; the functions
here say what is in it. Other devices' kernels trust their lists, which are checked here before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from lottery_sparse.ops.common.autograd import unwatched
from lottery_sparse.ops.compact.kept import KeptLists

# By the id of a check's first argument: it, weakly; its version; the other arguments, theirs.
_passed: dict[int, tuple[ReferenceType, int, tuple, list[int]]] = {}


def once(check: Callable[..., None], first: Tensor, *rest: Any) -> None:
    """check(first, *rest), unless these very tensors have passed and no version counts a write.

    Under torch.compile, a transform or a mode nothing is checked, as nothing can be read there.
    """
    if torch.compiler.is_compiling():
        return
    known = _passed.get(id(first))
    if known is not None and known[0]() is first and (known[1] == -1 or known[1] == first._version):
        others, versions = known[2:]
        if not rest or (
            all(map(_same, others, rest)) and versions == [*map(_version, _tensors(rest))]
        ):
            return
    if not readable(first, *rest):
        return
    check(first, *rest)
    key = id(first)
    forgotten = ref(first, lambda _: _passed.pop(key, None))
    _passed[key] = forgotten, _version(first), rest, [*map(_version, _tensors(rest))]


def readable(*args: Any) -> bool:
    """Whether these tensors hold numbers that Python may look at."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and unwatched(_tensors(args))
    )


def _tensors(arguments: tuple) -> list[Tensor]:
    return [a for a in arguments if isinstance(a, Tensor)]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and a == b)


def check_kept(kept: KeptLists, rows: int, columns: int) -> None:
    """Raise a ValueError that says which of the five lists does not fit [rows, columns]."""
    slots = kept.columns.shape[-1]
    _check_starts("kept.starts", kept.starts, slots)
    _check_starts("kept.column_starts", kept.column_starts, slots)
    for name, numbers, starts, count in (
        ("kept.columns", kept.columns, kept.starts, columns),
        ("kept.rows", kept.rows, kept.column_starts, rows),
    ):
        used = torch.arange(slots, device=numbers.device) < starts[..., -1:]
        _check_numbers(name, unsigned(numbers)[used], count)
    _check_numbers("kept.positions", kept.positions, slots)


def check_csr(columns: Tensor, starts: Tensor, in_features: int) -> None:
    """The same for the lists of `csr_linear`."""
    _check_starts("starts", starts, len(columns))
    _check_numbers("columns", unsigned(columns)[: int(starts[-1])], in_features)


def check_bitmap(bits: Tensor, starts: Tensor, slots: int) -> None:
    """The same for the lists of `bitmap_linear`."""
    _check_starts("starts", starts, slots)
    shifts = torch.arange(32, device=bits.device, dtype=torch.int32)
    ones = ((bits.unsqueeze(-1) >> shifts) & 1).sum((1, 2))
    wrong = ones != starts.diff()
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"bits of row {row} have {int(ones[row])} ones, but starts give it "
            f"{int(starts[row + 1] - starts[row])} entries; pack both from one mask."
        )


def check_codes(codes: Tensor) -> None:
    """Raise a ValueError if a code stands for no weight: they are 0, 1 and 2, for -1, 0 and 1."""
    if ((codes & (codes >> 1)) & 0x55555555).any():
        raise ValueError(
            "codes hold a 3, but a code is 0, 1 or 2, for weights of -c, 0 and +c; use "
            "formats.pack_ternary."
        )


def unsigned(numbers: Tensor) -> Tensor:
    """As int64; int16 holds the bits of uint16."""
    wide = numbers.to(torch.int64)
    return wide & 0xFFFF if numbers.dtype == torch.int16 else wide


def _check_starts(name: str, starts: Tensor, slots: int) -> None:
    ends = f"must ascend from 0 to at most {slots}, the number of slots"
    if (starts[..., 0] != 0).any() or (starts[..., -1] > slots).any():
        first, last = starts[..., 0].flatten().tolist(), starts[..., -1].flatten().tolist()
        raise ValueError(f"{name} {ends}, got {first[0]} first and {max(last)} last.")
    falls = (starts.diff() < 0).nonzero()
    if len(falls):
        at = tuple(falls[0].tolist())
        before = int(starts[at])
        after = int(starts[(*at[:-1], at[-1] + 1)])
        raise ValueError(f"{name} {ends}, got {after} after {before} at {at[-1] + 1}.")


def _check_numbers(name: str, numbers: Tensor, count: int) -> None:
    wrong = numbers[(numbers < 0) | (numbers >= count)]
    if len(wrong):
        raise ValueError(f"{name} must be at least 0 and below {count}, got {int(wrong[0])}.")
