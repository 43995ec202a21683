"""supermask_linear and supermask_conv2d: layers whose mask is learned, drawn anew each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lottery_sparse.ops.bits.op import pack_mask
from lottery_sparse.ops.bits.reference import mask_as_bool, words_per_row
from lottery_sparse.ops.common.autograd import Direct, cast_all_of
from lottery_sparse.ops.common.checks import (
    SignConstant,
    check_bits,
    check_devices,
    check_like_x,
    check_x_of_linear,
    split_source,
)
from lottery_sparse.ops.common.product import Product, ProductBackward
from lottery_sparse.ops.masked.arguments import GEOMETRY
from lottery_sparse.ops.masked.conv2d import Pair, checked_images
from lottery_sparse.ops.supermask.sampling import keyed


def sample_bits(score: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The mask of `sample_mask` as bits, and its number of ones.

    >>> bits, kept = ls.ops.sample_bits(torch.zeros(10, 20), ls.random.key(seed=0))
    >>> int(ls.ops.unpack_mask(bits, 20).sum()) == int(kept)
    True

    Args:
        score: [N, K], any floating dtype; or [E, N, K] for E networks.
        key: int64 [3], or [E, 3], as for `sample_mask`.

    Returns:
        bits: int32 [N, W] or [E, N, W], packed as by `pack_mask`.
        kept: int64 [] or [E], the ones of each network. Neither has a gradient.

    Raises:
        ValueError: score or key has another dtype, shape or device.
    """
    if score.dim() not in (2, 3):
        raise ValueError(
            f"score must be [N, K], or [E, N, K] with a key each, got shape {tuple(score.shape)}; "
            "flatten the kernels of a convolution to [O, I kh kw]."
        )
    _check_key(score, key, score.shape[:-2])
    return _draw(score.detach(), key)


def supermask_linear(
    x: Tensor,
    score: Tensor,
    weight: Tensor | SignConstant,
    key: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    rescale: bool = False,
) -> Tensor:
    """Linear layer under a mask drawn from its scores: y = x (w m r)ᵀ + b.

    m ~ Bernoulli(p), p = sigmoid(score), one draw per call; r = 1, or with `rescale` the number
    of weights over the number of ones. A leading dimension E on the score (and weight, key, bias)
    computes E networks side by side.

    >>> score = torch.zeros(10, 20, requires_grad=True)  # each weight with probability 1/2
    >>> y = ls.ops.supermask_linear(x, score, weight, ls.random.key(seed=0), rescale=True)
    >>> y.sum().backward()  # to score.grad

    Args:
        x: [..., K], any floating dtype; for E networks [B, K], shared by all, or [E, B, K].
        score: [N, K] or [E, N, K], any floating dtype, which autocast leaves as it is.
        weight: like `score`, in the dtype of `x` (any under autocast), or a `SignConstant`,
            which has no gradient.
        key: int64 [3] or [E, 3] from which m is drawn exactly as `sample_mask` does; add 1 to its
            last element for the next step.
        bias: [N] or [E, N], or None. Never masked.
        mask: instead of `key` a given m: bool like `score`, or packed int32 (`sample_bits`,
            `pack_mask`), for one draw used twice, or `pack_mask(score > 0)` to evaluate.
        rescale: dynamic weight rescaling. A mask without ones counts as one with a single one.

    Returns:
        [..., N], or [E, B, N]; dtype of `x`.

    Gradients: straight through to the probability, dm = dW w r with dW that of the effective
    weight w m r, dscore = dm p (1 − p). r depends on m, so with `rescale` every entry of dm gets
    −⟨dW, w m⟩ r / ones as well. dx and dbias as usual; dw = where(m, dW r, 0) if the weight
    requires it. m is kept as bits, so forward and backward agree.
    Differentiable once.

    Raises:
        ValueError: a shape, dtype or device does not fit, or not exactly one of key and mask is
            given; the message names the argument.

    Source: Zhou et al. 2019, "Deconstructing Lottery Tickets", section 4 and its dynamic weight
    rescaling, whose factor is not detached in their code either.
    """
    plain = isinstance(weight, Tensor)
    values, signs = (weight, None) if plain else split_weight(x, score, weight, rank=2)
    check_supermask(x, score, values, key, mask, bias, signs, rank=2)
    check_x_of_linear("score", score, x)
    bits, kept = bits_and_kept(score, key, mask, rescale, rank=2)
    if score.dim() == 3:
        return _linear(x, score, values, bits, kept, bias, signs)
    rows = x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0) if x.dim() == 1 else x
    y = _linear(rows, score, values, bits, kept, bias, signs)
    return y.view(x.shape[:-1] + (score.shape[0],))


def supermask_conv2d(
    x: Tensor,
    score: Tensor,
    weight: Tensor | SignConstant,
    key: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    mask: Tensor | None = None,
    rescale: bool = False,
) -> Tensor:
    """2-D convolution under a mask drawn from its scores: F.conv2d with w m r.

    >>> kernels = torch.randn(16, 3, 3, 3)
    >>> score, key = torch.zeros(16, 3, 3, 3), ls.random.key(seed=0)
    >>> ls.ops.supermask_conv2d(images, score, kernels, key, padding=1).shape
    torch.Size([4, 16, 8, 8])

    Args:
        x: [B, C, H, W] or [C, H, W], any floating dtype; for E networks [B, C, H, W], shared by
            all, or [E, B, C, H, W].
        score: [O, C / groups, kh, kw] or [E, O, C / groups, kh, kw], any floating dtype.
        weight, key, bias, mask, rescale: as in `supermask_linear`; a packed mask is [O, W], its
            columns the flattened [C / groups, kh, kw].
        stride, padding, dilation, groups: as in F.conv2d; padding also "same" or "valid".

    Returns:
        [B, O, H', W'], [O, H', W'] or [E, B, O, H', W']; dtype of `x`.

    Gradients: as in `supermask_linear`.

    Raises:
        ValueError: as in `supermask_linear`.
    """
    plain = isinstance(weight, Tensor)
    values, signs = (weight, None) if plain else split_weight(x, score, weight, rank=4)
    check_supermask(x, score, values, key, mask, bias, signs, rank=4)
    x, geometry = checked_images("score", score, x, stride, padding, dilation, groups)
    bits, kept = bits_and_kept(score, key, mask, rescale, rank=4)
    batched = x.unsqueeze(0) if x.dim() == 3 else x
    y = _conv2d(batched, score, values, bits, kept, bias, signs, *geometry)
    return y.squeeze(0) if x.dim() == 3 else y


# ---- check ---------------------------------------------------------------------------------------


def split_weight(
    x: Tensor, score: Tensor, weight: Tensor | SignConstant, rank: int
) -> tuple[Tensor, Tensor | None]:
    """The source as the two tensors (weight, signs) that the schemas take."""
    if isinstance(weight, Tensor):
        return weight, None
    values, signs = split_source(weight, score, x.dtype, rank)
    if values.requires_grad:
        raise ValueError("the constant of a SignConstant requires grad; detach it.")
    return values, signs


def _check_key(score: Tensor, key: Tensor, networks: torch.Size) -> None:
    if not score.is_floating_point():
        raise ValueError(f"score must be of a floating dtype, got {score.dtype}.")
    if key.dtype != torch.int64 or tuple(key.shape) != (*networks, 3):
        raise ValueError(
            f"key must be int64 {[*networks, 3]} for score {tuple(score.shape)}, got {key.dtype} "
            f"of shape {tuple(key.shape)}; use ls.random.key(seed, stream, step) per network."
        )
    if key.device != score.device:
        raise ValueError(f"key is on {key.device}, but score is on {score.device}; move one.")


def check_supermask(
    x: Tensor,
    score: Tensor,
    weight: Tensor,
    key: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    signs: Tensor | None,
    rank: int,
) -> None:
    """Shapes, dtypes and devices; rank 2 = linear, 4 = convolution."""
    if score.dim() not in (rank, rank + 1):
        layout = "[N, K]" if rank == 2 else "[O, I, kh, kw]"
        raise ValueError(
            f"score must be {layout} or have one more leading dimension for networks side by "
            f"side, got shape {tuple(score.shape)}."
        )
    networks = score.shape[:-rank]
    if (key is None) == (mask is None):
        got = "neither" if key is None else "both"
        raise ValueError(f"exactly one of key and mask must be given, got {got}.")
    if key is not None:
        wanted = torch.int64, score.device, (*networks, 3)
        if (key.dtype, key.device, key.shape) != wanted:
            _check_key(score, key, networks)
    if mask is not None:
        check_bits("mask", mask, score, rank, "True = kept")
    if signs is not None:
        check_bits("signs", signs, score, rank, "1 = plus", packed_only=True)
        if weight.shape != networks:
            raise ValueError(
                f"constant must be one number, or one per network of score "
                f"{tuple(score.shape)}, got shape {tuple(weight.shape)}."
            )
    elif weight.shape != score.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but score has {tuple(score.shape)}; "
            "they must be equal (for sign x constant pass ops.SignConstant)."
        )
    if bias is not None and bias.shape != networks + (score.shape[-rank],):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, but score {tuple(score.shape)} "
            f"needs {tuple(networks) + (score.shape[-rank],)}."
        )
    if not score.is_floating_point():
        raise ValueError(f"score must be of a floating dtype, got {score.dtype}.")
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating dtype, got {x.dtype}.")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and (value.dtype, value.device) != (x.dtype, x.device):
            check_like_x(name, value, x)
    if score.device != x.device or mask is not None or signs is not None:
        check_devices(x, score=score, mask=mask, signs=signs)


def bits_and_kept(
    score: Tensor, key: Tensor | None, mask: Tensor | None, rescale: bool, rank: int
) -> tuple[Tensor, Tensor | None]:
    """The bits to use, drawn or given, and what rescales."""
    if key is not None:
        flat = score.detach().flatten(1 - rank) if rank > 2 else score.detach()
        bits, kept = _draw(flat, key)
        return bits, kept if rescale else None
    assert mask is not None
    bits = pack_mask(mask.flatten(1 - rank)) if mask.dtype == torch.bool else mask
    if not rescale:
        return bits, None
    return bits, mask_as_bool(mask, score, rank).flatten(-rank).sum(-1)


# ---- sample_bits ---------------------------------------------------------------------------------


class SampleBits(Direct):
    def fake(self, score: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        words = words_per_row(score.shape[-1])
        bits = score.new_empty(score.shape[:-1] + (words,), dtype=torch.int32)
        return bits, score.new_empty(score.shape[:-2], dtype=torch.int64)

    def vmap(
        self, info: Any, in_dims: tuple, score: Tensor, key: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple]:
        score, key = keyed(info.batch_size, in_dims, score, key)
        if key.dim() == 2:
            return self(score, key), (0, 0)
        drawn = self(score.flatten(0, 1), key.flatten(0, 1))
        bits, kept = (part.unflatten(0, key.shape[:2]) for part in drawn)
        return (bits, kept), (0, 0)


torch.library.define(
    "lottery_sparse::sample_bits", "(Tensor score, Tensor key) -> (Tensor, Tensor)"
)
_draw = SampleBits("sample_bits")


# ---- the products --------------------------------------------------------------------------------
#
# forward   (x, score, weight, bits, kept, bias, signs, *geometry) -> y
# backward  (dy, x, score, weight, bits, kept, signs, *geometry, need_dx, need_dw, need_dscore)
#           -> (dx, dw, dscore)


class SupermaskProduct(Product):
    def save(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, score, weight, bits, kept, _, signs, *ctx.geometry = inputs
        ctx.save_for_backward(x, score, weight, bits, kept, signs)

    def gradients(self, ctx: Any, dy: Tensor) -> tuple:
        need_dx, need_dscore, need_dw, _, _, need_db, *_ = ctx.needs_input_grad
        needs = need_dx, need_dw, need_dscore
        dx = dw = dscore = None
        if any(needs):
            dx, dw, dscore = self.backward(dy, *ctx.saved_tensors, *ctx.geometry, *needs)
        return (
            dx if need_dx else None,
            dscore if need_dscore else None,
            dw if need_dw else None,
            None,
            None,
            dy.sum(self.bias_dims) if need_db else None,
            *(None,) * (1 + len(ctx.geometry)),  # signs
        )

    def cast(self, args: tuple, device: str) -> tuple:
        """All but the score: it takes steps that the lower precisions do not resolve."""
        x, score, *others = args
        x, *others = cast_all_of((x, *others), device)
        return x, score, *others


class SupermaskBackward(ProductBackward):
    def save(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        """Nothing, since `gradients` raises."""

    def gradients(self, ctx: Any, *grads: Tensor) -> tuple:
        raise NotImplementedError(
            f"{self.product.stem} is differentiable once; for second derivatives multiply the "
            "weight by ops.sample_mask(score, key) and call torch.nn.functional."
        )


def _product(stem: str, rank: int, geometry: str = "") -> SupermaskProduct:
    torch.library.define(
        f"lottery_sparse::{stem}",
        "(Tensor x, Tensor score, Tensor weight, Tensor bits, Tensor? kept, Tensor? bias, "
        f"Tensor? signs{geometry}) -> Tensor",
    )
    torch.library.define(
        f"lottery_sparse::{stem}_backward",
        "(Tensor dy, Tensor x, Tensor score, Tensor weight, Tensor bits, Tensor? kept, "
        f"Tensor? signs{geometry}, bool need_dx, bool need_dw, bool need_dscore) "
        "-> (Tensor, Tensor, Tensor)",
    )
    return SupermaskProduct(stem, rank, SupermaskBackward, tensors=7)


_linear = _product("supermask_linear", rank=2)
_conv2d = _product("supermask_conv2d", rank=4, geometry=GEOMETRY)
