"""Learned masks of convolutions: the dense library on w m r, and dscore from its dW.

Weights of a convolution are small beside its activations, so what is fused here is all that
happens to weights: one pass makes w m r, one pass turns dW into dscore (and dw).
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.masked.reference import conv2d, conv2d_backward
from lottery_sparse.ops.supermask.arguments import SupermaskArgs
from lottery_sparse.ops.supermask.triton import gradient_of_score, through_r
from lottery_sparse.ops.triton import limits
from lottery_sparse.ops.triton.linear_products import or_
from lottery_sparse.ops.triton.sources import TENSOR_
from lottery_sparse.ops.triton.tiles import load_bits, scale_of, source

BLOCK = 1024
# A network's ⟨dW, w m⟩ is summed by so many programs, then in their order.
PROGRAMS = 64


@triton.jit
def _source(weight, signs, i, e, size, K, stride, inside, KIND: tl.constexpr):
    """w of entry i of network e, or 1 and -1, in float32."""
    if KIND == TENSOR_:
        w = tl.load(weight + e * size + i, mask=inside, other=0.0).to(tl.float32)
    else:
        signs += e * (size // K) * stride
        w = tl.where(load_bits(signs, stride, i // K, i % K, inside), 1.0, -1.0)
    return w


@triton.jit
def _effective(
    weight, bits, kept, signs, out, size, K, stride,
    KIND: tl.constexpr, RESCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = w m r of network program_id(1)."""
    e = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, row, column = i < size, i // K, i % K
    words = e * (size // K) * stride
    scale = scale_of(weight, kept, e, size.to(tl.float32), KIND, RESCALE)
    w = _source(weight, signs, i, e, size, K, stride, inside, KIND)
    mask = load_bits(bits + words, stride, row, column, inside)
    value = tl.where(mask, w * scale, 0.0)
    tl.store(out + e * size + i, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _inner(
    d, weight, bits, signs, products, size, K, stride,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """products[e, program]: its part of ⟨d, w m⟩."""
    e = tl.program_id(1).to(tl.int64)
    words = e * (size // K) * stride
    sum = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside, row, column = i < size, i // K, i % K
        mask = load_bits(bits + words, stride, row, column, inside)
        w = _source(weight, signs, i, e, size, K, stride, mask, KIND)
        gradient = tl.load(d + e * size + i, mask=mask, other=0.0).to(tl.float32)
        sum += tl.where(mask, gradient * w, 0.0)
    to = products + e * tl.num_programs(0) + tl.program_id(0)
    tl.store(to, tl.sum(sum, 0))


@triton.jit(do_not_specialize=["count"])
def _gradients(
    d, score, weight, bits, kept, signs, products, dw, dscore, size, K, stride, count,
    KIND: tl.constexpr, RESCALE: tl.constexpr, DW: tl.constexpr, DSCORE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dw = scale d where kept, else 0; dscore as in `supermask_linear_backward`."""
    e = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, row, column = i < size, i // K, i % K
    words, to = e * (size // K) * stride, e * size + i
    scale = scale_of(weight, kept, e, size.to(tl.float32), KIND, RESCALE)
    scaled = scale * tl.load(d + to, mask=inside, other=0.0).to(tl.float32)
    if DW:
        mask = load_bits(bits + words, stride, row, column, inside)
        tl.store(dw + to, tl.where(mask, scaled, 0.0).to(dw.dtype.element_ty), mask=inside)
    if DSCORE:
        dm = scaled * _source(weight, signs, i, e, size, K, stride, inside, KIND)
        dm -= scale * through_r(products, kept, e, count, RESCALE)
        s = tl.load(score + to, mask=inside, other=0.0)
        tl.store(dscore + to, gradient_of_score(dm, s).to(dscore.dtype.element_ty), mask=inside)


def why_not(a: SupermaskArgs, dy: Tensor | None = None, *needs: bool) -> str | None:
    networks, size, _ = _sizes(a.score)
    return limits.why_not((*a, dy), networks=networks, longest=size)


@dispatch.limited(why_not)
def supermask_conv2d(a: SupermaskArgs) -> Tensor:
    return conv2d(a.x, _effective_weight(a), a.bias, a.geometry)


@dispatch.limited(why_not)
def supermask_conv2d_backward(
    a: SupermaskArgs, dy: Tensor, need_dx: bool, need_dw: bool, need_dscore: bool
) -> tuple[Tensor, Tensor, Tensor]:
    score, weight, bits, kept, signs = a.score, a.weight, a.bits, a.kept, a.signs
    w = torch.empty_like(score, dtype=a.x.dtype)  # only its shape is asked for where no dx is
    if need_dx:
        w = _effective_weight(a)
    dx, d = conv2d_backward(dy, a.x, w, a.geometry, need_dx, need_dw or need_dscore)
    dw = torch.empty_like(score, dtype=a.x.dtype) if need_dw else weight.new_empty(0)
    dscore = torch.empty_like(score) if need_dscore else score.new_empty(0)
    if not d.numel():
        return dx, dw, dscore
    d, score, weight, bits = (t.contiguous() for t in (d, score, weight, bits))
    networks, size, columns = _sizes(score)
    through = need_dscore and kept is not None
    count = min(PROGRAMS, triton.cdiv(size, BLOCK))
    products = d.new_empty((networks, count if through else 0), dtype=torch.float32)
    kind, plus = {"KIND": source(weight, signs)}, or_(signs, bits)
    with torch.cuda.device_of(a.x):
        if through:
            _inner[count, networks](
                d, weight, bits, plus, products, size, columns, bits.shape[-1],
                BLOCK=BLOCK, **kind,
            )  # fmt: skip
        _gradients[triton.cdiv(size, BLOCK), networks](
            d, score, weight, bits, or_(kept, bits), plus, products, dw, dscore,
            size, columns, bits.shape[-1], count, RESCALE=kept is not None, DW=need_dw,
            DSCORE=need_dscore, BLOCK=BLOCK, **kind,
        )  # fmt: skip
    return dx, dw, dscore


def _effective_weight(a: SupermaskArgs) -> Tensor:
    score, weight, bits, kept, signs = a.score, a.weight, a.bits, a.kept, a.signs
    out = torch.empty(score.shape, dtype=a.x.dtype, device=a.x.device)
    networks, size, columns = _sizes(score)
    if out.numel():
        with torch.cuda.device_of(a.x):
            _effective[triton.cdiv(size, BLOCK), networks](
                weight.contiguous(), bits.contiguous(), or_(kept, bits), or_(signs, bits), out,
                size, columns, bits.shape[-1], KIND=source(weight, signs), RESCALE=kept is not None,
                BLOCK=BLOCK,
            )  # fmt: skip
    return out


def _sizes(score: Tensor) -> tuple[int, int, int]:
    """Networks, weights of each, and columns of the packed rows."""
    return (
        score.shape[0] if score.dim() == 5 else 1,
        score.shape[-4:].numel(),
        score.shape[-3:].numel(),
    )
