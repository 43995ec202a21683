"""Counter-based randomness: a value is a pure function of (seed, stream, step, index).

Philox4x32-10, integer arithmetic only, so NumPy, C++ and GPU give the same bits on every machine:
here a seed is a file format. key = seed (64 bits), counter = (block index, 64 bits; stream, 32;
step, 32). A stream is usually the hash of a parameter's name (`stream_of`). Laws, for element i:

    words       word i % 4 of block i // 4
    signs       bit i % 32 of word i // 32, 1 = +1, 0 = -1
    uniform     24 upper bits of a word, times 2^-24: [0, 1)
    normal      quantile function on 16 bits, table rounded to multiples of 2^-20; |z| < 4.33
    truncated_normal  the same, truncated at two sigma and rescaled to unit standard deviation,
                as TensorFlow 1.10 initialises (variance_scaling_initializer); |z| < 2.2738

The golden vectors in tests/ops/random/test_random.py freeze all of it.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from lottery_sparse.ops import dispatch
from lottery_sparse.text import shown

Shape = int | Sequence[int]

# standard deviation of a standard normal truncated at +-2
TRUNCATED_STD = 0.87962566103423978


def stream_of(name: str) -> int:
    """The stream of a name: the first four bytes of its SHA-256, little endian."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def derive(seed: int, *labels: object) -> int:
    """A new 64-bit seed from a seed and labels (a round, a purpose): their SHA-256.

    Labels are written as text and joined by "/", so use none that holds one.
    """
    text = "/".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def as_seed(generator: int | torch.Generator | None) -> int:
    """An int seed as it is; 64 bits drawn from a CPU Generator; 0 for None."""
    if generator is None:
        return 0
    if isinstance(generator, torch.Generator):
        if generator.device.type != "cpu":
            raise ValueError(
                f"generator must be a CPU generator, got one on {generator.device}; "
                "draws must not depend on the device."
            )
        high, low = torch.randint(0, 2**32, (2,), generator=generator).tolist()
        return high << 32 | low
    if isinstance(generator, bool) or not hasattr(generator, "__index__"):
        raise TypeError(
            f"generator must be an int seed, a torch.Generator or None, got {generator!r}."
        )
    return operator.index(generator)


def words(shape: Shape, seed: int, stream: int = 0, step: int = 0) -> Tensor:
    """int32 tensor of `shape` on the CPU, each element the bits of one random uint32."""
    return _draw("random_words", shape, seed, stream, step)


def signs(shape: Shape, seed: int, stream: int = 0, step: int = 0) -> Tensor:
    """float32 tensor of +1 and -1, one random bit each."""
    return _draw("random_signs", shape, seed, stream, step)


def uniform(shape: Shape, seed: int, stream: int = 0, step: int = 0) -> Tensor:
    """float32 tensor in [0, 1), multiples of 2^-24."""
    return _draw("random_uniform", shape, seed, stream, step)


def normal(shape: Shape, std: float = 1.0, *, seed: int, stream: int = 0, step: int = 0) -> Tensor:
    """float32 tensor of N(0, std²), rounded as the module docstring says."""
    return _draw("random_normal", shape, seed, stream, step, _normal_table()) * std


def truncated_normal(
    shape: Shape, std: float = 1.0, *, seed: int, stream: int = 0, step: int = 0
) -> Tensor:
    """float32 tensor of a normal truncated at two sigma, its standard deviation being `std`."""
    return _draw("random_normal", shape, seed, stream, step, _truncated_normal_table()) * std


def permutation(count: int, seed: int, stream: int = 0, step: int = 0) -> Tensor:
    """int64 [count]: a random order, the positions sorted by (word, position)."""
    keys = words(count, seed, stream, step).to(torch.int64) & 0xFFFFFFFF
    return keys.argsort(stable=True)


def key(seed: int, stream: int = 0, step: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """int64 [3]: (seed, stream, step) as `ops.sample_mask` takes it; add 1 to [2] per step."""
    return torch.tensor(key_numbers(seed, stream, step)).to(device)


def key_numbers(seed: int, stream: int = 0, step: int = 0) -> tuple[int, int, int]:
    """A key as the integers that kernels take: the seed as the int64 with the same bits.

    Raises:
        ValueError: a seed beyond 64 bits, a stream or step beyond 32.
    """
    return _signed(seed), word_of(stream, "stream"), word_of(step, "step")


class Stream:
    """Draws in order: each call takes the next step of one (seed, name), so no two repeat.

    >>> gen = Stream(0, "fc1.weight")
    >>> a, b = gen.normal(3), gen.normal(3)      # independent
    """

    def __init__(self, seed: int, name: str = ""):
        self.seed, self.name, self.step = seed, name, 0
        self._stream = stream_of(name)

    def __repr__(self) -> str:
        return f"Stream(seed={self.seed}, name={self.name!r}, step={self.step})"

    def words(self, shape: Shape) -> Tensor:
        return words(shape, *self._next())

    def signs(self, shape: Shape) -> Tensor:
        return signs(shape, *self._next())

    def uniform(self, shape: Shape) -> Tensor:
        return uniform(shape, *self._next())

    def normal(self, shape: Shape, std: float = 1.0) -> Tensor:
        seed, stream, step = self._next()
        return normal(shape, std, seed=seed, stream=stream, step=step)

    def truncated_normal(self, shape: Shape, std: float = 1.0) -> Tensor:
        seed, stream, step = self._next()
        return truncated_normal(shape, std, seed=seed, stream=stream, step=step)

    def permutation(self, count: int) -> Tensor:
        return permutation(count, *self._next())

    def _next(self) -> tuple[int, int, int]:
        step, self.step = self.step, self.step + 1
        return self.seed, self._stream, step


def as_stream(generator: Stream | int | torch.Generator | None, name: str = "") -> Stream:
    """A Stream as it is; otherwise a new one on the seed of `generator`."""
    return generator if isinstance(generator, Stream) else Stream(as_seed(generator), name)


def _signs_law(shape: Shape, std: float, *, seed: int, stream: int = 0, step: int = 0) -> Tensor:
    return signs(shape, seed, stream, step) * std


def _uniform_law(shape: Shape, std: float, *, seed: int, stream: int = 0, step: int = 0) -> Tensor:
    return (uniform(shape, seed, stream, step) * 2 - 1) * (math.sqrt(3.0) * std)


# Laws with mean 0 and standard deviation `std`, as a `Seeded` frozen source names them.
LAWS: dict[str, Callable[..., Tensor]] = {
    "sign": _signs_law,
    "uniform": _uniform_law,
    "normal": normal,
    "truncated_normal": truncated_normal,
}


def _draw(law: str, shape: Shape, seed: int, stream: int, step: int, *table: Tensor) -> Tensor:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    args = (math.prod(shape), *key_numbers(seed, stream, step), *table)
    return dispatch.kernel(law, torch.device("cpu"), args)(*args).view(shape)


def whole_seed(seed: int) -> int:
    """A seed as an int, if it is a whole number (NumPy's too) of 64 bits."""
    seed = _whole(seed, "seed")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit 64 bits, got {shown(seed)}; take it modulo 2**64.")
    return seed


def word_of(value: int, name: str) -> int:
    """A stream or step as an int, if it is a whole number (NumPy's too) of 32 bits."""
    value = _whole(value, name)
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must be in [0, 2**32), got {shown(value)}.")
    return value


def _whole(value: int, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {shown(repr(value))}.")
    return operator.index(value)


def _signed(seed: int) -> int:
    """A seed of 64 bits as the int64 with the same bits, which is what tensors can hold."""
    seed = whole_seed(seed)
    return seed - 2**64 if seed >= 2**63 else seed


# Tables of the upper half of a quantile function at the midpoints of 32,768 equal cells, int32
# multiples of 2^-20. The stdlib's inv_cdf is accurate to about 1e-15, and no entry lies within
# 1e-7 of a step of a rounding boundary, so every libm gives the same table (test_random.py).
TABLE_SIZE = 2**15
TABLE_SCALE = 2**20


@cache
def _normal_table() -> Tensor:
    return _quantile_table(0.5, 1.0)


@cache
def _truncated_normal_table() -> Tensor:
    return _quantile_table(NormalDist().cdf(2.0) - 0.5, TRUNCATED_STD)


def _quantile_table(mass: float, divisor: float) -> Tensor:
    """round(Φ⁻¹(0.5 + mass (j + 0.5) / size) / divisor · 2^20) for j = 0 … size - 1."""
    quantile = NormalDist().inv_cdf
    cells = ((j + 0.5) / TABLE_SIZE for j in range(TABLE_SIZE))
    return torch.tensor(
        [round(quantile(0.5 + mass * cell) / divisor * TABLE_SCALE) for cell in cells],
        dtype=torch.int32,
    )
