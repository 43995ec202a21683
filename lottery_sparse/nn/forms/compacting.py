"""Whole models: masked layers to compact ones and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from lottery_sparse.nn import registry
from lottery_sparse.nn.common import has_hooks
from lottery_sparse.nn.compact.base import Compact
from lottery_sparse.nn.compact.derived import derive
from lottery_sparse.nn.compact.layers import COMPACT_TYPES
from lottery_sparse.nn.compact.moving import check_movable, most_kept
from lottery_sparse.nn.compact.registry import note_optimizer
from lottery_sparse.nn.forms.convert import become, by_parameter, check_masked, check_tied
from lottery_sparse.nn.masked import Masked
from lottery_sparse.ops.compact.reference import gather_kept, kept_weight


def shrink_layers_(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, spare: int = 0
) -> nn.Module:
    """`ls.compact_` for masked and compact layers.

    Compact layers stay compact, and give up dense weights that nothing reads any more.
    """
    check_masked(model)
    check_tied(model)
    groups = []
    for name, layers in by_parameter(model):
        if not isinstance(layers[0], Compact):
            groups.append((name, layers))
        for layer in layers:
            if isinstance(layer, Compact):
                layer.release()
    for name, layers in groups:
        for layer in layers:
            if type(layer) not in COMPACT_TYPES or "weight" not in layer._parameters:
                raise TypeError(
                    f"{name} belongs to a {type(layer).__name__} that computes its weight or adds "
                    "behaviour of its own; it has no compact form."
                )
        if layers[0].weight_mask.is_meta:
            raise ValueError(f"{name} is on the meta device, which holds no mask; load it first.")
        if optimizer is not None:
            _check_dense(name, layers[0], optimizer)
            check_movable(name, layers[0].weight, optimizer)
    _warn_of_hooks(groups)
    for _, layers in groups:
        first = layers[0]
        old, size = first.weight, first.weight.shape[-first.rank :].numel()
        capacity = min(most_kept(first.weight_mask, first.rank) + spare, size)
        derived, parameter = derive(first, capacity)
        each = [derived, *(derive(layer, capacity, parameter)[0] for layer in layers[1:])]

        def gather(dense: Tensor, kept: Any = derived.kept) -> Tensor:
            return gather_kept(dense, kept.starts, kept.columns)

        replace = _replacement(optimizer, old, parameter, gather)
        for layer, mine in zip(layers, each, strict=True):
            become(layer, COMPACT_TYPES[type(layer)])
            assert isinstance(layer, Compact)
            layer._enter_compact(mine, parameter)
        replace()
    return model


def expand_layers_(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    leaves: Collection[int] = (),
) -> nn.Module:
    """Turn compact layers into masked ones; other layers stay.

    Optimizer state of pruned weights becomes 0.

    Args:
        leaves: ids of layers that stay as they are.
    """
    groups = [
        (name, group)
        for name, group in by_parameter(model)
        if isinstance(group[0], Compact) and not all(id(layer) in leaves for layer in group)
    ]
    for name, layers in groups:
        if optimizer is not None:
            check_movable(name, layers[0].weight, optimizer)
    _warn_of_hooks(groups)
    for _, layers in groups:
        first = layers[0]
        assert isinstance(first, Compact)
        old, kept, blank = first.weight, first.kept, torch.zeros_like(first.weight_effective)
        parameter = first._dense_parameter()

        def scatter(values: Tensor, blank: Tensor = blank, kept: Any = kept) -> Tensor:
            return kept_weight(values, blank, kept.starts, kept.columns)

        replace = _replacement(optimizer, old, parameter, scatter)
        for layer in layers:
            assert isinstance(layer, Compact)
            layer._leave_compact(parameter)
            become(layer, layer.masked_type)
            registry.masked.add(layer)  # it rests already, and no memory may be asked for here
        replace()
    return model


def refresh_(model: nn.Module) -> nn.Module:
    """Make layers compute with what `weight` holds now; returns `model`.

    Pruned entries of masked layers get their frozen values again. Kept weights of compact layers
    are copied into the dense effective weight, where there is one.

    Call it after a write that changes *part* of a `weight` and counts no version: through
    `weight.data[3] = 0`, or from another process in shared memory. The next eager forward notices
    all other writes by itself:

    - Writes that count a version, by the counter.
    - Writes that replace or change the whole tensor (`weight.data = t`, `weight.data.copy_(t)`,
      vector_to_parameters), by the address and some sixteen entries. On devices other than the CPU
      only by the address, since reading entries would wait for the device.

    A write during a forward is undefined.

    A compiled forward notices no write. It needs this call after every write but those of
    optimizers, `set_masks_` and load_state_dict, and once after DistributedDataParallel has wrapped
    the model, which copies weights and masks of rank 0.

    >>> model[0].weight.data[0, 1:3] = 7.0  # counts no version, and one of the two is pruned
    >>> ls.nn.refresh_(model)
    >>> model[0].weight[0, 1].item()
    0.0
    """
    for module in model.modules():
        if isinstance(module, Compact):
            module._derived.slots_before = None  # its numbers are meant
            module.refresh_()
        elif isinstance(module, Masked):
            module._put_back()
    return model


def _check_dense(name: str, layer: Masked, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for state of a compact checkpoint, which was loaded for a dense weight."""
    least, state = most_kept(layer.weight_mask, layer.rank), optimizer.state.get(layer.weight, {})
    networks = layer.weight.shape[: -layer.rank]
    for key in ("momentum_buffer", "exp_avg"):
        value = state.get(key)
        if isinstance(value, Tensor) and value.dim() == len(networks) + 1:
            raise ValueError(
                f"{type(optimizer).__name__} holds state of {value.shape[-1]} kept weights for "
                f"{name}, which is dense and keeps {least}: that of a compact model; call "
                "ls.compact_ first, then load the optimizer."
            )


def _warn_of_hooks(groups: list[tuple[str, list[Masked]]]) -> None:
    """Warn before the first change, since a warning may be an error."""
    for name, layers in groups:
        if has_hooks(layers[0].weight):
            warnings.warn(
                f"{name} becomes a new Parameter without the hooks on the gradient of the old one "
                "(register_hook, register_post_accumulate_grad_hook); register them anew.",
                stacklevel=4,
            )


def _replacement(
    optimizer: torch.optim.Optimizer | None, old: Tensor, new: nn.Parameter, move: Any
) -> Callable[[], None]:
    """A function that gives an optimizer `new` for `old`, and moves state and gradient.

    They are moved here, which takes memory; what is returned takes none.
    """
    if optimizer is None:
        return lambda: None
    state = optimizer.state.get(old)
    moved = state and {
        key: move(v) if isinstance(v, Tensor) and v.dim() and v.shape == old.shape else v
        for key, v in state.items()
    }
    gradient = None if old.grad is None else move(old.grad)

    def replace() -> None:
        for group in optimizer.param_groups:
            # in place: LBFGS has the list, too
            group["params"][:] = [new if p is old else p for p in group["params"]]
        if state is not None:
            del optimizer.state[old]
            optimizer.state[new] = moved
            note_optimizer(optimizer)
        if gradient is not None:
            new.grad = gradient

    return replace
