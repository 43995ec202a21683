"""Frozen sources, the values of pruned weights: zero, a tensor, sign x constant, or a seed's draws.

A layer keeps a source as tensors for the op. Where a few numbers suffice to make these again, the
layer also keeps a descriptor, and its state_dict stores the descriptor instead of the tensors.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lottery_sparse.ops import SignConstant
from lottery_sparse.ops.random.op import LAWS, stream_of, whole_seed, word_of
from lottery_sparse.text import shown

FLOAT32 = torch.finfo(torch.float32).max


__all__ = ["Constant", "Seeded", "SignOf"]  # the namespace ls.frozen


def _magnitude(value: Any, what: str, most: float = float("inf")) -> float:
    """A number of any kind, of NumPy or a tensor too, as a float that is a magnitude."""
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError(f"{what}, a finite number, at least 0, got {shown(repr(value))}.")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # many elements, or 10**400
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise ValueError(f"{what}, a finite number, at least 0, got {shown(repr(value))}.")
    if number > most:
        raise ValueError(f"{what}, at most {most:.4g}, as float32 holds no more, got {number:g}.")
    return number


class _Value:
    """A value that is pickled as a call of its type, so that loading runs the type's checks."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(vars(self).values())

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, **state)  # of pickles that were written before


@dataclass(frozen=True)
class Constant(_Value):
    """Frozen source sign x constant: each pruned weight keeps its sign at one magnitude.

    Signs are those of the layer's weight when the mask is set (0 counts as plus).

    >>> ls.set_masks_(model, masks, frozen=ls.frozen.Constant(0.05))
    >>> model[0].weight[~masks["0.weight"]].detach().abs().unique()
    tensor([0.0500])

    Args:
        constant: the magnitude, at least 0; None = population standard deviation of the layer's
            weight.
    """

    constant: float | None = None

    def __post_init__(self) -> None:
        # a negative one would flip the signs that a state_dict reads back
        if self.constant is not None:
            object.__setattr__(
                self, "constant", _magnitude(self.constant, "constant is a magnitude")
            )


@dataclass(frozen=True)
class Seeded(_Value):
    """Frozen source drawn from a seed: stored as the seed, the same on every machine.

    >>> ls.set_masks_(model, masks, frozen=ls.frozen.Seeded("normal", seed=1, std=0.1))

    Args:
        law: "normal", "truncated_normal", "uniform" or "sign" (±std); all have mean 0.
        seed: 64-bit seed, a whole number of Python's or NumPy's.
        std: standard deviation, at least 0 and finite in float32, in which values are drawn; None =
            population standard deviation of the layer's weight.
        stream: 32-bit stream; None = that of the parameter's name, `ls.random.stream_of(name)`,
            without what wrappers such as torch.compile add to it.

    Raises:
        ValueError, TypeError: an argument is none of these.
    """

    law: str
    seed: int
    std: float | None = None
    stream: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.law, str) or self.law not in LAWS:
            raise ValueError(f"law must be one of {', '.join(LAWS)}, got {self.law!r}.")
        # written down as Python's numbers, which compare, and go into JSON, alike
        object.__setattr__(self, "seed", whole_seed(self.seed))
        if self.std is not None:
            std = _magnitude(self.std, "std is a standard deviation", FLOAT32)
            object.__setattr__(self, "std", std)
        if self.stream is not None:
            object.__setattr__(self, "stream", word_of(self.stream, "stream"))


@dataclass(frozen=True)
class SignOf(_Value):
    """A start of a `Ticket`: sign x constant, with the signs of values that a seed draws.

    It takes the room of a seed. A drawn value of 0 gives 0.

    >>> ls.frozen.SignOf(ls.frozen.Seeded("normal", seed=1, std=1.0), constant=0.05)

    Args:
        source: what is drawn.
        constant: the magnitude, at least 0 and finite in float32.

    Raises:
        ValueError, TypeError: an argument is none of these.
    """

    source: Seeded
    constant: float

    def __post_init__(self) -> None:
        if not isinstance(self.source, Seeded):
            raise TypeError(f"source must be ls.frozen.Seeded, got {type(self.source).__name__}.")
        constant = _magnitude(self.constant, "constant is a magnitude", FLOAT32)
        object.__setattr__(self, "constant", constant)


# torch.load takes them out of a checkpoint with its default, weights_only=True
torch.serialization.add_safe_globals([Constant, Seeded, SignOf])

Source = str | Tensor | Constant | Seeded | None


def keyed(source: Any, key: str) -> Any:
    """The source. A seeded source without a stream gets the stream of the parameter's key.

    Args:
        key: the name of the parameter as `names.keys_of` gives it.
    """
    if isinstance(source, SignOf):
        return replace(source, source=keyed(source.source, key))
    if isinstance(source, Seeded) and source.stream is None:
        return replace(source, stream=stream_of(key))
    return source


def drawn(name: str, source: Seeded | SignOf, shape: torch.Size) -> Tensor:
    """The float32 values of a seeded source for the parameter `name`.

    Raises:
        ValueError: it has no std, or values beyond float32; the message names `name`.
    """
    if isinstance(source, SignOf):
        return drawn(name, source.source, shape).sign() * source.constant
    if source.std is None:
        raise ValueError(
            f"the seeded start of {shown(name)} needs a std, as there is no weight to take it of."
        )
    stream = stream_of(name) if source.stream is None else source.stream
    values = LAWS[source.law](shape, source.std, seed=source.seed, stream=stream)
    return _finite(values, f"start of {shown(name)}", source)


def _finite(values: Tensor, what: str, source: Constant | Seeded) -> Tensor:
    if not values.is_meta and not values.isfinite().all():
        raise ValueError(
            f"the {what} is {source}, which has values that {values.dtype} cannot hold; give it a "
            "smaller magnitude."
        )
    return values


class FrozenState(NamedTuple):
    """A frozen source, prepared for one weight."""

    frozen: Tensor | None = None  # None = zero; like the weight; [] = the constant of `signs`
    signs: Tensor | None = None  # packed int32
    descriptor: Constant | Seeded | None = None  # None: the state_dict stores `frozen` itself

    def for_op(self) -> Tensor | SignConstant | None:
        if self.signs is not None and self.frozen is not None:
            return SignConstant(self.signs, self.frozen)
        return self.frozen

    def like(self, weight: Tensor) -> FrozenState:
        """The same on the device, and in the dtype, of a weight."""
        return FrozenState(
            None if self.frozen is None else self.frozen.to(weight.device, weight.dtype),
            None if self.signs is None else self.signs.to(weight.device),
            self.descriptor,
        )


def prepare_frozen(name: str, source: Source, weight: Tensor) -> FrozenState:
    """Prepare `source` for the parameter `name`, whose value is `weight`.

    Raises:
        ValueError, TypeError: the source is unknown or does not fit; the message names `name`.
    """
    if source is None or (isinstance(source, str) and source == "zero"):
        return FrozenState()
    if isinstance(source, Tensor):
        if source.shape != weight.shape or not source.is_floating_point():
            raise ValueError(
                f"frozen values of {name} must be a floating tensor of shape "
                f"{tuple(weight.shape)}, got {source.dtype} {tuple(source.shape)}."
            )
        return FrozenState(source.detach().to(weight.device, weight.dtype, copy=True))
    if isinstance(source, Constant):
        constant = std_of(weight) if source.constant is None else source.constant
        rank = 2 if weight.dim() <= 3 else 4  # of one weight: networks side by side have one more
        signs, value = SignConstant.of(weight.detach(), constant, rank)
        held = Constant(constant)
        return FrozenState(_finite(value, f"frozen source of {name}", held), signs, held)
    if isinstance(source, Seeded):
        held = _prepare_seeded(
            Seeded(
                source.law,
                source.seed,
                std_of(weight) if source.std is None else source.std,
                stream_of(name) if source.stream is None else source.stream,
            ),
            weight,
        )
        assert held.frozen is not None
        _finite(held.frozen, f"frozen source of {name}", source)
        return held
    raise TypeError(
        f'frozen source of {name} must be "zero", a tensor, ls.frozen.Constant or '
        f"ls.frozen.Seeded, got {shown(repr(source))}."
    )


def _prepare_seeded(source: Seeded, weight: Tensor) -> FrozenState:
    values = LAWS[source.law](weight.shape, source.std, seed=source.seed, stream=source.stream)
    return FrozenState(values.to(weight.device, weight.dtype), None, source)


def remake(held: FrozenState, weight: Tensor) -> FrozenState:
    """The source with its values made again, in the dtype that `weight` has now."""
    if isinstance(held.descriptor, Seeded) and not weight.is_meta:
        return _prepare_seeded(held.descriptor, weight)
    if isinstance(held.descriptor, Constant) and held.frozen is not None:
        magnitude = held.descriptor.constant
        assert magnitude is not None  # `prepare_frozen` writes down the number it took
        return held._replace(frozen=torch.full_like(held.frozen, magnitude))
    return held


def std_of(weight: Tensor) -> float:
    if weight.numel() == 0:
        return 0.0  # nothing deviates; torch warns, and says NaN
    return float(weight.detach().double().std(correction=0))


# ---- as a state_dict entry: a tensor, or a 1-D uint8 tensor of JSON -------------------------


def encode(held: FrozenState) -> Tensor | None:
    """The state_dict entry `weight_frozen`; None = zero, no entry."""
    if held.descriptor is None:
        return held.frozen
    kind = "sign_constant" if isinstance(held.descriptor, Constant) else "seeded"
    text = json.dumps({"source": kind, **asdict(held.descriptor)}, sort_keys=True)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def decode(name: str, entry: Tensor | None, weight: Tensor) -> FrozenState:
    """The inverse of `encode`; `weight` is the effective weight, whose signs a constant takes."""
    if entry is None or entry.dtype != torch.uint8:
        return prepare_frozen(name, entry, weight)
    try:
        fields: dict[str, Any] = json.loads(bytes(entry.tolist()).decode())
        kind = {"sign_constant": Constant, "seeded": Seeded}[fields.pop("source")]
        source = kind(**fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"frozen source of {name} is a descriptor this version cannot read: "
            f"{shown(str(error)).rstrip('.')}."
        ) from error
    return prepare_frozen(name, source, weight)
