"""Constant channels of a feed-forward model, and channels that are read: see `drop_channels`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lottery_sparse.nn.compact.layers import COMPACT_TYPES
from lottery_sparse.nn.forms.replicate import ELEMENTWISE, PER_IMAGE
from lottery_sparse.nn.masked import Masked, MaskedConv2d, MaskedLinear

WEIGHTED = (nn.Linear, nn.Conv2d, MaskedLinear, MaskedConv2d, *COMPACT_TYPES.values())
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# What these map from is <= 0 becomes 0 and gets no gradient.
RECTIFIERS = (nn.ReLU, nn.ReLU6)


class Constants(NamedTuple):
    """Numbers that no input of the model changes, per channel, or feature behind nn.Flatten."""

    known: Tensor  # bool: this one is such a number
    value: Tensor  # float64; 0 where not known
    fixed: Tensor  # bool: training does not change it either

    @classmethod
    def none(cls, count: int) -> Constants:
        no = torch.zeros(count, dtype=torch.bool)
        return cls(no, torch.zeros(count, dtype=torch.float64), no)


@dataclass
class Layer:
    """A layer with weights [N, K, ...], by channel: features of one channel are one."""

    name: str
    module: Any
    spread: int  # features per input channel
    uses: int  # of each [N, K] of the weight: kernel entries x positions
    entering: Constants  # [K]
    settled: Tensor  # bool [K]: constants that need not enter
    reads: Tensor  # bool [N, K]: kept weights at those that do
    norms: list[tuple[str, int]]  # names of batch norms behind it, and their features per channel

    def constant(self, which: Tensor) -> Tensor:
        """The share of constants in the outputs: float64 [N]."""
        values = torch.where(which, self.entering.value, 0.0)
        if not values.any():
            return torch.zeros(len(self.reads), dtype=torch.float64)
        return _by_channel(_effective(self.module).double(), self.spread).sum(2) @ values


def _effective(module: Any) -> Tensor:
    weight = module.effective_weight if isinstance(module, Masked) else module.weight
    return weight.detach().cpu()


def _by_channel(weight: Tensor, spread: int) -> Tensor:
    """[N, K spread] or [N, K, kh, kw] as [N, K, entries]."""
    return weight.flatten(2) if weight.dim() > 2 else weight.unflatten(1, (-1, spread))


# ---- from the input on: what is constant -------------------------------------------------------


def layers_of(modules: list[tuple[str, nn.Module]], input: Tensor, training: bool) -> list[Layer]:
    """The layers with weights, in order; ValueError if the input, or one between them, is wrong."""
    if input.dim() not in (2, 4):
        raise ValueError(f"input must be [B, K] or [B, C, H, W], got {tuple(input.shape)}.")
    x = torch.empty((1, *input.shape[1:]), device="meta")
    constants, spread = Constants.none(x.shape[1]), 1
    layers: list[Layer] = []
    for name, module in modules:
        if type(module) in (*WEIGHTED, *NORMS):
            _check_shape(name, module, x)
        if type(module) in WEIGHTED:
            layer, x = _layer(name, module, constants, spread, x, training)
            layers.append(layer)
            constants, spread = _leaving(layer), 1
            continue
        if isinstance(module, nn.Flatten):
            new = x.flatten(1)
            each = new.shape[1] // max(x.shape[1], 1)
            constants = Constants(*(t.repeat_interleave(each) for t in constants))
            x, spread = new, spread * each
        elif type(module) in PER_IMAGE:
            if x.dim() != 4:
                raise ValueError(f"{name} is a {type(module).__name__}, but gets {_shape(x)}.")
            x = module(x)
        elif type(module) in NORMS and layers:
            layers[-1].norms.append((name, spread))
        constants = _behind(module, constants, training)
    return layers


def _shape(x: Tensor) -> str:
    return f"[{', '.join(['B', *map(str, x.shape[1:])])}]"


def _check_shape(name: str, module: Any, x: Tensor) -> None:
    spatial = isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    names = ("in_channels", "in_features", "num_features")
    wanted = next(getattr(module, n) for n in names if hasattr(module, n))
    if x.dim() != (4 if spatial else 2) or x.shape[1] != wanted:
        raise ValueError(
            f"{name or 'the model'} needs [B, {wanted}{', H, W' if spatial else ''}], but for this "
            f"input it gets {_shape(x)}."
        )


def _layer(
    name: str, module: Any, entering: Constants, spread: int, x: Tensor, training: bool
) -> tuple[Layer, Tensor]:
    """The layer, and its output for x, both on the meta device."""
    known, value, fixed = (t.view(-1, spread) for t in entering)
    # features of one channel stay or go together, and as one number
    known = known.all(1) & (value == value[:, :1]).all(1)
    entering = Constants(known, torch.where(known, value[:, 0], 0.0), fixed.all(1))
    zero = entering.known & (entering.value == 0)
    weight = _effective(module)
    if training:
        settled = zero & entering.fixed
        kept = module.weight_mask.cpu() if isinstance(module, Masked) else torch.ones_like(weight)
    else:
        settled, kept = zero if _pads_zeros(module) else entering.known, weight
    reads = (_by_channel(kept, spread) != 0).any(2) & ~settled
    uses = 1
    if weight.dim() > 2:
        like = torch.empty(weight.shape, device="meta")
        conv: Any = module  # a type checker would take it for any masked layer
        x = F.conv2d(x, like, None, conv.stride, conv.padding, conv.dilation)
        uses = weight.shape[2:].numel() * x.shape[2:].numel()
    else:
        x = x.new_empty(1, len(weight))
    return Layer(name, module, spread, uses, entering, settled, reads, []), x


def _pads_zeros(module: Any) -> bool:
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        return False
    return module.padding == "same" if isinstance(module.padding, str) else any(module.padding)


def _leaving(layer: Layer) -> Constants:
    """The constants of outputs that no kept weight leads to: bias, and settled constants."""
    known, bias = ~layer.reads.any(1), layer.module.bias
    value = layer.constant(layer.settled)
    if bias is not None:
        value = value + bias.detach().cpu().double()
    trains = bias is not None and bias.requires_grad
    return Constants(known, torch.where(known, value, 0.0), known & (not trains))


def _behind(module: Any, constants: Constants, training: bool) -> Constants:
    """The constants behind a module without weights."""
    known, value, fixed = constants
    if type(module) in RECTIFIERS:
        zero = known & (value <= 0)
        return Constants(known, _map_values(module, value), fixed | zero)
    if type(module) in NORMS:
        return _behind_norm(module, constants, training)
    if isinstance(module, nn.AvgPool2d):
        padding = module.padding if isinstance(module.padding, tuple) else (module.padding,)
        if (any(padding) and module.count_include_pad) or module.divisor_override:
            known = known & (value == 0)  # other numbers at the border, or another number
    elif isinstance(module, nn.Dropout | nn.Dropout2d):
        if training and module.p:  # other constants become 0 at times
            known = known & (value == 0)
    elif type(module) in ELEMENTWISE:
        value = _map_values(module, value)
    return Constants(known, torch.where(known, value, 0.0), fixed)


def _map_values(module: Any, value: Tensor) -> Tensor:
    with torch.no_grad():
        return module(value.clone())


def _behind_norm(norm: Any, constants: Constants, training: bool) -> Constants:
    """Training and evaluation must agree; in training the mean of a constant is only nearly it."""
    known, value, fixed = constants
    mean, var = (
        (t if t is None else t.cpu().double()) for t in (norm.running_mean, norm.running_var)
    )
    weight, bias = (t if t is None else t.detach().cpu().double() for t in (norm.weight, norm.bias))
    if training or mean is None:
        known = known & (value == 0)
        if mean is not None:
            known = known & (mean == 0)
        new = torch.zeros_like(value) if bias is None else bias
        fixed = fixed & (bias is None or not norm.bias.requires_grad)
    else:
        new = F.batch_norm(value[None], mean, var, weight, bias, False, 0.0, norm.eps)[0]
    return Constants(known, torch.where(known, new, 0.0), fixed)


# ---- from the output back: what is read --------------------------------------------------------


def staying(layers: list[Layer]) -> list[Tensor]:
    """The input channels that each layer keeps, and the outputs of the last layer: bool."""
    if not layers:
        return []
    rows = torch.ones(len(layers[-1].reads), dtype=torch.bool)
    stay = [rows]
    for before, layer in zip([None, *layers[:-1]][::-1], layers[::-1], strict=True):
        if before is None:
            rows = torch.ones_like(layer.settled)
        else:
            rows = layer.reads[rows].any(0)
            if not rows.any() and len(rows):  # no layer has 0 channels: the one that reads least
                rows[before.reads.sum(1).argmin()] = True
        stay.insert(0, rows)
    return stay
