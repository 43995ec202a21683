"""Masks: parameter name -> bool tensor, as a value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from lottery_sparse.pruning.mask_tensor import mask_in
from lottery_sparse.pruning.names import prefix_of
from lottery_sparse.text import shown


class Masks(dict[str, Tensor]):
    """Masks of a model by parameter name, True = kept; a value with set algebra.

    A dict, so that whatever saves dicts of tensors saves it (safetensors.torch.save_file), but one
    whose entries stay: make new masks, `ls.Masks({**masks, name: mask})`. Inside a checkpoint of
    torch.save it comes back with the default torch.load, once lottery_sparse is imported.

    >>> a = ls.masks_of(model)
    >>> b = ls.prune(w_init, model.state_dict(), a, "large_final", keep=0.5)
    >>> (a & ~b).density  # share of all weights that this step pruned
    0.1
    >>> a.overlap(b)  # kept by both / kept by either
    0.5
    >>> print(b.table())
    0.weight  10x20           20 of         200    0.1000
    2.weight  2x10             2 of          20    0.1000
    total                     22 of         220    0.1000

    Args:
        masks: name -> tensor of any shape holding 0 and 1 only, of any dtype.

    Raises:
        ValueError: a mask holds something else than 0 and 1.
        TypeError: not a mapping, or a mask is not a tensor.
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        if not isinstance(masks, Mapping):
            raise TypeError(f"masks must map names to tensors, got {type(masks).__name__}.")
        super().__init__({name: as_mask(name, mask) for name, mask in masks.items()})

    @classmethod
    def of_nonzero(cls, model: nn.Module) -> Masks:
        """Masks of a network that was pruned elsewhere: they keep every nonzero weight.

        >>> ls.sparsify_(model)
        >>> ls.set_masks_(model, ls.Masks.of_nonzero(model))

        A model with masked layers gives masks of their effective weights; another model gives masks
        of every nn.Linear and nn.Conv2d. Tied weights come once. A weight that is zero by chance is
        pruned, too.
        """
        found: dict[int, tuple[str, Tensor]] = {}
        layers = [
            (name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
        ]
        masked = [(name, layer) for name, layer in layers if hasattr(layer, "effective_weight")]
        for name, layer in masked or layers:
            weight: Tensor = getattr(layer, "effective_weight", layer.weight)
            owner = layer._parameters.get("weight", layer)  # a computed weight is its layer's own
            found.setdefault(id(owner), (f"{prefix_of(name)}weight", weight.detach()))
        return cls({name: weight != 0 for name, weight in found.values()})

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "ls.Masks are a value, whose entries stay; make new ones: "
            "ls.Masks({**masks, name: mask})."
        )

    __setitem__ = __delitem__ = clear = pop = popitem = _refuse
    setdefault = update = _refuse  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)  # a call, so that what a file holds is checked

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read pickles from the time when Masks was no dict."""
        super().update(Masks(state["_masks"]))

    def __repr__(self) -> str:
        return f"Masks({len(self)} tensors, {self.kept} of {self.total} kept)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return False  # dict's own comparison would ask tensors for one truth value
        return self.keys() == other.keys() and all(
            self[n].shape == other[n].shape and bool((self[n] == other[n].to(self[n].device)).all())
            for n in self
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Masks) -> Masks:
        return Masks({n: a & b for n, a, b in self._pairs(other)})

    def __or__(self, other: Masks) -> Masks:
        return Masks({n: a | b for n, a, b in self._pairs(other)})

    def __ior__(self, other: Masks) -> Masks:
        return self | other  # a new value, which the name then stands for

    def __xor__(self, other: Masks) -> Masks:
        return Masks({n: a ^ b for n, a, b in self._pairs(other)})

    def __invert__(self) -> Masks:
        return Masks({n: ~m for n, m in self.items()})

    @property
    def kept(self) -> int:
        """Number of kept weights."""
        return sum(int(mask.count_nonzero()) for mask in self.values())

    @property
    def total(self) -> int:
        """Number of weights that have a mask."""
        return sum(mask.numel() for mask in self.values())

    @property
    def density(self) -> float:
        """kept / total, in [0, 1]; 1 if there is nothing to mask."""
        return self.kept / self.total if self.total else 1.0

    def overlap(self, other: Masks) -> float:
        """Intersection over union of the kept weights, in [0, 1]; 1 if neither keeps any."""
        either = (self | other).kept
        return (self & other).kept / either if either else 1.0

    def to(self, device: torch.device | str) -> Masks:
        """The masks on a device."""
        return Masks({n: m.to(device) for n, m in self.items()})

    def table(self) -> str:
        """One line per tensor and a last one for all: name, shape, kept, total, density."""
        rows = [
            (shown(name), "x".join(map(str, mask.shape)), int(mask.count_nonzero()), mask.numel())
            for name, mask in self.items()
        ]
        rows.append(("total", "", self.kept, self.total))
        width = max(len(row[0]) for row in rows)
        shape = max(len(row[1]) for row in rows)
        return "\n".join(
            f"{n:<{width}}  {s:<{shape}}  {kept:>11,} of {total:>11,}  "
            f"{kept / total if total else 1.0:8.4f}"
            for n, s, kept, total in rows
        )

    def to_bits(self) -> dict[str, Tensor]:
        """name -> uint8 [ceil(n / 8)]: flat C order, bit j of byte b is entry 8 b + j."""
        return {
            name: torch.from_numpy(
                np.packbits(mask.cpu().contiguous().numpy().reshape(-1), bitorder="little")
            )
            for name, mask in self.items()
        }

    @classmethod
    def from_bits(cls, bits: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> Masks:
        """The inverse of `to_bits`; shapes: name -> shape.

        Raises:
            ValueError: a name without a shape, a wrong number of bytes, or a spare bit set.
        """
        return cls({name: _unpack(name, packed, shapes) for name, packed in bits.items()})

    def _pairs(self, other: Masks) -> Iterator[tuple[str, Tensor, Tensor]]:
        if not isinstance(other, Masks):
            raise TypeError(f"the other masks must be ls.Masks, got {type(other).__name__}.")
        if self.keys() != other.keys():
            odd = shown(", ".join(sorted(self.keys() ^ other.keys())))
            raise ValueError(f"both masks must have the same names; only one of them has: {odd}.")
        for name in self:
            if self[name].shape != other[name].shape:
                raise ValueError(
                    f"masks of {shown(name)} must have one shape, got "
                    f"{tuple(self[name].shape)} and {tuple(other[name].shape)}."
                )
            yield name, self[name], other[name]


# The name in checkpoints of torch.save is the public one, which stays where it is.
Masks.__module__ = "lottery_sparse"
torch.serialization.add_safe_globals([Masks])


def as_mask(name: str, mask: Tensor) -> Tensor:
    """The tensor as bool.

    Raises:
        TypeError: it is no tensor.
        ValueError: it holds something else than 0 and 1.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask of {shown(name)} must be a tensor, got {type(mask).__name__}.")
    if mask.dtype == torch.bool:
        return mask
    one = mask_in(mask)  # the entry of an averaged state_dict
    if one is not None:
        return one
    wrong = (mask != 0) & (mask != 1)
    if wrong.any():
        raise ValueError(
            f"mask of {shown(name)} must hold only 0 and 1 (1 = kept), got "
            f"{mask[wrong][0].item()}; threshold it first, e.g. mask > 0.5."
        )
    return mask.to(torch.bool)


def _unpack(name: str, packed: Tensor, shapes: Mapping[str, Any]) -> Tensor:
    if name not in shapes:
        raise ValueError(f"shapes has no {shown(name)}; it has {shown(', '.join(shapes))}.")
    count = math.prod(shapes[name])
    if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),):
        raise ValueError(
            f"bits of {shown(name)} must be uint8 [{-(-count // 8)}] for shape "
            f"{tuple(shapes[name])}, got {packed.dtype} {tuple(packed.shape)}."
        )
    flat = np.unpackbits(packed.cpu().numpy(), bitorder="little").astype(bool)
    if flat[count:].any():
        raise ValueError(f"bits of {shown(name)} has a spare bit set after entry {count}.")
    return torch.from_numpy(flat[:count].reshape(tuple(shapes[name])))
