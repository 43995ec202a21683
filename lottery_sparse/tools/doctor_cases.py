"""One small problem per op, ragged on purpose: the arguments of the registered op.

Also how it gets onto a device, and how its float32 is computed there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops.bits.reference import pack_mask
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.packed import formats
from lottery_sparse.ops.random.reference import random_uniform

_BATCH, _OUT, _IN, _DENSITY, _SEED = 7, 33, 65, 0.2, 0


def _uniform(shape: tuple[int, ...], stream: int) -> Tensor:
    # straight from the reference, so that a kernel that does not load cannot stop the doctor
    return random_uniform(math.prod(shape), _SEED, stream, 0).view(shape)


def _values(*shape: int, stream: int) -> Tensor:
    return _uniform(shape, stream) * 2 - 1


def _mask(*shape: int) -> Tensor:
    return _uniform(shape, stream=9) < _DENSITY


def _linear() -> tuple:
    return _values(_OUT, _IN, stream=1), _mask(_OUT, _IN)


def _linear_forward() -> tuple:
    weight, mask = _linear()
    return _values(_BATCH, _IN, stream=2), weight, mask, _values(_OUT, stream=3), None, None


def _linear_backward() -> tuple:
    x, weight, mask, _, frozen, signs = _linear_forward()
    return _values(_BATCH, _OUT, stream=4), x, weight, mask, frozen, signs, True, True


def _compact(*shape: int) -> tuple:
    """values, effective weight, lists of kept entries, and that pruned weights are zero."""
    mask = _mask(*shape)
    effective = torch.where(mask, _values(*shape, stream=1), 0.0)
    return effective[mask], effective, *KeptLists.of(mask.flatten(1)), True


def _compact_linear_forward() -> tuple:
    values, *network = _compact(_OUT, _IN)
    return _values(_BATCH, _IN, stream=2), values, _values(_OUT, stream=3), *network


def _compact_linear_backward() -> tuple:
    dy, x, *_ = _linear_backward()
    return dy, x, *_compact(_OUT, _IN), True, True


def _scatter() -> tuple:
    values, effective, starts, columns, *_ = _compact(_OUT, _IN)
    return torch.zeros_like(effective), values, starts, columns


def _packed_ternary() -> tuple:
    weight, mask = _linear()
    codes = formats.pack_ternary(torch.where(mask, weight.sign(), 0.0))
    return _values(_BATCH, _IN, stream=2), codes, torch.full((1,), 0.5), None, _OUT, False


def _packed_csr() -> tuple:
    weight, mask = _linear()
    return _values(_BATCH, _IN, stream=2), *formats.pack_csr(weight, mask), None


def _packed_bitmap() -> tuple:
    x, values, starts, _, bias = _packed_csr()
    return x, values, starts, pack_mask(_linear()[1]), bias


def _learned(*shape: int, rescale: bool = True) -> tuple:
    """score, weight, bits, kept of a learned mask; no signs."""
    mask = _mask(*shape)
    kept = mask.sum() if rescale else None
    bits = pack_mask(mask.flatten(1))
    return _values(*shape, stream=10) * 4, _values(*shape, stream=1), bits, kept


def _learned_linear_forward() -> tuple:
    network = _learned(_OUT, _IN)
    return _values(_BATCH, _IN, stream=2), *network, _values(_OUT, stream=3), None


def _learned_linear_backward() -> tuple:
    x, *network, _, signs = _learned_linear_forward()
    return _values(_BATCH, _OUT, stream=4), x, *network, signs, True, True, True


_CONV_OPTIONS = ([1, 1], [1, 1], [1, 1], 1)  # stride, padding, dilation, groups


def _conv_forward() -> tuple:
    x, weight = _values(2, 3, 6, 6, stream=5), _values(4, 3, 3, 3, stream=6)
    return x, weight, _mask(4, 3, 3, 3), _values(4, stream=7), None, None, *_CONV_OPTIONS


def _conv_backward() -> tuple:
    x, weight, mask, *_ = _conv_forward()
    dy = _values(2, 4, 6, 6, stream=8)
    return dy, x, weight, mask, None, None, *_CONV_OPTIONS, True, True


def _compact_conv_forward() -> tuple:
    values, *network = _compact(4, 3, 3, 3)
    x, bias = _values(2, 3, 6, 6, stream=5), _values(4, stream=7)
    return x, values, bias, *network, *_CONV_OPTIONS


def _compact_conv_backward() -> tuple:
    x, values, _, *rest = _compact_conv_forward()
    return _values(2, 4, 6, 6, stream=8), x, values, *rest, True, True


def _learned_conv_forward() -> tuple:
    x, network = _values(2, 3, 6, 6, stream=5), _learned(4, 3, 3, 3)
    return x, *network, _values(4, stream=7), None, *_CONV_OPTIONS


def _learned_conv_backward() -> tuple:
    x, network = _values(2, 3, 6, 6, stream=5), _learned(4, 3, 3, 3)
    return _values(2, 4, 6, 6, stream=8), x, *network, None, *_CONV_OPTIONS, True, True, True


def _selection() -> tuple:
    scores = [_values(_OUT, _IN, stream=1), torch.zeros(50)]  # the second layer is all ties
    return scores, [_mask(_OUT, _IN), torch.ones(50, dtype=torch.bool)], 200, _SEED, [1, 2]


def _random(*table: Tensor) -> tuple:
    return 1001, _SEED, 1, 2, *table, torch.device("cpu")


CASES: dict[str, Callable[[], tuple]] = {
    "masked_linear": _linear_forward,
    "masked_linear_backward": _linear_backward,
    "masked_conv2d": _conv_forward,
    "masked_conv2d_backward": _conv_backward,
    "compact_linear": _compact_linear_forward,
    "compact_linear_backward": _compact_linear_backward,
    "compact_conv2d": _compact_conv_forward,
    "compact_conv2d_backward": _compact_conv_backward,
    "scatter_kept_": _scatter,
    "ternary_linear": _packed_ternary,
    "csr_linear": _packed_csr,
    "bitmap_linear": _packed_bitmap,
    "keep_top": _selection,
    "pack_mask": lambda: (_mask(_OUT, _IN),),
    "unpack_mask": lambda: (pack_mask(_mask(_OUT, _IN)), _IN),
    "sample_mask": lambda: (_values(_OUT, _IN, stream=1) * 4, torch.tensor([_SEED, 1, 2])),
    "sample_bits": lambda: (_values(_OUT, _IN, stream=1) * 4, torch.tensor([_SEED, 1, 2])),
    "supermask_linear": _learned_linear_forward,
    "supermask_linear_backward": _learned_linear_backward,
    "supermask_conv2d": _learned_conv_forward,
    "supermask_conv2d_backward": _learned_conv_backward,
    "random_words": _random,
    "random_signs": _random,
    "random_uniform": _random,
    "random_normal": lambda: _random(torch.arange(2**15, dtype=torch.int32)),
}


def to(args: Any, device: str) -> Any:
    """Arguments of an op on another device: their tensors, and where an op draws its own."""
    if isinstance(args, Tensor):
        return args.to(device)
    if isinstance(args, torch.device):
        return torch.device(device)
    if isinstance(args, list | tuple):
        return type(args)(to(a, device) for a in args)
    return args


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products and convolutions run on TF32: torch's, and those of our kernels."""
    held = [switch.fp32_precision == "tf32" for switch in _switches()]
    _allow_tf32([allowed] * len(held))
    try:
        yield
    finally:
        _allow_tf32(held)


def _switches() -> tuple[Any, ...]:
    others: Any = torch.backends.cudnn  # pyright does not see its `conv`
    return torch.backends.cuda.matmul, others.conv, others.rnn


def _allow_tf32(each: list[bool]) -> None:
    # torch.compile reads `allow_tf32`, which raises where only `fp32_precision` was set; and False
    # there leaves convolutions to `torch.backends.fp32_precision`
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, _ = each
    for switch, allowed in zip(_switches(), each, strict=True):
        switch.fp32_precision = "tf32" if allowed else "ieee"


# ops that also give what their own backward goes on with, which is not the same everywhere
CARRY = {"compact_linear", "compact_conv2d"}
