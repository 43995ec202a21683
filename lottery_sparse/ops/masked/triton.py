"""masked_linear with the mask and the frozen values applied as the weight's tiles are loaded."""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.masked.arguments import MaskedArgs
from lottery_sparse.ops.triton import limits
from lottery_sparse.ops.triton.linear_products import Effective, backward, dw_tile, forward
from lottery_sparse.ops.triton.tiles import (
    Parts,
    aligned,
    alignment,
    finish,
    in_order,
    precision,
    shifts,
    spread,
    tile_of_grid,
)


@triton.jit(do_not_specialize=["B", "steps"])
def _dw(
    dy, x, mask, shift, dw,
    B, N, K, x_network, mask_stride, steps, part,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    PACKED: tl.constexpr, EDGE: tl.constexpr,
    N_BY: tl.constexpr, K_BY: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dw[e, n, k] = sum over b of dy[e, b, n] x[e, b, k] where kept, else 0."""
    N, K = aligned(N, N_BY), aligned(K, K_BY)
    row_tile, column_tile = in_order(N, K, ROWS, BATCH)
    n0, k0 = row_tile * ROWS, column_tile * BATCH
    e = tl.program_id(2).to(tl.int64)
    s = tl.program_id(1)
    sum = dw_tile(
        dy + e * B * N, x + e * x_network, B, N, K, n0, k0,
        s * steps * DEPTH, tl.minimum((s + 1) * steps * DEPTH, B),
        ROWS, BATCH, DEPTH, EDGE, PRECISION, WIDEN,
    )  # fmt: skip
    n, k = tl.arange(0, ROWS), tl.arange(0, BATCH)
    at = (n * K)[:, None] + k[None, :]
    inside = (n < N - n0)[:, None] & (k < K - k0)[None, :]
    first = (e * N + n0) * K + k0
    if PACKED:
        word = tl.arange(0, BATCH // 32)
        listed = (n < N - n0)[:, None] & (word < mask_stride - (k0 >> 5))[None, :]
        mask += (e * N + n0) * mask_stride + (k0 >> 5)
        words = tl.load(mask + (n * mask_stride)[:, None] + word[None, :], mask=listed, other=0)
        kept = spread(words, tl.load(shift + tl.arange(0, 32)))
    else:
        kept = tl.load(mask + first + at, mask=inside, other=0) != 0
    dw += s * part + first
    tl.store(dw + at, tl.where(kept, sum, 0.0).to(dw.dtype.element_ty), mask=inside)


def why_not(a: MaskedArgs, dy: Tensor | None = None, *needs: bool) -> str | None:
    networks = a.weight.shape[0] if a.weight.dim() > 2 else 1
    return limits.why_not((*a, dy), limits.sizes_of(a.x, a.weight, dy), networks)


@dispatch.limited(why_not)
def masked_linear(a: MaskedArgs) -> Tensor:
    return forward(a.x, Effective(a.weight.shape, a.weight, a.mask, a.frozen, a.signs), a.bias)


@dispatch.limited(why_not)
def masked_linear_backward(
    a: MaskedArgs, dy: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    x, w = a.x, Effective(a.weight.shape, a.weight, a.mask, a.frozen, a.signs)
    dx, _ = backward(dy, x, w, need_dx)
    dw = torch.empty(w.shape, dtype=x.dtype, device=x.device) if need_dw else x.new_empty(0)
    if dw.numel():
        dy, x, (_, mask, *_) = dy.contiguous(), x.contiguous(), w.tensors()
        (rows, columns), batch = w.shape[-2:], x.shape[-2]
        shape = tile_of_grid(x.dtype, rows, columns, w.networks)
        parts = Parts.of(rows, columns, triton.cdiv(batch, shape["DEPTH"]), w.networks, shape)
        out = parts.workspace(dw)
        ragged = rows % shape["ROWS"] or columns % shape["BATCH"] or batch % shape["DEPTH"]
        with torch.cuda.device_of(x):
            _dw[parts.grid](
                dy, x, mask, shifts(x.device), out, batch, rows, columns,
                0 if x.dim() == 2 else batch * columns, mask.shape[-1], parts.steps, dw.numel(),
                PACKED=mask.dtype == torch.int32, EDGE=bool(ragged),
                **alignment(rows, columns), **precision(x.dtype), **shape,
            )  # fmt: skip
            if out is not dw:
                finish(out, None, dw)
    return dx, dw
