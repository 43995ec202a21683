"""What every op means, in plain PyTorch. Tests compare kernels to this file; it is not tuned.

Shapes: weight [N, K] or [E, N, K] (convolution: [O, I, kh, kw] or [E, O, I, kh, kw]), E networks
side by side; x [B, K], shared by all of them, or [E, B, K]; a mask is bool like the weight, or
packed int32 [..., N, W] (see `pack_mask`). Frozen values are given by two arguments:

    frozen None,  signs None    zero
    frozen like weight          a tensor
    frozen [] or [E], signs     sign x constant; signs are packed like a mask, bit 1 = plus
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_sparse import formats

# ---- masks as bits -------------------------------------------------------------------------

WORDS_PER_CHUNK = 4  # rows are padded to 128 bits, one vector load


def words_per_row(columns: int) -> int:
    return WORDS_PER_CHUNK * -(-columns // (32 * WORDS_PER_CHUNK))


def pack_mask(mask: Tensor) -> Tensor:
    """[..., K] bool -> [..., W] int32: bit j of word w is column 32 w + j; spare bits are 0."""
    columns = mask.shape[-1]
    padded = F.pad(mask, (0, 32 * words_per_row(columns) - columns)).unflatten(-1, (-1, 32))
    bits = padded.to(torch.int64) << torch.arange(32, device=mask.device)
    return bits.sum(-1).to(torch.int32)  # keeps the low 32 bits


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    """[..., W] int32 -> [..., columns] bool, the inverse of `pack_mask`."""
    spread = bits.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=bits.device)
    return (spread & 1).to(torch.bool).flatten(-2)[..., :columns].contiguous()


def mask_as_bool(mask: Tensor, weight: Tensor, rank: int) -> Tensor:
    """A bool or packed mask as bool of the weight's shape; rank = that of one weight."""
    if mask.dtype == torch.bool:
        return mask
    columns = weight.shape[1 - rank :].numel()
    return unpack_mask(mask, columns).view(weight.shape)


# ---- the effective weight --------------------------------------------------------------------


def effective_weight(
    weight: Tensor, mask: Tensor, frozen: Tensor | None, signs: Tensor | None, rank: int
) -> Tensor:
    """where(m, w, f): selection, not arithmetic, so nothing a pruned entry holds can leak."""
    kept = mask_as_bool(mask, weight, rank)
    if frozen is None:
        return torch.where(kept, weight, 0.0)
    if signs is not None:
        constant = frozen.to(weight.dtype).view(frozen.shape + (1,) * rank)
        plus = mask_as_bool(signs, weight, rank)
        frozen = torch.where(plus, constant, -constant)
    return torch.where(kept, weight, frozen)


# ---- masked_linear -------------------------------------------------------------------------


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    frozen: Tensor | None,
    signs: Tensor | None,
) -> Tensor:
    """y = x where(m, w, f)ᵀ + b -> [B, N] or [E, B, N]."""
    return linear(x, effective_weight(weight, mask, frozen, signs, rank=2), bias)


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
    """dx = dy where(m, w, f), summed over E for a shared x; dw = where(m, dyᵀ x, 0)."""
    w = effective_weight(weight, mask, frozen, signs, rank=2)
    dx, dw = linear_backward(dy, x, w, need_dx, need_dw)
    kept = mask_as_bool(mask, weight, rank=2)
    return dx, torch.where(kept, dw, 0.0).contiguous() if need_dw else dw


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x wᵀ + b of one network or E of them."""
    if w.dim() == 2:
        return F.linear(x, w, bias)
    y = torch.matmul(x, w.mT)
    return y if bias is None else y + bias.unsqueeze(1)


def linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """dx and the dense dw; empty where not needed."""
    dx, dw = x.new_empty(0), x.new_empty(0)
    if need_dx:
        dx = torch.matmul(dy, w)
        dx = dx.sum(0) if dx.dim() > x.dim() else dx
    if need_dw:
        dw = torch.matmul(dy.mT, x)
    return dx, dw


# ---- compact products: the weight as a vector of kept values -----------------------------------


def kept_weight(values: Tensor, effective: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """`effective` with `values` [C] or [E, C] at the kept entries; spare slots go nowhere."""
    if values.dim() == 2:
        each = zip(values, effective, starts, columns, strict=True)
        return torch.stack([kept_weight(*args) for args in each])
    at = kept_positions(effective, starts, columns)
    flat = torch.cat([effective.flatten(), effective.new_zeros(1)])
    w = flat.index_put([at], values)[:-1].view(effective.shape)
    if w.dim() == 4 and w.stride() != effective.stride():  # the layout decides on that of results
        w = w.clone(memory_format=torch.channels_last)
    return w


def kept_positions(weight: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """The flat index into one weight of every slot [C]; that of a spare slot is numel."""
    slots = torch.arange(len(columns), device=columns.device)
    ends = slots.new_zeros(len(columns) + 1).index_add(0, starts[1:], torch.ones_like(starts[1:]))
    row = ends.cumsum(0)[:-1]  # as many as rows that end before the slot
    column = columns.to(torch.int64)
    column = column & 0xFFFF if columns.dtype == torch.int16 else column
    per_row = weight.numel() // max(weight.shape[0], 1)
    return torch.where(slots < starts[-1], row * per_row + column, weight.numel())


def gather_kept(dense: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """The kept entries of a dense gradient, [C] or [E, C]; 0 in spare slots."""
    if starts.dim() == 2:
        return torch.stack(
            [gather_kept(*args) for args in zip(dense, starts, columns, strict=True)]
        )
    flat = torch.cat([dense.flatten(), dense.new_zeros(1)])
    return flat[kept_positions(dense, starts, columns)]


def scatter_kept_(effective: Tensor, values: Tensor, starts: Tensor, columns: Tensor) -> None:
    """Write the kept values into an effective weight, in place."""
    effective.copy_(kept_weight(values.to(effective.dtype), effective, starts, columns))


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
    """y = x Wᵀ + b with W = `kept_weight`, and nothing to carry to the backward."""
    return linear(x, kept_weight(values, effective, starts, columns), bias), x.new_empty(0)


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
    """dx = dy W, summed over E for a shared x; dvalues = (dyᵀ x) at the kept entries."""
    w = kept_weight(values, effective, starts, columns)
    dx, dw = linear_backward(dy, x, w, need_dx, need_dv)
    return dx, gather_kept(dw, starts, columns) if need_dv else dw


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
    """Convolution with W = `kept_weight`, and nothing to carry to the backward."""
    w = kept_weight(values, effective, starts, columns)
    return conv2d(x, w, bias, stride, padding, dilation, groups), x.new_empty(0)


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
    """dx through W, summed over E for a shared x; dvalues at the kept entries."""
    w = kept_weight(values, effective, starts, columns)
    dx, dw = conv2d_backward(dy, x, w, stride, padding, dilation, groups, need_dx, need_dv)
    return dx, gather_kept(dw, starts, columns) if need_dv else dw


# ---- packed inference --------------------------------------------------------------------------


def ternary_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, rows: int, int8: bool
) -> Tensor:
    """x (scale · t)ᵀ + b; with int8, x is rounded to max|x| / 127 · q, q in -127 … 127, by row."""
    wide = _compute_dtype(x)
    w = formats.ternary_weight(codes, scale.to(wide), rows, x.shape[1])
    if not int8:
        return _rounded(x, w, bias)
    largest = x.to(wide).abs().amax(1, keepdim=True) if x.numel() else x.new_zeros(len(x), 1)
    q = (x.to(wide) * torch.where(largest > 1e-36, 127 / largest, 0.0)).round()
    return _rounded(q * (largest / 127), w, bias).to(x.dtype)


def csr_linear(
    x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, bias: Tensor | None
) -> Tensor:
    """x wᵀ + b of kept `values` at `columns`, row by row."""
    w = formats.unpack_csr(values.to(_compute_dtype(x)), starts, columns, x.shape[1])
    return _rounded(x, w, bias)


def bitmap_linear(
    x: Tensor, values: Tensor, starts: Tensor, bits: Tensor, bias: Tensor | None
) -> Tensor:
    """x wᵀ + b of kept `values` where `bits` has ones."""
    kept = unpack_mask(bits, x.shape[1])
    return _rounded(x, formats.unpack_bitmap(values.to(_compute_dtype(x)), kept), bias)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rounded(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Computed in the dtype of `w`, rounded once to that of `x`."""
    bias = None if bias is None else bias.to(w.dtype)
    return F.linear(x.to(w.dtype), w, bias).to(x.dtype)


# ---- masked_conv2d -------------------------------------------------------------------------


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    frozen: Tensor | None,
    signs: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolution with where(m, w, f): [B, O, H', W'] or [E, B, O, H', W']."""
    w = effective_weight(weight, mask, frozen, signs, rank=4)
    return conv2d(x, w, bias, stride, padding, dilation, groups)


def masked_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    frozen: Tensor | None,
    signs: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    """dx through where(m, w, f), summed over E for a shared x; dw zero at pruned entries."""
    w = effective_weight(weight, mask, frozen, signs, rank=4)
    dx, dw = conv2d_backward(dy, x, w, stride, padding, dilation, groups, need_dx, need_dw)
    return dx, torch.where(mask_as_bool(mask, weight, rank=4), dw, 0.0) if need_dw else dw


def conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """F.conv2d of one network, or of E of them as one grouped convolution."""
    if w.dim() == 4:
        return F.conv2d(x, w, bias, stride, padding, dilation, groups)
    networks = w.shape[0]
    x, bias = _side_by_side(x, networks), None if bias is None else bias.flatten()
    y = F.conv2d(x, w.flatten(0, 1), bias, stride, padding, dilation, groups * networks)
    return _one_by_one(y, networks)


def conv2d_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    """dx and the dense dw; empty where not needed."""
    networks = w.shape[0] if w.dim() == 5 else 0
    shared, shape = x.dim() == 4, w.shape
    if networks:
        dy, x, w = _side_by_side(dy, networks), _side_by_side(x, networks), w.flatten(0, 1)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, False, [0, 0], groups * max(networks, 1),
        [need_dx, need_dw, False],
    )  # fmt: skip
    if need_dx and networks:
        dx = _one_by_one(dx, networks)
        dx = dx.sum(0) if shared else dx
    return dx if need_dx else x.new_empty(0), dw.view(shape) if need_dw else x.new_empty(0)


def _side_by_side(x: Tensor, networks: int) -> Tensor:
    """[E, B, C, H, W] or shared [B, C, H, W] -> [B, E C, H, W], the form of a grouped conv."""
    x = x if x.dim() == 5 else x.expand(networks, *x.shape)
    return x.transpose(0, 1).flatten(1, 2)


def _one_by_one(y: Tensor, networks: int) -> Tensor:
    """[B, E C, H, W] -> [E, B, C, H, W]."""
    return y.unflatten(1, (networks, -1)).transpose(0, 1).contiguous()


# ---- exact selection -------------------------------------------------------------------------


def keep_top(
    scores: list[Tensor], masks: list[Tensor], count: int, seed: int, streams: list[int]
) -> list[Tensor]:
    """Masks of the `count` kept entries scored highest over all tensors together.

    Order: score, then the random word (seed, stream, index), both descending; then position.
    """
    kept = [mask.flatten().nonzero().squeeze(1) for mask in masks]
    values = [s.flatten()[k] for s, k in zip(scores, kept, strict=True)]
    for i, v in enumerate(values):
        if v.is_floating_point() and v.isnan().any():
            raise ValueError(f"scores[{i}] holds NaN at {int(v.isnan().sum())} kept entries.")
    ties = [
        random_words(s.numel(), seed, stream, 0, s.device)[k].to(torch.int64) & 0xFFFFFFFF
        for s, k, stream in zip(scores, kept, streams, strict=True)
    ]
    value, tie = torch.cat(values), torch.cat(ties)
    if count > len(value):
        raise ValueError(f"count is {count}, but only {len(value)} entries are kept so far.")
    order = tie.argsort(descending=True, stable=True)
    order = order[value[order].argsort(descending=True, stable=True)]
    chosen = torch.zeros_like(value, dtype=torch.bool).index_fill(0, order[:count], True)
    return [
        torch.zeros_like(mask).flatten().index_put((k,), part).view(mask.shape)
        for mask, k, part in zip(masks, kept, chosen.split([len(k) for k in kept]), strict=True)
    ]


# ---- counter-based randomness ----------------------------------------------------------------
# Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
# key = seed (64 bits); counter = (block, low and high; stream; step), each 32 bits.

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Ten rounds on 32-bit words held in NumPy uint64 arrays or torch int64 tensors.

    A product of two 32-bit words wraps in int64 but keeps its bits, so both give the same words.
    """
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def random_words(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    """[count] int32, the bits of uint32 words: element i is word i % 4 of block i // 4."""
    blocks, key = -(-count // 4), (seed & _LOW, (seed >> 32) & _LOW)
    if torch.device(device).type == "cpu":
        index = np.arange(blocks, dtype=np.uint64)
        c2, c3 = (np.full(blocks, v, np.uint64) for v in (stream, step))
        words = np.stack(philox(index & _LOW, index >> 32, c2, c3, *key), -1)
        return torch.from_numpy(words.astype(np.uint32).reshape(-1)[:count].view(np.int32))
    index = torch.arange(blocks, device=device)
    c2, c3 = (torch.full_like(index, v) for v in (stream, step))
    words = torch.stack(philox(index & _LOW, index >> 32, c2, c3, *key), -1)
    return words.flatten()[:count].to(torch.int32)


def random_signs(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    """[count] float32, +1 or -1: bit i % 32 of word i // 32, 1 = plus."""
    words = random_words(-(-count // 32), seed, stream, step, device)
    bits = (words.unsqueeze(1) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return (2 * bits - 1).flatten()[:count].to(torch.float32)


def random_uniform(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    """[count] float32 in [0, 1): the upper 24 bits of a word, times 2^-24."""
    words = random_words(count, seed, stream, step, device)
    return ((words >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def random_normal(
    count: int, seed: int, stream: int, step: int, table: Tensor, device: Any = "cpu"
) -> Tensor:
    """[count] float32: the quantile table[h & 0x7fff] 2^-20 of halfword h, minus if h >= 0x8000.

    Element i takes halfword i % 2 (low first) of word i // 2. table: [32768] int32.
    """
    words = random_words(-(-count // 2), seed, stream, step, device)
    half = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), -1).flatten()[:count]
    value = table.to(words.device)[half & 0x7FFF].to(torch.float32) * 2.0**-20
    return torch.where(half >= 0x8000, -value, value)


# ---- learned masks ---------------------------------------------------------------------------


def sample_mask(score: Tensor, key: Tensor) -> Tensor:
    """Bernoulli(sigmoid(score)) as 0 / 1 in the score's dtype.

    An integer draw of 24 bits is compared with floor(sigmoid(score) 2^24). key: int64 (seed,
    stream, step), [3], or [E, 3] for score [E, ...]; element indices count within a network.
    """
    networks = score if key.dim() == 2 else score.unsqueeze(0)
    count = networks[0].numel() if networks.shape[0] else 0
    seed, stream, step = key.view(-1, 3, 1).unbind(1)  # [E, 1] each
    block = torch.arange(-(-count // 4), device=score.device).unsqueeze(0)
    zero = torch.zeros_like(seed + block)
    words = philox(
        zero + (block & _LOW), zero + (block >> 32), zero + stream, zero + step,
        seed & _LOW, (seed >> 32) & _LOW,
    )  # fmt: skip
    draw = torch.stack(words, -1).flatten(1)[:, :count].view_as(networks) >> 8
    probability = torch.sigmoid(networks.to(torch.float32))
    threshold = (probability * 2.0**24).nan_to_num(0.0).to(torch.int64)
    return (draw < threshold).to(score.dtype).view_as(score)
