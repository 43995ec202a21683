"""The compiled CPU kernels as the backend "cpu": the functions of `reference`, same signatures.

Importing this module loads lottery_sparse._C; ImportError means that it is not built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops
from lottery_sparse import reference

_ops = torch.ops.lottery_sparse_native

# Integer and half-precision scores that a float32 holds exactly, so ranks stay what they were.
_EXACT_SCORES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16)

_PACKED = ("ternary_linear", "csr_linear", "bitmap_linear")
_MOST_COLUMNS_INT8 = 2**18  # kTernaryMostColumns


# ---- which calls these kernels take ------------------------------------------------------------


def refuses(op: str, *args: Any) -> str | None:
    """Why `op` cannot run here with these arguments, in a sentence; None if it can."""
    if op.startswith("masked_linear"):
        return _refuses_linear(*args[:6] if op == "masked_linear" else args[1:6])
    if op.startswith("compact_"):
        dtypes = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
        if dtypes != {torch.float32}:
            return f"its kernels run float32, got {' and '.join(sorted(map(str, dtypes)))}."
    if op == "scatter_kept_" and not (
        args[0].dtype == args[1].dtype == torch.float32 and args[0].is_contiguous()
    ):
        return f"its kernel writes a contiguous float32 tensor, got {args[0].dtype}."
    if op in _PACKED and any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args):
        return "its kernels run float32, got float64."
    if op == "ternary_linear" and args[5] and args[0].shape[1] > _MOST_COLUMNS_INT8:
        return f"its int8 sums hold up to {_MOST_COLUMNS_INT8} columns, got {args[0].shape[1]}."
    if op == "keep_top":
        dtypes = {score.dtype for score in args[0]} - set(_EXACT_SCORES)
        if dtypes:
            return f"scores are {min(map(str, dtypes))}, which a float32 cannot hold exactly."
    return None


def _refuses_linear(x: Tensor, weight: Tensor, *arguments: Any) -> str | None:
    *_, frozen, signs = arguments
    if frozen is not None or signs is not None:
        return "its sparse kernel takes pruned weights as zero, not as frozen values."
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"its kernels run float32, got {x.dtype}."
    return None


# Below this density listing and gathering kept weights beats the dense product; measured at
# batches 1 to 1000 of ten layers, benchmarks/results/cpu.md. With few rows the listing dominates.
_MAX_DENSITY = 0.25
_MAX_DENSITY_SMALL_BATCH = 0.15
_SMALL_BATCH = 32
# A compact layer has its lists already; the limits for forward and dx, and for dvalues.
MAX_DENSITY_COMPACT = 0.45
MAX_DENSITY_SAMPLED = 0.45
_MAX_DENSITY_CONV, _MAX_DENSITY_CONV_1X1 = 0.4, 0.2
# Up to this size a call costs more than the product, and one kernel call is the cheapest.
_SMALL_WEIGHT = 4096


def wins(op: str, *args: Any) -> bool:
    """Whether this backend is the faster one for a call that it does not refuse."""
    if op == "compact_linear":
        return kept_share(args[4], args[3]) <= MAX_DENSITY_COMPACT
    if op.startswith("compact_conv2d"):
        pointwise = args[3].shape[-2:] == (1, 1)
        most = _MAX_DENSITY_CONV_1X1 if pointwise else _MAX_DENSITY_CONV
        return kept_share(args[4], args[3]) <= most
    if not op.startswith("masked_linear"):
        return True
    x, weight, mask = args[:3] if op == "masked_linear" else args[1:4]
    if weight.numel() <= _SMALL_WEIGHT:
        return True
    most = _MAX_DENSITY if x.shape[-2] >= _SMALL_BATCH else _MAX_DENSITY_SMALL_BATCH
    return count_kept(_as_bool(mask, weight)) <= most * weight.numel()


# ---- masked_linear -----------------------------------------------------------------------------


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    frozen: Tensor | None,
    signs: Tensor | None,
) -> Tensor:
    return _ops.masked_linear(x, weight, _as_bool(mask, weight), bias)


def masked_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    frozen: Tensor | None,
    signs: Tensor | None,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    return _ops.masked_linear_backward(dy, x, weight, _as_bool(mask, weight), need_dx, need_dw)


def _as_bool(mask: Tensor, weight: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else unpack_mask(mask, weight.shape[-1])


# ---- compact layers: kept weights only -----------------------------------------------------------


def compact_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    effective: Tensor,
    starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    positions: Tensor,
    zero: bool,
) -> tuple[Tensor, Tensor]:
    """(y, packed x). With frozen values other than zero nothing is left to skip: dense, no x."""
    if zero:
        return _ops.compact_linear(x, values, starts, columns, bias)
    return reference.linear(x, effective, bias), x.new_empty(0)


def compact_linear_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    effective: Tensor,
    starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    positions: Tensor,
    zero: bool,
    need_dx: bool,
    need_dv: bool,
    carried: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dx and dvalues, each by the kernel or, where too much is kept, by the dense library."""
    share = kept_share(starts, effective)
    sparse_dx = need_dx and zero and share <= MAX_DENSITY_COMPACT
    sample = need_dv and share <= MAX_DENSITY_SAMPLED
    dx, dv = x.new_empty(0), x.new_empty(0)
    if sparse_dx or sample:
        if carried is None or carried.numel() == 0:
            carried = _ops.pack_tiles(x) if sample else x.new_empty((1, 1, x.shape[-1], 1))
        dx, dv, _ = _ops.compact_linear_backward(
            dy, carried, values, starts, columns, column_starts, rows, positions,
            x.dim() == 2, sparse_dx, sample, False,
        )  # fmt: skip
    if need_dx and not sparse_dx:
        dx, _ = reference.linear_backward(dy, x, effective, True, False)
    if need_dv and not sample:
        _, dw = reference.linear_backward(dy, x, effective, False, True)
        dv = _ops.gather_kept(dw, starts, columns)
    return dx, dv


def scatter_kept_(effective: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> None:
    """Write kept values [C] or [E, C] into the effective weight."""
    _ops.scatter_kept_(effective, values, starts, columns)


def kept_share(starts: Tensor, effective: Tensor) -> float:
    """Kept entries per weight, over all networks."""
    last = starts[-1] if starts.dim() == 1 else starts[:, -1].sum()
    return int(last) / max(effective.numel(), 1)


# ---- optimizers: called by optim.py; -1, or the position of a Parameter that they do not take ---

sgd_step = _ops.sgd_step.default
adam_step = _ops.adam_step.default


# ---- compact convolutions ------------------------------------------------------------------------


def kept_conv2d(
    x: Tensor,
    values: Tensor,
    starts: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """y of kept `values` [C] or [E, C] at lists of the mask [O, I / groups · kh · kw].

    x: [B, I, H, W] (shared by the networks) or [E, B, I, H, W]; y is channels_last where x is.
    """
    last = _channels_last(x)
    y = _ops.compact_conv2d(
        _inner(x, last), values, starts, columns, bias,
        kernel_size, stride, padding, dilation, groups, last,
    )  # fmt: skip
    return _outer(y, last)


def kept_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    positions: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_dx: bool,
    need_dvalues: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dvalues, dbias), empty where not needed; dx is summed over networks for a shared x."""
    last = _channels_last(x)
    dx, dvalues, dbias = _ops.compact_conv2d_backward(
        _inner(dy, last), _inner(x, last), values,
        starts, columns, column_starts, rows, positions,
        kernel_size, stride, padding, dilation, groups, last,
        need_dx, need_dvalues, need_dbias,
    )  # fmt: skip
    return _outer(dx, last) if need_dx else dx, dvalues, dbias


def compact_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    effective: Tensor,
    starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    positions: Tensor,
    zero: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """y, and nothing to carry. With frozen values other than zero nothing can be skipped: dense."""
    geometry = stride, padding, dilation, groups
    if zero:
        kernel_size = list(effective.shape[-2:])
        y = kept_conv2d(x, values, starts, columns, bias, kernel_size, *geometry)
    else:
        y = reference.conv2d(x, effective, bias, *geometry)
    return y, x.new_empty(0)


def compact_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    effective: Tensor,
    starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    positions: Tensor,
    zero: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_dx: bool,
    need_dv: bool,
    carried: Tensor | None,
) -> tuple[Tensor, Tensor]:
    geometry = stride, padding, dilation, groups
    sparse_dx = need_dx and zero
    dx, dv = x.new_empty(0), x.new_empty(0)
    if sparse_dx or need_dv:
        dx, dv, _ = kept_conv2d_backward(
            dy, x, values, starts, columns, column_starts, rows, positions,
            list(effective.shape[-2:]), *geometry, sparse_dx, need_dv, False,
        )  # fmt: skip
    if need_dx and not zero:
        dx, _ = reference.conv2d_backward(dy, x, effective, *geometry, True, False)
    return dx, dv


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(-3, -1).is_contiguous()


def _inner(x: Tensor, last: bool) -> Tensor:
    """Channels as the last dimension for images that are channels_last in memory."""
    return x.movedim(-3, -1) if last else x


def _outer(x: Tensor, last: bool) -> Tensor:
    return x.movedim(-1, -3) if last else x


# ---- packed inference --------------------------------------------------------------------------


def ternary_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, rows: int, int8: bool
) -> Tensor:
    return _ops.ternary_linear(_float(x), codes, _float(scale), _float(bias), rows, int8).to(
        x.dtype
    )


def csr_linear(
    x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None
) -> Tensor:
    y = _ops.csr_linear(_float(x), _stored(values), starts, columns, _float(bias))
    return y if y.dtype == x.dtype else y.to(x.dtype)


def bitmap_linear(
    x: Tensor, values: Tensor, starts: Tensor, bits: Tensor, bias: Tensor | None
) -> Tensor:
    y = _ops.bitmap_linear(_float(x), _stored(values), starts, bits, _float(bias))
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _float(values: Any) -> Any:
    if values is None or values.dtype == torch.float32:  # half a microsecond less than .to
        return values
    return values.to(torch.float32)


def _stored(values: Tensor) -> Tensor:
    return values if values.dtype == torch.bfloat16 else _float(values)


# ---- selection and masks -----------------------------------------------------------------------


def keep_top(
    scores: list[Tensor], masks: list[Tensor], count: int, seed: int, streams: list[int]
) -> list[Tensor]:
    scores = [score.to(torch.float32) for score in scores]
    try:
        return _ops.keep_top(scores, masks, count, seed, streams)
    except RuntimeError:
        # the C interface has one exception type: find out whether it was the caller's mistake
        kept = sum(map(count_kept, masks))
        if count > kept:
            raise ValueError(
                f"count is {count}, but only {kept} entries are kept so far."
            ) from None
        for i, (score, mask) in enumerate(zip(scores, masks, strict=True)):
            bad = int(score[mask].isnan().sum())
            if bad:
                raise ValueError(f"scores[{i}] holds NaN at {bad} kept entries.") from None
        raise


def pack_mask(mask: Tensor) -> Tensor:
    bits = _ops.pack_mask(_as_rows(mask))
    return bits.view(mask.shape[:-1] + bits.shape[-1:])


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    return _ops.unpack_mask(_as_rows(bits), columns).view(bits.shape[:-1] + (columns,))


def _as_rows(values: Tensor) -> Tensor:
    """[..., K] -> [rows, K], also where there are no elements."""
    return values.reshape(values.shape[:-1].numel(), values.shape[-1])


def count_kept(mask: Tensor) -> int:
    """Number of True entries of a bool mask on the CPU."""
    return _ops.count_kept(mask)


# ---- randomness --------------------------------------------------------------------------------


def random_words(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    return _ops.random_words(count, seed, stream, step).to(device)


def random_signs(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    return _ops.random_signs(count, seed, stream, step).to(device)


def random_uniform(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    return _ops.random_uniform(count, seed, stream, step).to(device)


def random_normal(
    count: int, seed: int, stream: int, step: int, table: Tensor, device: Any = "cpu"
) -> Tensor:
    return _ops.random_normal(count, seed, stream, step, table).to(device)
