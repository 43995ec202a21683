"""MaskedLinear and MaskedConv2d: drop-ins for nn.Linear and nn.Conv2d with a mask that holds."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx import Proxy

from lottery_sparse import ops
from lottery_sparse.nn import registry
from lottery_sparse.nn.common import one_node, outside_inference_mode, redraw_
from lottery_sparse.nn.frozen import FrozenState, encode, remake
from lottery_sparse.nn.loading import CheckedLoad, LayerLoad, Load, masked_entries
from lottery_sparse.nn.rest import KeptGradient, Own, Rest
from lottery_sparse.ops import masked_conv2d, masked_linear
from lottery_sparse.ops.common.autograd import is_plain_eager
from lottery_sparse.ops.dispatch import overrides
from lottery_sparse.ops.masked import conv2d, linear, reference
from lottery_sparse.pruning.mask_tensor import MaskTensor, plain


class Masked(CheckedLoad):
    """The base of masked layers: the mask, the frozen values, and a state_dict that stays dense.

    The Parameter `weight` is at rest: its pruned entries hold their frozen values. The layer writes
    them again after everything that can move them; the module `rest` says how. The op does not
    depend on that: wherever somebody may have written to the weight, the op selects,
    where(mask, weight, frozen). The buffers:

        weight_mask    bool, the weight's shape, True = kept
        weight_frozen  None (zero), a tensor like the weight, or [] with `weight_signs`
        weight_signs   None, or packed signs: pruned weights hold sign x weight_frozen

    Mask and signs are of the type `MaskTensor`, which averages of models keep whole.

    A state_dict holds `weight`, the live tensor; `weight_mask`; and, unless pruned weights are
    zero, `weight_frozen`: a tensor or, for seeded and sign x constant values, a 1-D uint8 JSON
    descriptor. Where something else computes `weight` (torch.nn.utils.parametrizations), the
    state_dict holds its parts in place of `weight`, and sign x constant values as a tensor.

    Loading:

    - A missing `weight_mask` means that all is kept, so dense checkpoints load strictly. A warning
      says so if that takes masks away.
    - A mask without its weight is reported as unexpected, and not taken.
    - Layers that share a weight take one mask, under any of their names, and refuse two.
    - Checkpoints of torch.nn.utils.prune (`weight_orig`, `weight_mask`) load directly.
    """

    dense_type: type[nn.Module]
    rank: int  # dimensions of one weight; E networks side by side have one more
    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_mask: Tensor
    weight_frozen: Tensor | None
    weight_signs: Tensor | None
    _rest: Rest | None = None  # None: whatever tensors are here are the layer's own

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._enter_masked()

    def _enter_masked(self, mask: Tensor | None = None) -> None:
        """From a dense layer to a masked one, that keeps every weight or those of a mask."""
        every = torch.ones_like(self.weight, dtype=torch.bool, requires_grad=False)
        # not persistent: saved and loaded by hand below
        self.register_buffer(
            "weight_mask", MaskTensor.of(outside_inference_mode(every)), persistent=False
        )
        self._set_frozen(FrozenState())
        if mask is not None:
            self.weight_mask.copy_(mask)
            self._rests_here()

    def _leave_masked(self) -> None:
        """From masked to dense: the Parameters stay."""
        registry.masked.drop(self)
        for name in ("weight_mask", "weight_frozen", "weight_signs"):
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        for name in ("_frozen_descriptor", "_rest", "_sources"):
            self.__dict__.pop(name, None)

    # ---- at rest ---------------------------------------------------------------------------------

    def _own(self) -> Own:
        buffers: Any = self._buffers
        weight = self._parameters.get("weight")
        return Own(
            weight, buffers["weight_mask"], buffers["weight_frozen"], buffers["weight_signs"]
        )

    def _come_to_rest(self, looks: bool = True) -> bool:
        """Put the weight to rest if somebody may have written to it; whether it is at rest now.

        A weight is not at rest in a graph, if another module computes it, or if its tensors are
        those of a functional call or a replica. Then the op selects.

        Args:
            looks: compare some entries with what they held, too. A kernel that skips pruned
                entries does not need it.
        """
        return not is_compiling() and self._rests(looks)

    def _rests(self, looks: bool = True) -> bool:
        """The same of an eager call."""
        rest = self._rest
        if rest is not None:
            if not rest.is_of(self._parameters, self._buffers):
                return False
            if rest.versions and rest.holds(looks):
                return True
        return self._put_back()

    def _put_back(self) -> bool:
        """Write frozen values into pruned entries now; whether the weight is at rest."""
        rest = self._rest
        if rest is None or not rest.is_of(self._parameters, self._buffers):
            rest = Rest.of(self._own())
        own, (weight, mask, *_) = rest.own, rest.tensors
        if type(own.weight) is not nn.Parameter or weight.is_inference() or mask.is_meta:
            return False
        self._rest = rest.reached(self.rank)
        if self._rest.prunes:
            registry.masked.add(self)
        return True

    def _rests_here(self) -> None:
        """Take the tensors that the layer has now as its own, and put the weight to rest."""
        self._rest = None
        self._put_back()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rest": None}

    # ---- becoming masked, and changes ------------------------------------------------------------

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse torch.nn.utils.prune, whose buffer `weight_mask` would replace the layer's own."""
        # prune registers the weight under this name first; spectral_norm removes `weight` before
        if name == "weight_orig" and param is self._parameters.get("weight"):
            raise TypeError(
                f"torch.nn.utils.prune cannot prune the weight of a {type(self).__name__}, which "
                "has a mask already; use ls.prune and ls.set_masks_, or ls.densify_ first."
            )
        super().register_parameter(name, param)
        if name == "weight":
            self._rest = None  # a new one

    def reset_parameters(self) -> None:
        """Draw weight and bias anew as the dense layer does; the mask stays."""
        redraw_(self.weight, self.bias, self.dense_type, self.rank)
        if "_frozen_descriptor" in self.__dict__:  # else called by the constructor
            self._come_to_rest()

    def _set_frozen(self, held: FrozenState) -> None:
        frozen, signs = (
            None if v is None else outside_inference_mode(v) for v in (held.frozen, held.signs)
        )
        self.register_buffer("weight_frozen", frozen, persistent=False)
        signs = None if signs is None else MaskTensor.of(signs)
        self.register_buffer("weight_signs", signs, persistent=False)
        self._frozen_descriptor = held.descriptor
        self._rest = None

    def _buffers_outside_inference_mode(self) -> None:
        """Make normal tensors of the buffers after torch has copied or converted them."""
        for name, value in self._buffers.items():
            if value is not None:
                bits = name in ("weight_mask", "weight_signs")
                value = outside_inference_mode(value)
                self._buffers[name] = MaskTensor.of(value) if bits else value

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_summed", None)  # of older pickles
        self._buffers.pop("weight_signs_sum", None)
        self._buffers_outside_inference_mode()
        self._rest = Rest.of(self._own())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # not the dtype of `weight`: a layer that shares it may have converted it already
        was_meta, frozen = self.weight_mask.is_meta, self.weight_frozen
        super()._apply(fn, recurse)
        self._buffers_outside_inference_mode()
        if was_meta and not self.weight_mask.is_meta:  # to_empty left arbitrary memory
            self.weight_mask.fill_(True)
        if frozen is not None and self.weight.dtype != frozen.dtype:
            # from the descriptor: rounding what is there would make .half().float() lossy
            self._set_frozen(remake(self._frozen_state(), self.weight))
        self._rests_here()
        return self

    def _frozen_state(self) -> FrozenState:
        signs = self.weight_signs
        signs = None if signs is None else plain(signs)
        return FrozenState(self.weight_frozen, signs, self._frozen_descriptor)

    def _frozen_source(self) -> Tensor | ops.SignConstant | None:
        return self._frozen_state().for_op()

    def _check_mask(self, name: str, mask: Tensor, optimizer: Any) -> None:
        """Raises ValueError if the layer cannot take this mask, whose shape is right."""

    @torch.no_grad()
    def _set_mask(self, mask: Tensor, held: FrozenState, leader: Masked, optimizer: Any) -> None:
        """Set the mask, and zero the optimizer's state where pruned."""
        mask = mask.to(self.weight_mask.device, torch.bool)
        state = {} if optimizer is None else optimizer.state.get(self.weight, {})
        pruned = ~mask if state and leader is self else None
        self._set_frozen(held)
        self.weight_mask.copy_(mask)
        self._rests_here()
        if pruned is not None:
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == self.weight.shape:
                    value.masked_fill_(pruned, 0)

    @property
    def effective_weight(self) -> Tensor:
        """where(mask, weight, frozen), what the layer computes with; differentiable.

        The gradient is zero at pruned entries. Without gradients the result is `weight` itself.
        """
        if self._come_to_rest():
            return self._kept_gradient()
        held = self._frozen_state()
        return reference.effective_weight(
            self.weight, plain(self.weight_mask), held.frozen, held.signs, self.rank
        )

    def _kept_gradient(self) -> Tensor:
        """The weight, at rest, for the dense library: no gradient flows to pruned entries."""
        rest: Any = self._rest
        weight = rest.own.weight
        if rest.prunes and weight.requires_grad and torch.is_grad_enabled():
            return KeptGradient.apply(weight, rest.mask)  # pyright: ignore
        return weight

    @property
    def density(self) -> float:
        """Kept share of the weight, in [0, 1]."""
        return float(self.weight_mask.double().mean()) if self.weight.numel() else 1.0

    def extra_repr(self) -> str:
        density = "?" if self.weight_mask.is_meta else f"{self.density:.4g}"
        return f"{super().extra_repr()}, density={density}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        at_rest = self._come_to_rest()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # a parametrized weight is saved by its parametrization
        if "weight" in self._parameters and not at_rest:
            weight = self.effective_weight
            destination[prefix + "weight"] = weight if keep_vars else weight.detach()
        destination[prefix + "weight_mask"] = self.weight_mask
        entry = encode(self._to_save())
        if entry is not None:
            destination[prefix + "weight_frozen"] = entry

    def _to_save(self) -> FrozenState:
        """The frozen source to save. Signs of a weight that is not saved become a tensor."""
        held = self._frozen_state()
        if "weight" in self._parameters or held.signs is None:
            return held
        blank = torch.zeros_like(self.weight, requires_grad=False)
        pruned = torch.zeros_like(self.weight_mask)
        return FrozenState(
            reference.effective_weight(blank, pruned, held.frozen, held.signs, self.rank).detach()
        )

    def _take(self, load: LayerLoad, entries: Any) -> None:
        _, mask, held = entries
        self._report_shared(load)
        like = self.weight  # its device and dtype after the load, also with assign=True
        if load.assign:
            self.weight_mask = MaskTensor.of(outside_inference_mode(mask))
            Load.of(self, Masked, load.state, load.prefix).tie(self)
        else:
            self.weight_mask.copy_(mask)
        self._set_frozen(held.like(like))
        self._rests_here()

    def _report_shared(self, load: LayerLoad) -> None:
        """Report frozen values as missing if the file has them under the name of another layer.

        safetensors saves shared tensors under one name, and its load_model asks that every other
        name be reported as missing.
        """
        weight, frozen = load.names("weight", "weight_frozen")
        tensor = self.weight_frozen is not None and self._frozen_descriptor is None
        if tensor and weight not in load.state and frozen not in load.state:
            load.missing.append(frozen)

    def _entries(self, load: LayerLoad) -> Any:
        return masked_entries(self, load, Load.of(self, Masked, load.state, load.prefix))


def masked_alike(one: Masked, two: Masked) -> bool:
    """Whether two layers have the same mask and the same frozen values."""
    ours, theirs = ((m.weight_mask, m.weight_frozen, m.weight_signs) for m in (one, two))
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


class MaskedLinear(Masked, nn.Linear):
    """nn.Linear on kept weights and frozen values: y = x where(m, w, f)ᵀ + b.

    Constructor, shapes and attributes are nn.Linear's. A new layer keeps every weight; set its
    mask with `ls.set_masks_`. Gradients at pruned entries are exactly zero, and no optimizer,
    decay or load can move the effective weight there. See `Masked` for buffers and state_dict.

    >>> layer = ls.nn.MaskedLinear(784, 300)
    >>> ls.set_masks_(layer, {"weight": torch.rand(300, 784) < 0.1})
    >>> layer(torch.randn(60, 784)).shape
    torch.Size([60, 300])
    """

    dense_type, rank = nn.Linear, 2
    __signature__ = inspect.signature(nn.Linear)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return one_node(self, input)
        rest: Any = None if is_compiling() or overrides else self._rest
        if rest is not None and rest.node is not None:
            y = rest.node(input, rest, self._parameters, self._buffers)
            if y is not None:  # nobody watches ops, or has written to the weight
                return y
        if is_plain_eager(input) and self._rests(looks=False):
            rest = self._rest
            way = linear.way_of(input, rest.own.weight, rest.least_rows)
            if way == "kernel":
                return linear.by_kernel(input, rest.own.weight, rest.mask, self.bias)
            if way == "dense" and self._rests():
                return F.linear(input, self._kept_gradient(), self.bias)
        mask = plain(self.weight_mask)
        return masked_linear(input, self.weight, mask, self.bias, self._frozen_source())


class MaskedConv2d(Masked, nn.Conv2d):
    """nn.Conv2d on kept weights and frozen values.

    Constructor, shapes and attributes are nn.Conv2d's, with every stride, padding, padding_mode,
    dilation and groups. See `MaskedLinear`.

    >>> layer = ls.nn.MaskedConv2d(3, 16, 3, padding="same")
    >>> layer(images).shape, layer.density
    (torch.Size([4, 16, 8, 8]), 1.0)
    """

    dense_type, rank = nn.Conv2d, 4
    __signature__ = inspect.signature(nn.Conv2d)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return one_node(self, input)
        rest: Any = None if is_compiling() or overrides else self._rest
        if (
            rest is not None
            and rest.node is not None
            and input.dim() in (3, 4)
            and input.size(-3) == self.in_channels
        ):
            weight = rest.node(input, rest, self._parameters, self._buffers)
            if weight is not None:  # nobody watches ops, or has written to the weight
                return self._conv_forward(input, weight, self.bias)
        if (
            is_plain_eager(input)
            and self._rests()
            and conv2d.is_dense(input, self.weight, self.groups)
        ):
            return self._conv_forward(input, self._kept_gradient(), self.bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return masked_conv2d(
            input,
            self.weight,
            plain(self.weight_mask),
            self.bias,
            self._frozen_source(),
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )
