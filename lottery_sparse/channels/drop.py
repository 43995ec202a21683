"""drop_channels: a narrower model that computes and trains as a very sparse one does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lottery_sparse.channels.reads import NORMS, WEIGHTED, layers_of, staying
from lottery_sparse.nn.common import has_hooks
from lottery_sparse.nn.compact.base import Compact
from lottery_sparse.nn.forms.compacting import shrink_layers_
from lottery_sparse.nn.forms.replicate import (
    ELEMENTWISE,
    PER_IMAGE,
    map_modules,
    networks_of,
    parameter_like,
    plain_copy,
)
from lottery_sparse.nn.masked import Masked


@dataclass(frozen=True)
class Channels:
    """The channels of a model that its narrow version has, and the way back.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> narrow, channels = ls.channels.drop_channels(model, images)
    >>> channels.flop_ratio  # all channels matter here
    1.0
    >>> channels.restore_(model, narrow)

    Attributes:
        outputs: layer name -> int64 [N'], its output channels in the model, ascending; for layers
            with weights and batch norms.
        inputs: layer name -> int64 [K'], its input channels, or features of a linear layer.
        flop: of one input through the narrow model's linear and convolutional layers, run densely:
            two per weight and position, also where a kernel meets padding. A training step has
            three times as many, but for the gradient of the model's own input.
        flop_before: the same of the model.
        training: the argument of `drop_channels`.
    """

    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]
    flop: int
    flop_before: int
    training: bool

    @property
    def flop_ratio(self) -> float:
        """flop / flop_before, in (0, 1]."""
        return self.flop / self.flop_before if self.flop_before else 1.0

    def state_dict(self, model: nn.Module, narrow: nn.Module) -> dict[str, Tensor]:
        """A state_dict of the model, with the narrow model's values where it has the channel.

        Weights, masks, biases, running statistics; any device and dtype. What belongs to dropped
        channels stays.

        Raises:
            ValueError: the narrow model was made for inference, or does not fit this model.
        """
        if not self.training:
            raise ValueError(
                "these channels are those of a model for inference, whose biases hold folded "
                "constants; train one of ls.channels.drop_channels(model, input, training=True)."
            )
        state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        small = narrow.state_dict()
        if other := sorted(state.keys() ^ small.keys()):
            raise ValueError(
                f"narrow and model must have the same entries, but only one has {other[0]}; make "
                "both masked or both dense (ls.sparsify_, ls.densify_)."
            )
        for key, value in small.items():
            whole, name = state[key], key.rpartition(".")[0]
            at: Any = ...
            if value.dim() and name in self.outputs:
                at = self.outputs[name].to(whole.device)
            if value.dim() > 1 and name in self.inputs:
                at = at[:, None], self.inputs[name].to(whole.device)
            if whole[at].shape != value.shape:
                raise ValueError(
                    f"{key} of narrow has shape {tuple(value.shape)}, but these channels of the "
                    f"model have {tuple(whole[at].shape)}; pass the model that narrow came with."
                )
            whole[at] = value.to(whole)
        return state

    def restore_(self, model: nn.Module, narrow: nn.Module) -> nn.Module:
        """Write what the narrow model has learnt into the model, in place; see `state_dict`.

        Parameters keep their identity; an optimizer's state does not come along. Returns `model`.
        """
        model.load_state_dict(self.state_dict(model, narrow))
        return model


@torch.inference_mode(False)
@torch.no_grad()
def drop_channels(
    model: nn.Module, input: Tensor, training: bool = True
) -> tuple[nn.Module, Channels]:
    """A narrower model with the same outputs: without the channels that cannot matter.

    A channel is dropped, with the weights into it and out of it, by one of three rules:

    1. No kept weight of a channel that stays reads it.
    2. No kept weight leads to it, and the next layer reads 0 from it for good. That is so if the
       layer has no bias, or a bias of 0 that does not train, or a bias <= 0 with a ReLU behind it,
       which lets no gradient through. Behind a batch norm the input and the running mean must be 0,
       and the bias of the norm takes the place of the layer's.
    3. With `training=False` only: no kept weight leads to it, and the next layer reads a constant
       from it. The constant goes into the bias of the next layer. Zeros around an image differ from
       the constant, so before a convolution with zero padding only constants of 0 go.

    The rules apply again to what they leave. A layer keeps at least one channel; the model's own
    inputs and outputs stay, and so do names in the state_dict. In a training every weight of an
    unmasked layer counts as kept; without, every weight that is not 0 does.

    With `training` the dropped weights have a gradient of exactly 0 in the model at every step. So
    the narrow model trains as the model does, within rounding (dropout draws other numbers). This
    holds for masks that stay or shrink, and for any optimizer that starts without state and moves
    each weight by its own gradients alone, with gradients clipped by norm too. Weight decay goes on
    shrinking dropped weights in the model. No output shows that, unless the decay carries a bias of
    rule 2 past 0: AdamW cannot, SGD cannot while lr x decay <= (1 - sqrt(momentum))^2, and
    torch.optim.Adam can.

    With `training=False`, narrow.eval() computes what model.eval() does.

    >>> model = ls.sparsify_(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 3)))
    >>> mask = torch.ones(8, 3, 3, 3, dtype=torch.bool)
    >>> mask[6:] = False  # two channels that nothing leads to
    >>> ls.set_masks_(model, {"0.weight": mask})
    >>> narrow, channels = ls.channels.drop_channels(model, images)
    >>> narrow[0].out_channels
    6

    Args:
        model: an nn.Sequential (nested too) of linear, convolutional, masked and compact layers,
            batch norms, elementwise modules, pooling, nn.Dropout2d and nn.Flatten; it is not
            changed. Pruned weights hold zero, convolutions have one group.
        input: [B, K] or [B, C, H, W]; only its shape is used.
        training: whether the narrow model is to train.

    Returns:
        (narrow, channels): a new model with Parameters of its own, masked where `model` is masked
        and compact, without spare slots, where it is compact; and the way back,
        `channels.restore_(model, narrow)`.

    Raises:
        TypeError: a module that may mix channels, such as one with a forward of its own or a hook,
            or two that share a tensor; named.
        ValueError: groups, frozen values, networks side by side, the meta device, or an input of
            another shape.
    """
    modules = list(_walk(model))
    if any(networks_of(module) is not None for _, module in modules):
        raise ValueError(
            "model holds networks side by side; take one first: ls.ensemble.select(model, e)."
        )
    owners: dict[int, str] = {}
    for name, module in modules:
        _check(name, module, owners)
    layers = layers_of(modules, input, training)
    stay = staying(layers)
    outputs, inputs = {}, {}
    for layer, columns, rows in zip(layers, stay, stay[1:], strict=False):
        outputs[layer.name] = rows.nonzero().squeeze(1)
        inputs[layer.name] = columns.repeat_interleave(layer.spread).nonzero().squeeze(1)
        for name, spread in layer.norms:
            outputs[name] = rows.repeat_interleave(spread).nonzero().squeeze(1)
    read = {layer.name: (layer, columns) for layer, columns in zip(layers, stay, strict=False)}
    names = iter(name for name, _ in modules)

    def narrowed(module: nn.Module) -> nn.Module:
        name = next(names)
        new = _sliced(module, outputs.get(name), inputs.get(name))
        if name in read:  # in training the constants are 0
            layer, columns = read[name]
            _add_to_bias(new, layer.constant(layer.settled & ~columns)[outputs[name]])
        if isinstance(module, Compact):
            vars(new).pop("products", None)  # what was quicker at another size
            shrink_layers_(new)
        return new

    return map_modules(model, narrowed), Channels(
        outputs,
        inputs,
        flop=sum(2 * len(outputs[x.name]) * len(inputs[x.name]) * x.uses for x in layers),
        flop_before=sum(2 * x.reads.numel() * x.spread * x.uses for x in layers),
        training=training,
    )


# ---- what a model is made of -------------------------------------------------------------------

_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


def _walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules inside nested Sequentials, as `map_modules` goes; one used twice comes twice."""
    hooks = (getattr(module, f"_{kind}_hooks") for kind in _HOOKS)
    if any((*hooks, "forward" in vars(module))):
        raise TypeError(
            f"{name or 'the model'} has a hook or a forward of its own, which may read any "
            "channel; remove it first."
        )
    if type(module) is not nn.Sequential:
        yield name, module
        return
    for key, child in module._modules.items():
        assert child is not None
        yield from _walk(child, f"{name}.{key}" if name else key)


def _check(name: str, module: nn.Module, owners: dict[int, str]) -> None:
    name, kind = name or "the model", type(module)
    if kind not in (*WEIGHTED, *NORMS, *ELEMENTWISE, *PER_IMAGE, nn.Dropout2d, nn.Flatten):
        raise TypeError(
            f"{name} is a {kind.__name__}, which may mix channels, for all that is known of it; "
            "drop_channels takes an nn.Sequential of linear and convolutional layers, batch norms, "
            "pooling, activations and nn.Flatten: pass a part of the model that is one."
        )
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        raise TypeError(f"{name} is a {module}; drop_channels takes one of dimensions 1 to -1.")
    if getattr(module, "return_indices", False):
        raise TypeError(f"{name} returns indices; drop_channels takes pooling without them.")
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if owners.setdefault(id(tensor), name) != name:
            raise TypeError(
                f"{name} shares its {key} with {owners[id(tensor)]}, so a channel of one is a "
                "channel of both; drop_channels takes layers with tensors of their own."
            )
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, which holds no values; load it first.")
        if has_hooks(tensor):
            raise TypeError(
                f"{name} has a hook on its {key}, which may change any gradient; remove it first."
            )
    if kind not in WEIGHTED:
        return
    if "weight" not in module._parameters:
        raise TypeError(f"{name} computes its weight; remove the parametrization first.")
    if getattr(module, "groups", 1) != 1:
        raise ValueError(
            f"{name} has groups={module.groups}; drop_channels takes convolutions of one group, "
            "where any channel can go alone."
        )
    if isinstance(module, Masked) and module.weight_frozen is not None:
        raise ValueError(
            f"{name} holds frozen values, which read every channel; drop_channels takes layers "
            'whose pruned weights hold "zero".'
        )


# ---- the narrow model --------------------------------------------------------------------------


def _sliced(module: Any, rows: Tensor | None, columns: Tensor | None) -> nn.Module:
    """A new module with these outputs and inputs, and Parameters and buffers of its own."""
    new: Any = plain_copy(module)
    for key, value in [*new._parameters.items(), *new._buffers.items()]:
        if value is None:
            continue
        small = value.clone()
        if rows is not None and small.dim():
            small = small.index_select(0, rows.to(small.device))
        if columns is not None and small.dim() > 1:
            small = small.index_select(1, columns.to(small.device))
        if value.dim() == 4 and not value.is_contiguous():
            small = small.contiguous(memory_format=torch.channels_last)
        if key in new._parameters:
            new._parameters[key] = parameter_like(small, value)
        else:
            new._buffers[key] = small
    sizes = {"in": columns, "out": rows, "num": rows}
    for name in ("in_channels", "in_features", "out_channels", "out_features", "num_features"):
        indices = sizes[name.split("_")[0]]
        if indices is not None and hasattr(new, name):
            setattr(new, name, len(indices))
    return new


def _add_to_bias(layer: Any, constant: Tensor) -> None:
    if not constant.any():
        return
    weight, bias = layer.weight, layer.bias
    total = constant if bias is None else bias.detach().cpu().double() + constant
    like = weight if bias is None else bias
    layer.bias = parameter_like(total.to(like.device, like.dtype), like)
