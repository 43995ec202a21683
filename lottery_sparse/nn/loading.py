"""CheckedLoad: how our layers load a state_dict. Load: one call, with all masked layers in it.

torch hands each layer its own entries and nothing else. Two things need all layers: a weight that
layers share has one mask, which may be saved under any of their names; and one warning should name
all masks that a checkpoint takes away. So the first masked layer of a load finds the running call
of load_state_dict on the stack.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lottery_sparse.nn.frozen import Constant, decode
from lottery_sparse.pruning.masks import as_mask
from lottery_sparse.pruning.names import prefix_of

_LOAD_STATE_DICT = nn.Module.load_state_dict.__code__
_HELD_AS = "_lottery_sparse_load"  # attribute of torch's copy of the state_dict, gone with the call


class LayerLoad:
    """One layer's part of a load.

    Attributes:
        state, prefix: what the layer is given.
        assign: whether tensors of the state_dict take the place of the layer's.
        missing: names to be reported as missing.
        own: names that the layer takes, and torch does not report.
        seen: what torch loads.
    """

    def __init__(self, state: MutableMapping[str, Any], prefix: str, assign: bool):
        self.state, self.prefix, self.assign = state, prefix, assign
        self.missing: list[str] = []
        self.own: set[str] = set()
        self.seen = state

    def names(self, *parts: str) -> tuple[str, ...]:
        return tuple(self.prefix + part for part in parts)

    def hide(self, names: Iterable[str]) -> None:
        """Have torch load the other entries only; `seen` is a dict of the layer's own then."""
        names = set(names)
        self.seen = {name: value for name, value in self.state.items() if name not in names}


class CheckedLoad(nn.Module):
    """A layer that takes some entries of a state_dict by itself."""

    def _entries(self, load: LayerLoad) -> Any:
        """What the layer takes by itself; None: nothing. All is checked, nothing is written.

        Raises:
            TypeError, ValueError: reported; nothing of the layer is loaded then.
        """
        raise NotImplementedError

    def _take(self, load: LayerLoad, entries: Any) -> None:
        """Write what `_entries` has found; torch has loaded everything else."""
        raise NotImplementedError

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        assign = local_metadata.get("assign_to_params_buffers", False)
        load = LayerLoad(state_dict, prefix, assign)
        try:
            entries = self._entries(load)
        except (TypeError, ValueError) as error:
            if str(error) not in error_msgs:  # once, of layers that share a weight
                error_msgs.append(str(error))
            return
        missing: list[str] = []
        super()._load_from_state_dict(
            load.seen, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        if entries is not None:
            self._take(load, entries)
        missing_keys += [name for name in missing if name not in load.own] + load.missing
        unexpected_keys[:] = [name for name in unexpected_keys if name not in load.own]


class Entries(NamedTuple):
    """The entries of one layer under one name in a state_dict; None = there is none."""

    weight: Tensor | None
    mask: Tensor | None
    frozen: Tensor | None

    @classmethod
    def of(cls, layer: Any, state: Any, prefix: str) -> Entries:
        weight = state.get(f"{prefix}weight")
        if weight is None and _is_pruned(layer, state, prefix):
            weight = state[f"{prefix}weight_orig"]
        return cls(weight, state.get(f"{prefix}weight_mask"), state.get(f"{prefix}weight_frozen"))


class Load:
    """One load of a state_dict.

    Attributes:
        layers: (prefix in the state_dict, masked layer); a layer with two names comes twice.
    """

    def __init__(self, layers: list[tuple[str, Any]], state: Any):
        self.layers, self.state = layers, state
        self._names: dict[int, list[str]] = {}  # id of a layer -> all prefixes of its weight
        shared: dict[int, list[str]] = {}
        for prefix, layer in layers:
            names = shared.setdefault(id(_owner(layer)), [])
            names.append(prefix)
            self._names[id(layer)] = names

    @classmethod
    def of(cls, layer: Any, kind: type[nn.Module], state: Any, prefix: str) -> Load:
        """The load that a layer is part of; a load of the layer alone, if torch runs none.

        Args:
            kind: the type of masked layers.
            state, prefix: the arguments of the layer's _load_from_state_dict.

        Warns:
            UserWarning: the load takes masks or pruned biases away; once in a load.
        """
        running = _running()
        if running is not None:
            root, whole = running
            load = getattr(whole, _HELD_AS, None)
            if load is None:
                load = cls(list(_layers(root, kind, whole)), whole)
                setattr(whole, _HELD_AS, load)
                load._warn()
            if id(layer) in load._names:
                return load
        load = cls([(prefix, layer)], state)
        load._warn()
        return load

    def entries(self, layer: Any, own: Entries) -> Entries:
        """The entries of a layer: its `own`, and those under other names of its weight.

        Raises:
            ValueError: it holds two masks for the weight, or two frozen sources.
        """
        found = {name: Entries.of(layer, self.state, name) for name in self._names[id(layer)]}
        if len(found) == 1:
            return own
        masked = {name: entries for name, entries in found.items() if entries.mask is not None}
        # a file that names shared tensors once has frozen values where it has the weight
        whole = {n: e for n, e in masked.items() if e.weight is not None or e.frozen is not None}
        for telling, part in ((masked, "mask"), (whole, "frozen")):
            for name, entries in telling.items():
                first, right = next(iter(telling.items()))
                if not _same(f"{name}weight", entries, right, part):
                    raise ValueError(
                        f"{first}weight and {name}weight are one weight in this model, but the "
                        "checkpoint has two masks for it, or two kinds of frozen values; give both "
                        "names the same, or each layer a weight of its own before the load."
                    )
        weights = [e.weight for e in (own, *found.values()) if e.weight is not None]
        _, mask, frozen = next(iter((whole or masked).values()), own)
        return Entries(next(iter(weights), None), mask, frozen)

    def tie(self, layer: Any) -> None:
        """After assign=True, make a shared weight one Parameter again."""
        names = self._names[id(layer)]
        sharing = {id(other): other for _, other in self.layers if self._names[id(other)] is names}
        named = {
            id(other): other
            for prefix, other in self.layers
            if id(other) in sharing and Entries.of(other, self.state, prefix).weight is not None
        }
        if len(named) == 1 and "weight" in layer._parameters:
            (owner,) = named.values()
            for other in sharing.values():
                if other.weight is not owner.weight:
                    other.weight = owner.weight

    def _warn(self) -> None:
        """Warn before anything is written, since a warning may be an error."""
        self._warn_of_masks()
        for prefix, layer in self.layers:
            mask = self.state.get(f"{prefix}bias_mask")
            if _takes_bias(layer, self.state, prefix) and not bool((mask != 0).all()):
                zero = int((mask == 0).sum())
                _warn(
                    f"{prefix}bias_mask prunes {zero} of {mask.numel()} biases, but the layer's "
                    "masks are of weights: these biases are 0 now, and train on; prune them with "
                    "torch.nn.utils.prune before the load to keep it so."
                )

    def _warn_of_masks(self) -> None:
        before = after = total = 0
        lost: list[str] = []
        fits = True  # a compact layer may have no room for all, and refuses then
        for prefix, layer in self.layers:
            names = self._names[id(layer)]
            if prefix != names[0] or layer.weight_mask.is_meta:  # a shared weight counts once
                continue
            entries = [Entries.of(layer, self.state, name) for name in names]
            mask = next((e.mask for e in entries if e.mask is not None), None)
            kept, size = int(layer.weight_mask.count_nonzero()), layer.weight_mask.numel()
            before, total = before + kept, total + size
            if all(e.weight is None for e in entries):
                after += kept
            elif isinstance(mask, Tensor):
                after += int(mask.count_nonzero())
            else:
                after += size
                lost += [f"{prefix}weight"] if kept < size else []
                fits = fits and layer.weight.numel() == size
        if lost and fits:
            others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            _warn(
                f"the checkpoint holds no mask of {lost[0]}{others}, so that all of it is kept: "
                f"the model kept {before / total:.1%} of {total:,} weights and now keeps "
                f"{after / total:.1%}; to keep masks, take masks = ls.masks_of(model) before the "
                "load, and call ls.set_masks_(model, masks) after it."
            )


def masked_entries(layer: Any, load: LayerLoad, whole: Load) -> Any:
    """The weight, mask and frozen source that a state_dict holds for a masked layer; None: nothing.

    Entries of torch.nn.utils.prune are replaced in the state_dict by those of a masked layer.

    Raises:
        ValueError, TypeError: they do not fit the layer.
    """
    state, prefix = load.state, load.prefix
    name, shape = f"{prefix}weight", layer.weight_mask.shape
    take_pruned(layer, state, prefix)
    weight, mask, frozen = whole.entries(layer, Entries.of(layer, state, prefix))
    computed = weight is None and "weight" not in layer._parameters
    if computed and mask is not None and _has_parts(state, prefix):
        weight = layer.effective_weight.detach()
    if weight is None:
        return None
    if weight.shape != shape:
        raise ValueError(
            f"size mismatch for {name}: the checkpoint has {tuple(weight.shape)}, "
            f"the model {tuple(shape)}."
        )
    mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else as_mask(name, mask)
    if mask.shape != shape:
        raise ValueError(
            f"mask of {name} has shape {tuple(mask.shape)}, the model needs {tuple(shape)}."
        )
    held = decode(name, frozen, weight)
    if computed and isinstance(held.descriptor, Constant):
        raise ValueError(
            f"frozen values of {name} are signs of a weight that the checkpoint does not hold; "
            "give a tensor of them, as this version saves it."
        )
    load.own.update(load.names("weight_mask", "weight_frozen"))
    return weight, mask, held


def _has_parts(state_dict: Any, prefix: str) -> bool:
    """Whether a state_dict holds the parts that a weight is computed from (weight_norm)."""
    parts = f"{prefix}parametrizations.weight.", f"{prefix}weight_"
    ours = f"{prefix}weight_mask", f"{prefix}weight_frozen"
    return any(name.startswith(parts) and name not in ours for name in state_dict)


def take_pruned(layer: Any, state: MutableMapping[str, Any], prefix: str) -> None:
    """Replace entries of torch.nn.utils.prune by those of a masked layer, in `state`.

    `weight_orig` becomes `weight`, zero where `weight_mask` prunes. `bias_orig` and `bias_mask`
    become `bias`, zero where pruned.
    """
    if _is_pruned(layer, state, prefix):
        original = state.pop(f"{prefix}weight_orig")
        state[f"{prefix}weight"] = _left(original, state[f"{prefix}weight_mask"])
    if _takes_bias(layer, state, prefix):
        mask = state.pop(f"{prefix}bias_mask")
        state[f"{prefix}bias"] = _left(state.pop(f"{prefix}bias_orig"), mask)


def _is_pruned(layer: Any, state: Any, prefix: str) -> bool:
    """Whether the weight was pruned by torch.nn.utils.prune, and is not computed in the layer."""
    parts = f"{prefix}weight_orig", f"{prefix}weight_mask"
    return (
        "weight" in layer._parameters
        and f"{prefix}weight" not in state
        and all(isinstance(state.get(name), Tensor) for name in parts)
    )


def _takes_bias(layer: Any, state: Any, prefix: str) -> bool:
    """Whether the bias was pruned by torch.nn.utils.prune, and is not in the layer."""
    parts = f"{prefix}bias_orig", f"{prefix}bias_mask"
    return layer._parameters.get("bias") is not None and all(
        isinstance(state.get(name), Tensor) for name in parts
    )


def _left(original: Tensor, mask: Tensor) -> Tensor:
    """The tensor, zero where pruned. The layer refuses a mask whose shape does not fit."""
    if mask.shape != original.shape:
        return original
    return torch.where(mask.to(original.device) != 0, original, torch.zeros_like(original))


def _owner(layer: Any) -> Any:
    return layer._parameters.get("weight", layer)  # a computed weight is one layer's own


def _same(name: str, one: Entries, two: Entries, part: str) -> bool:
    if one is two:
        return True
    if part == "frozen":
        return _equal(one.frozen, two.frozen)
    return _equal(*(as_mask(name, entries.mask) for entries in (one, two)))  # pyright: ignore


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None or one is two:
        return one is two
    return one.shape == two.shape and bool((one == two.to(one.device)).all())


def _layers(root: nn.Module, kind: type[nn.Module], state: Any) -> Iterator[tuple[str, Any]]:
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            named, raw = prefix_of(name), f"{name}." if name else ""
            # wrappers that the state_dict does not name put theirs in as the load goes on
            put_in = raw != named and any(key.startswith(raw) for key in state)
            yield (raw if put_in else named), module


def _running() -> tuple[nn.Module, Any] | None:
    """The model and the state_dict of the load_state_dict that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _LOAD_STATE_DICT:
            return frame.f_locals["self"], frame.f_locals["state_dict"]
        frame = frame.f_back
    return None


def _warn(text: str) -> None:
    """Warn at the line that calls load_state_dict."""
    frame, level = sys._getframe(0), 1
    while frame is not None and frame.f_code is not _LOAD_STATE_DICT:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level + 1)
