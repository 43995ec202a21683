"""What every op asks of its tensors. A message names the argument, what came, what was wanted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lottery_sparse.ops.bits.reference import pack_mask, words_per_row


class SignConstant(NamedTuple):
    """The source sign x constant: +constant where the sign bit is 1, else -constant.

    signs: packed int32 like a packed mask, [..., N, W]. constant: [] or, per network, [E].

    >>> source = ls.ops.SignConstant.of(weight, 0.05)
    >>> ls.ops.masked_linear(x, weight, mask, frozen=source).shape
    torch.Size([8, 10])
    """

    signs: Tensor
    constant: Tensor

    @classmethod
    def of(cls, weight: Tensor, constant: float | Tensor, rank: int | None = None) -> SignConstant:
        """The signs of `weight` (0 counts as plus) with one constant.

        rank: dimensions of one weight when `weight` is replicated; default: it is not.
        """
        networks = weight.dim() - (weight.dim() if rank is None else rank)
        positive = (weight >= 0).flatten(networks + 1)
        constant = torch.as_tensor(constant, dtype=weight.dtype, device=weight.device)
        return cls(pack_mask(positive), constant)


Frozen = Tensor | SignConstant | None

# the devices on which autocast casts our ops, and its dispatch keys there
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def autocasts(device: str) -> bool:
    return device in AUTOCAST_KEYS and torch.is_autocast_enabled(device)


def as_constant(constant: float | Tensor, device: torch.device) -> Tensor:
    """The constant of a SignConstant on a device: one number, which moves by itself."""
    if isinstance(constant, Tensor) and constant.is_meta and device.type != "meta":
        raise ValueError(f"constant is on meta, which holds no number, but x is on {device}.")
    return torch.as_tensor(constant, device=device)


def split_frozen(frozen: Frozen, weight: Tensor, rank: int) -> tuple[Tensor | None, Tensor | None]:
    """A source as the two tensors (frozen, signs) that the schemas take."""
    if isinstance(frozen, SignConstant):
        return split_source(frozen, weight, weight.dtype, rank)
    if frozen is not None and not isinstance(frozen, Tensor):
        raise TypeError(
            f"frozen must be a tensor, a SignConstant or None (zero), got {type(frozen).__name__}."
        )
    return frozen, None


def split_source(
    source: SignConstant, weight: Tensor, dtype: torch.dtype, rank: int
) -> tuple[Tensor, Tensor]:
    """(constants, signs) of the networks of `weight`; a constant of all is expanded to each."""
    constant = as_constant(source.constant, weight.device).to(dtype)
    return constant.expand(weight.shape[:-rank]) if constant.dim() == 0 else constant, source.signs


def check_masked(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    frozen: Tensor | None,
    signs: Tensor | None,
    rank: int,
) -> None:
    """Shapes, dtypes and devices of a masked product; rank 2 = linear, 4 = convolution."""
    if weight.dim() not in (rank, rank + 1):
        layout = "[N, K]" if rank == 2 else "[O, I, kh, kw]"
        raise ValueError(
            f"weight must be {layout} or have one more leading dimension for networks side by "
            f"side, got shape {tuple(weight.shape)}."
        )
    networks = tuple(weight.shape[:-rank])
    check_bits("mask", mask, weight, rank, "True = kept")
    if bias is not None and bias.shape != networks + (weight.shape[-rank],):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, but weight {tuple(weight.shape)} "
            f"needs {networks + (weight.shape[-rank],)}."
        )
    if signs is not None:
        check_bits("signs", signs, weight, rank, "1 = plus", packed_only=True)
        if frozen is None or tuple(frozen.shape) != networks:
            got = None if frozen is None else tuple(frozen.shape)
            raise ValueError(
                f"constant must be one number, or one per network of weight "
                f"{tuple(weight.shape)}, got shape {got}."
            )
    elif frozen is not None and frozen.shape != weight.shape:
        raise ValueError(
            f"frozen has shape {tuple(frozen.shape)}, but weight has {tuple(weight.shape)}; "
            "they must be equal (for sign x constant pass ops.SignConstant)."
        )
    if frozen is not None and frozen.requires_grad:
        raise ValueError("frozen values are constants, got one that requires grad; detach it.")
    for name, value in (("weight", weight), ("bias", bias), ("frozen", frozen)):
        check_like_x(name, value, x)
    check_devices(x, mask=mask, signs=signs)


def check_bits(
    name: str, bits: Tensor, weight: Tensor, rank: int, meaning: str, packed_only: bool = False
) -> None:
    if bits.dtype == torch.int32:
        rows = tuple(weight.shape[: weight.dim() - rank + 1])
        packed = rows + (words_per_row(weight.shape[1 - rank :].numel()),)
        if tuple(bits.shape) != packed:
            raise ValueError(
                f"packed {name} has shape {tuple(bits.shape)}, but weight "
                f"{tuple(weight.shape)} needs {packed}; use ops.pack_mask."
            )
    elif bits.dtype != torch.bool or packed_only:
        kinds = "packed int32" if packed_only else "bool or packed int32"
        raise ValueError(
            f"{name} must be {kinds} ({meaning}), got {bits.dtype}; "
            "use .bool() if it holds only 0 and 1."
        )
    elif bits.shape != weight.shape:
        raise ValueError(
            f"{name} has shape {tuple(bits.shape)}, but weight has {tuple(weight.shape)}; "
            "they must be equal."
        )


def check_x_of_linear(name: str, weight: Tensor, x: Tensor) -> None:
    """The shape of x, for a weight [N, K] or [E, N, K] that users know under this name."""
    if x.dim() == 0 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but {name} {tuple(weight.shape)} "
            f"needs [..., {weight.shape[-1]}]."
        )
    networks = weight.shape[0]
    if weight.dim() == 3 and (x.dim() not in (2, 3) or x.shape[:-2] not in ((), (networks,))):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but {networks} networks side by side need "
            f"[B, K], shared, or [{networks}, B, K]."
        )


def check_devices(x: Tensor, **tensors: Tensor | None) -> None:
    """By the names of the tensors; None is on every device."""
    for name, value in tensors.items():
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, but x is on {x.device}; move one.")


def check_like_x(name: str, value: Tensor | None, x: Tensor) -> None:
    """Device and dtype."""
    if value is None:
        return
    if value.device != x.device:
        check_devices(x, **{name: value})
    if value.dtype != x.dtype and not autocasts(x.device.type):
        raise ValueError(
            f"{name} is {value.dtype}, but x is {x.dtype}; convert one, or use torch.autocast."
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype, got {value.dtype}.")
