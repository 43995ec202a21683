"""Learned masks: products under drawn bits, and dscore straight out of dyᵀ x.

Signs enter the products as 1, -1 and 0, exact in every dtype; constants and the rescaling factor
multiply the sums.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.supermask.arguments import SupermaskArgs
from lottery_sparse.ops.supermask.triton_sampling import one_and_exp
from lottery_sparse.ops.triton import limits
from lottery_sparse.ops.triton.linear_products import Effective, backward, dw_tile, forward
from lottery_sparse.ops.triton.sources import TENSOR_
from lottery_sparse.ops.triton.tiles import (
    aligned,
    in_order,
    load_spread,
    precision,
    scale_of,
    spread,
)

# Tiles of dscore: bytes rule, so several programs share a multiprocessor.
_GRADIENT = {
    "half": {"ROWS": 128, "BATCH": 64, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
    "tf32": {"ROWS": 128, "BATCH": 64, "DEPTH": 32, "num_warps": 8, "num_stages": 3},
    "ieee": {"ROWS": 64, "BATCH": 64, "DEPTH": 32, "num_warps": 8, "num_stages": 3},
}


@triton.jit
def through_r(products, kept, e, count, RESCALE: tl.constexpr):
    """⟨dyᵀ x, w m⟩ / ones of network e, its parts added in order; 0 without rescaling."""
    if RESCALE:
        sum = tl.zeros((256,), tl.float32)
        for first in range(0, count, 256):
            i = first + tl.arange(0, 256)
            sum += tl.load(products + e * count + i, mask=i < count, other=0.0)
        return tl.sum(sum, 0) / tl.maximum(tl.load(kept + e), 1).to(tl.float32)
    return 0.0


@triton.jit
def gradient_of_score(dm, score):
    """dm p (1 − p)"""
    p = 1.0 / one_and_exp(score)
    return dm * p * (1.0 - p)


@triton.jit(do_not_specialize=["B", "count"])
def _dscore(
    dy, x, score, weight, bits, kept, signs, shift, products, dw, dscore,
    B, N, K, x_network, stride, signs_stride, size, count,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    WEIGHT: tl.constexpr, RESCALE: tl.constexpr,
    DW: tl.constexpr, DSCORE: tl.constexpr, EDGE: tl.constexpr,
    N_BY: tl.constexpr, K_BY: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """From d = dyᵀ x: dw = scale d where kept, else 0; dscore = scale (d w − through r) p (1 − p).

    Nothing else of the size of the weight is written. BATCH: columns, those of the product.
    """
    N, K = aligned(N, N_BY), aligned(K, K_BY)
    row_tile, column_tile = in_order(N, K, ROWS, BATCH)
    n0, k0 = row_tile * ROWS, column_tile * BATCH
    e = tl.program_id(2).to(tl.int64)
    sum = dw_tile(
        dy + e * B * N, x + e * x_network, B, N, K, n0, k0, tl.zeros((), tl.int32), B,
        ROWS, BATCH, DEPTH, EDGE, PRECISION, WIDEN,
    )  # fmt: skip
    sum *= scale_of(weight, kept, e, size, WEIGHT, RESCALE)
    n, k = tl.arange(0, ROWS), tl.arange(0, BATCH)
    at = (n * K)[:, None] + k[None, :]
    inside = (n < N - n0)[:, None] & (k < K - k0)[None, :]
    first = (e * N + n0) * K + k0
    word = tl.arange(0, BATCH // 32)
    listed = (n < N - n0)[:, None] & (word < stride - (k0 >> 5))[None, :]
    first_word = (e * N + n0) * stride + (k0 >> 5)
    at_word = (n * stride)[:, None] + word[None, :]
    shift = tl.load(shift + tl.arange(0, 32))
    if DW:
        mask = spread(tl.load(bits + first_word + at_word, mask=listed, other=0), shift)
        value = tl.where(mask, sum, 0.0).to(dw.dtype.element_ty)
        tl.store(dw + first + at, value, mask=inside)
    if DSCORE:
        if WEIGHT == TENSOR_:
            dm = sum * tl.load(weight + first + at, mask=inside, other=0.0).to(tl.float32)
        else:
            plus = load_spread(
                signs + (e * N + n0) * signs_stride + (k0 >> 5), tl.minimum(n, N - 1 - n0),
                signs_stride, shift, BATCH, False,
            )  # fmt: skip
            dm = tl.where(plus, sum, -sum)
        if RESCALE:
            scale = scale_of(weight, kept, e, size, WEIGHT, RESCALE)
            dm -= scale * through_r(products, kept, e, count, RESCALE)
        s = tl.load(score + first + at, mask=inside, other=0.0).to(tl.float32)
        value = gradient_of_score(dm, s).to(dscore.dtype.element_ty)
        tl.store(dscore + first + at, value, mask=inside)


def why_not(a: SupermaskArgs, dy: Tensor | None = None, *needs: bool) -> str | None:
    networks = a.score.shape[0] if a.score.dim() > 2 else 1
    return limits.why_not((*a, dy), limits.sizes_of(a.x, a.score, dy), networks)


@dispatch.limited(why_not)
def supermask_linear(a: SupermaskArgs) -> Tensor:
    w = Effective(a.score.shape, a.weight, a.bits, None, a.signs, a.kept)
    return forward(a.x, w, a.bias)


@dispatch.limited(why_not)
def supermask_linear_backward(
    a: SupermaskArgs, dy: Tensor, need_dx: bool, need_dw: bool, need_dscore: bool
) -> tuple[Tensor, Tensor, Tensor]:
    w = Effective(a.score.shape, a.weight, a.bits, None, a.signs, a.kept)
    dx, products = backward(dy, a.x, w, need_dx, need_dscore and a.kept is not None)
    dw = torch.empty_like(a.score, dtype=a.x.dtype) if need_dw else a.weight.new_empty(0)
    dscore = torch.empty_like(a.score) if need_dscore else a.score.new_empty(0)
    _fill(dy, a.x, a.score, w, products, dw, dscore)
    return dx, dw, dscore


def _fill(
    dy: Tensor,
    x: Tensor,
    score: Tensor,
    w: Effective,
    products: Tensor,
    dw: Tensor,
    dscore: Tensor,
) -> None:
    """dw and dscore, where not empty."""
    if not dw.numel() and not dscore.numel():
        return
    dy, x, score = dy.contiguous(), x.contiguous(), score.contiguous()
    weight, bits, _, signs, kept, shift = w.tensors()
    kinds = {name: kind for name, kind in w.kinds().items() if name != "FROZEN"}
    (rows, columns), batch = w.shape[-2:], x.shape[-2]
    options = precision(x.dtype)
    shape = _GRADIENT[options["PRECISION"] if x.dtype == torch.float32 else "half"]
    across, down = triton.cdiv(columns, shape["BATCH"]), triton.cdiv(rows, shape["ROWS"])
    ragged = rows % shape["ROWS"] or columns % shape["BATCH"] or batch % shape["DEPTH"]
    with torch.cuda.device_of(x):
        _dscore[across * down, 1, w.networks](
            dy, x, score, weight, bits, kept, signs, shift, products, dw, dscore,
            batch, rows, columns, 0 if x.dim() == 2 else batch * columns, *w.strides(),
            products.shape[1], DW=dw.numel() > 0, DSCORE=dscore.numel() > 0, EDGE=bool(ragged),
            **kinds, **options, **shape,
        )  # fmt: skip
