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
    """The stream of a name: the first four bytes of its SHA-256, little endian.

    >>> ls.random.stream_of("0.weight") == ls.random.stream_of("2.weight")
    False
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def derive(seed: int, *labels: object) -> int:
    """A new 64-bit seed from a seed and labels (a round, a purpose): their SHA-256.

    Labels are written as text and joined by "/", so use none that holds one.

    >>> ls.random.derive(0, "prune", 1) == ls.random.derive(0, "prune", 2)
    False
    """
    text = "/".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def as_seed(generator: int | torch.Generator | None) -> int:
    """An int seed as it is; 64 bits drawn from a CPU Generator; 0 for None.

    >>> ls.random.as_seed(7), ls.random.as_seed(None)
    (7, 0)
    """
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
    """int32 tensor of `shape` on the CPU, each element the bits of one random uint32.

    >>> ls.random.words((2, 3), seed=0).shape
    torch.Size([2, 3])
    """
    return _draw("random_words", shape, seed, stream, step)


def signs(shape: Shape, seed: int, stream: int = 0, step: int = 0) -> Tensor:
    """float32 tensor of +1 and -1, one random bit each.

    >>> ls.random.signs(1000, seed=0).unique()
    tensor([-1.,  1.])
    """
    return _draw("random_signs", shape, seed, stream, step)


def uniform(shape: Shape, seed: int, stream: int = 0, step: int = 0) -> Tensor:
    """float32 tensor in [0, 1), multiples of 2^-24.

    >>> bool((ls.random.uniform(1000, seed=0) < 1).all())
    True
    """
    return _draw("random_uniform", shape, seed, stream, step)


def normal(shape: Shape, std: float = 1.0, *, seed: int, stream: int = 0, step: int = 0) -> Tensor:
    """float32 tensor of N(0, std²), rounded as the module docstring says.

    >>> torch.equal(ls.random.normal(5, seed=1), ls.random.normal(5, seed=1))
    True
    """
    return _draw("random_normal", shape, seed, stream, step, _normal_table()) * std


def truncated_normal(
    shape: Shape, std: float = 1.0, *, seed: int, stream: int = 0, step: int = 0
) -> Tensor:
    """float32 tensor of a normal truncated at two sigma, its standard deviation being `std`.

    >>> bool((ls.random.truncated_normal(1000, 0.1, seed=0).abs() < 0.23).all())
    True
    """
    return _draw("random_normal", shape, seed, stream, step, _truncated_normal_table()) * std


def permutation(count: int, seed: int, stream: int = 0, step: int = 0) -> Tensor:
    """int64 [count]: a random order, the positions sorted by (word, position).

    >>> ls.random.permutation(4, seed=0).sort().values
    tensor([0, 1, 2, 3])
    """
    keys = words(count, seed, stream, step).to(torch.int64) & 0xFFFFFFFF
    return keys.argsort(stable=True)


def key(seed: int, stream: int = 0, step: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """int64 [3]: (seed, stream, step) as `ops.sample_mask` takes it; add 1 to [2] per step.

    >>> ls.random.key(seed=1, stream=2, step=3)
    tensor([1, 2, 3])
    """
    return torch.tensor(key_numbers(seed, stream, step)).to(device)


def key_numbers(seed: int, stream: int = 0, step: int = 0) -> tuple[int, int, int]:
    """A key as the integers that kernels take: the seed as the int64 with the same bits.

    >>> ls.random.key_numbers(2**64 - 1)
    (-1, 0, 0)

    Raises:
        ValueError: a seed beyond 64 bits, a stream or step beyond 32.
    """
    return _signed(seed), word_of(stream, "stream"), word_of(step, "step")


class Stream:
    """Draws in order: each call takes the next step of one (seed, name), so no two repeat.

    >>> stream = ls.random.Stream(0, "fc1.weight")
    >>> a, b = stream.normal(3), stream.normal(3)  # independent
    >>> stream.step
    2
    """

    def __init__(self, seed: int, name: str = ""):
        self.seed, self.name, self.step = seed, name, 0
        self._stream = stream_of(name)

    def __repr__(self) -> str:
        return f"Stream(seed={self.seed}, name={self.name!r}, step={self.step})"

    def words(self, shape: Shape) -> Tensor:
        """The next words, int32, see `ls.random.words`."""
        return words(shape, *self._next())

    def signs(self, shape: Shape) -> Tensor:
        """The next signs, +1 and -1 in float32."""
        return signs(shape, *self._next())

    def uniform(self, shape: Shape) -> Tensor:
        """The next float32 numbers of [0, 1)."""
        return uniform(shape, *self._next())

    def normal(self, shape: Shape, std: float = 1.0) -> Tensor:
        """The next float32 numbers of N(0, std²)."""
        seed, stream, step = self._next()
        return normal(shape, std, seed=seed, stream=stream, step=step)

    def truncated_normal(self, shape: Shape, std: float = 1.0) -> Tensor:
        """The next float32 numbers of a normal truncated at two sigma."""
        seed, stream, step = self._next()
        return truncated_normal(shape, std, seed=seed, stream=stream, step=step)

    def permutation(self, count: int) -> Tensor:
        """The next random order, int64 [count]."""
        return permutation(count, *self._next())

    def _next(self) -> tuple[int, int, int]:
        step, self.step = self.step, self.step + 1
        return self.seed, self._stream, step


def as_stream(generator: Stream | int | torch.Generator | None, name: str = "") -> Stream:
    """A Stream as it is; otherwise a new one on the seed of `generator`.

    >>> ls.random.as_stream(0, "fc1.weight")
    Stream(seed=0, name='fc1.weight', step=0)
    """
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
    """A seed as an int, if it is a whole number (NumPy's too) of 64 bits.

    >>> ls.random.whole_seed(7)
    7
    """
    seed = _whole(seed, "seed")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit 64 bits, got {shown(seed)}; take it modulo 2**64.")
    return seed


def word_of(value: int, name: str) -> int:
    """A stream or step as an int, if it is a whole number (NumPy's too) of 32 bits.

    >>> ls.random.word_of(7, "stream")
    7
    """
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
