"""ls.random: known answers, golden vectors of every law, and their statistics.

A seed is a file format here, so a golden vector that changes is a bug, not a test to update.
"""

from __future__ import annotations

import math
import zlib
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lottery_sparse as ls
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.random import reference
from lottery_sparse.ops.random.op import TABLE_SCALE, TABLE_SIZE, TRUNCATED_STD

AVAILABLE = dispatch.available("random_words", "cpu")
backend = pytest.mark.parametrize("backend", AVAILABLE)

# Random123, kat_vectors: philox 4x32 10 rounds. counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter: tuple, key: tuple) -> tuple:
    """Philox4x32-10 with Python's integers, from the paper."""
    a, b, c, d = counter
    k, l = key  # noqa: E741
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = q >> 32 ^ b ^ k, q % 2**32, p >> 32 ^ d ^ l, p % 2**32
        k, l = (k + 0x9E3779B9) % 2**32, (l + 0xBB67AE85) % 2**32  # noqa: E741
    return a, b, c, d


def words_of(count: int, seed: int, stream: int, step: int) -> list[int]:
    key = seed % 2**32, seed % 2**64 >> 32
    blocks = (philox((i, 0, stream, step), key) for i in range(-(-count // 4)))
    return [word for block in blocks for word in block][:count]


def unsigned(words: torch.Tensor) -> list[int]:
    return words.numpy().view(np.uint32).tolist()


# ---- Philox --------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    assert philox(counter, key) == answer
    numbers = [np.array([n], dtype=np.uint64) for n in (*counter, *key)]
    assert tuple(int(w[0]) for w in reference.philox(*numbers[:4], *key)) == answer
    assert tuple(int(w[0]) for w in reference.philox(*numbers)) == answer
    tensors = [torch.tensor([n]) for n in (*counter, *key)]
    assert tuple(int(w) for w in reference.philox(*tensors)) == answer


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_philox_in_numpy_and_torch(numbers):
    expected = philox(tuple(numbers[:4]), tuple(numbers[4:]))
    arrays = reference.philox(*(np.array([n], dtype=np.uint64) for n in numbers))
    tensors = reference.philox(*(torch.tensor([n]) for n in numbers))
    assert tuple(int(w[0]) for w in arrays) == expected
    assert tuple(int(w) for w in tensors) == expected


@settings(max_examples=30)
@given(
    count=st.integers(0, 300),
    seed=st.integers(-(2**63), 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**32 - 1),
)
def test_every_backend_draws_the_definition(count, seed, stream, step):
    key = (seed, stream, step)
    halves = [h for w in words_of(-(-count // 2), *key) for h in (w & 0xFFFF, w >> 16)][:count]
    bits = [w >> i & 1 for w in words_of(-(-count // 32), *key) for i in range(32)][:count]
    for name in AVAILABLE:
        with ls.use_backend(name):
            words = ls.random.words(count, *key)
            assert unsigned(words) == words_of(count, *key)
            assert ls.random.uniform(count, *key).tolist() == [
                (w >> 8) * 2.0**-24 for w in unsigned(words)
            ]
            assert ls.random.signs(count, *key).tolist() == [2.0 * b - 1.0 for b in bits]
            for law, table in TABLES.items():
                values = [table[h % 2**15] * 2.0**-20 * (-1.0 if h >> 15 else 1.0) for h in halves]
                drawn = getattr(ls.random, law)(count, seed=seed, stream=stream, step=step)
                assert drawn.tolist() == np.float32(values).tolist()


@pytest.mark.parametrize("law", ["words", "signs", "uniform", "normal", "truncated_normal"])
def test_long_draws_are_the_same_on_every_backend(law):
    draws = []
    for name in AVAILABLE:
        with ls.use_backend(name):
            draws.append(getattr(ls.random, law)((257, 131), seed=2**63 + 5, stream=3, step=4))
    assert draws[0].shape == (257, 131)
    assert all(torch.equal(d, draws[0]) for d in draws)
    head = getattr(ls.random, law)(100, seed=2**63 + 5, stream=3, step=4)
    assert torch.equal(draws[0].flatten()[:100], head)  # a draw is a prefix of a longer one


# ---- golden vectors --------------------------------------------------------------------------

KEY = {"seed": 0x0123456789ABCDEF, "stream": 0xDEADBEEF, "step": 7}
GOLDEN_WORDS = [0xCACC5E62, 0x8C12CC10, 0xFAE83309, 0xF86C84FC, 0xF79CB712, 0x40648D14]
GOLDEN_SIGNS = "-+---++--++++-+---++--++-+-+--++----+---"
GOLDEN_UNIFORM = [13290590, 9179852, 16443443, 16280708]
GOLDEN_NORMAL = [1174638, -853561, -871788, -124238, 547956, -2155903]
GOLDEN_TRUNCATED = [1245335, -916041, -935102, -134785, 592078, -2063353]
GOLDEN_PERMUTATION = [7, 5, 6, 9, 1, 0, 4, 3, 2, 8]
GOLDEN_STREAM = 0xA6C8AA63
GOLDEN_STREAM_UTF8 = 0x9890D791
GOLDEN_DERIVED = 0x386FC8FF66EBEC5F
GOLDEN_DERIVED_LABELS = 0x577D621A3B004B9A
GOLDEN_CRC = {"normal": 0x51CC6537, "truncated_normal": 0x23CC1925}


@backend
def test_golden_vectors(backend):
    with ls.use_backend(backend):
        assert unsigned(ls.random.words(6, **KEY)) == GOLDEN_WORDS
        signs = "".join("+" if s > 0 else "-" for s in ls.random.signs(40, **KEY).tolist())
        assert signs == GOLDEN_SIGNS
        assert (ls.random.uniform(4, **KEY) * 2**24).tolist() == GOLDEN_UNIFORM
        assert (ls.random.normal(6, **KEY) * 2**20).tolist() == GOLDEN_NORMAL
        truncated = ls.random.truncated_normal(6, **KEY)
        assert (truncated * 2**20).tolist() == GOLDEN_TRUNCATED
        assert ls.random.permutation(10, **KEY).tolist() == GOLDEN_PERMUTATION


def test_golden_seeds_and_streams():
    assert ls.random.stream_of("") == 0x42C4B0E3  # SHA-256 of nothing: e3b0c442 98fc1c14 ...
    assert ls.random.stream_of("fc1.weight") == GOLDEN_STREAM
    assert ls.random.stream_of("schicht.größe") == GOLDEN_STREAM_UTF8
    assert ls.random.derive(0) == GOLDEN_DERIVED
    assert ls.random.derive(7, "batches", 3) == GOLDEN_DERIVED_LABELS
    assert ls.random.key(2**64 - 1, 5, 6).tolist() == [-1, 5, 6]


# ---- the tables ------------------------------------------------------------------------------

TABLES = {
    "normal": ls.random._normal_table().tolist(),
    "truncated_normal": ls.random._truncated_normal_table().tolist(),
}


@pytest.mark.parametrize("law", TABLES)
def test_golden_tables(law):
    table = np.array(TABLES[law], dtype="<i4")
    assert table.shape == (TABLE_SIZE,)
    assert zlib.crc32(table.tobytes()) == GOLDEN_CRC[law]
    assert (np.diff(table) >= 0).all()
    assert table[0] >= 0


def exact_quantiles(law: str) -> list[float]:
    """What a table rounds, in steps."""
    mass, divisor = 0.5, 1.0
    if law == "truncated_normal":
        mass, divisor = NormalDist().cdf(2.0) - 0.5, TRUNCATED_STD
    cells = [(j + 0.5) / TABLE_SIZE for j in range(TABLE_SIZE)]
    return [NormalDist().inv_cdf(0.5 + mass * c) / divisor * TABLE_SCALE for c in cells]


@pytest.mark.parametrize("law", TABLES)
def test_tables_do_not_depend_on_the_last_bits_of_a_libm(law):
    mpmath = pytest.importorskip("mpmath")
    quantiles = np.array(exact_quantiles(law))
    assert np.rint(quantiles).astype(int).tolist() == TABLES[law]
    distance = np.abs(np.abs(quantiles - np.rint(quantiles)) - 0.5)
    assert distance.min() > 1e-7  # random.py says so
    # the closest entries, the ends and some others in 40 digits
    closest = np.argsort(distance)[:20].tolist()
    with mpmath.workdps(40):
        half = mpmath.erf(mpmath.sqrt(2)) / 2
        mass = half if law == "truncated_normal" else mpmath.mpf(1) / 2
        divisor = mpmath.mpf(1) if law == "normal" else truncated_std(mpmath)
        for j in {*closest, 0, 1, TABLE_SIZE - 1, *range(0, TABLE_SIZE, 2500)}:
            cell = mpmath.mpf(2 * j + 1) / (2 * TABLE_SIZE)
            value = mpmath.sqrt(2) * mpmath.erfinv(2 * mass * cell) / divisor * TABLE_SCALE
            assert int(mpmath.nint(value)) == TABLES[law][j]
            assert abs(float(value) - quantiles[j]) < 1e-7


def truncated_std(mpmath):
    """Of a standard normal truncated at two: 1 - 2 * 2 φ(2) / (2 Φ(2) - 1), the root."""
    density = mpmath.exp(-2) / mpmath.sqrt(2 * mpmath.pi)
    return mpmath.sqrt(1 - 4 * density / mpmath.erf(mpmath.sqrt(2)))


def test_the_truncated_std_is_that_of_tensorflow():
    mpmath = pytest.importorskip("mpmath")
    assert abs(TRUNCATED_STD - float(truncated_std(mpmath))) < 1e-15


# ---- statistics of the laws ------------------------------------------------------------------

N = 200_000


def moments(law: str, **key: int) -> list[float]:
    z = getattr(ls.random, law)(N, **({"seed": 11} | key)).double()
    return [float((z**k).mean()) for k in (1, 2, 3, 4)]


# E z, E z^2, E z^3, E z^4, and the largest |z|
TRUNCATED_FOURTH = 2.3649  # kurtosis of a normal truncated at two sigma
LAWS = {
    "signs": (0.0, 1.0, 0.0, 1.0, 1.0),
    "normal": (0.0, 1.0, 0.0, 3.0, 4.33),
    "truncated_normal": (0.0, 1.0, 0.0, TRUNCATED_FOURTH, 2.2738),
    "uniform": (1 / 2, 1 / 3, 1 / 4, 1 / 5, 1.0),
}


@pytest.mark.parametrize("law", LAWS)
def test_moments(law):
    *expected, largest = LAWS[law]
    for got, wanted, slack in zip(moments(law), expected, (1, 2, 4, 10), strict=True):
        assert abs(got - wanted) < 4 * slack / math.sqrt(N)
    values = getattr(ls.random, law)(N, seed=11)
    assert values.abs().max() <= largest
    assert values.dtype == torch.float32


def test_uniform_bytes_are_even():
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(ls.random.words(N, 5).to(torch.int64) >> shift & 255, minlength=256)
        chi_square = float(((counts - N / 256) ** 2 / (N / 256)).sum())
        assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


@pytest.mark.parametrize("law", ["signs", "normal", "truncated_normal", "uniform"])
def test_neighbours_streams_steps_and_seeds_are_uncorrelated(law):
    def draw(**key):
        z = getattr(ls.random, law)(N, **({"seed": 1, "stream": 1, "step": 1} | key)).double()
        return (z - z.mean()) / z.std()

    z = draw()
    others = [
        z.roll(1),
        z.roll(4),
        draw(seed=2),
        draw(stream=2),
        draw(step=2),
        draw(seed=2**32 + 1),
    ]
    for other in others:
        assert abs(float((z * other).mean())) < 4 / math.sqrt(N)


@pytest.mark.parametrize("law", ls.random.LAWS)
def test_named_laws_have_the_std_asked_for(law):
    z = ls.random.LAWS[law](N, 0.25, seed=3, stream=4, step=5).double()
    assert abs(float(z.mean())) < 4 * 0.25 / math.sqrt(N)
    assert abs(float(z.std()) / 0.25 - 1) < 0.01


def test_permutations():
    for count in (0, 1, 2, 100):
        assert sorted(ls.random.permutation(count, 1).tolist()) == list(range(count))
    firsts = torch.tensor([int(ls.random.permutation(4, 0, 0, step)[0]) for step in range(2000)])
    assert ((torch.bincount(firsts) - 500).abs() < 4 * math.sqrt(2000 * 3 / 16)).all()


# ---- Stream, seeds ---------------------------------------------------------------------------


def test_a_stream_takes_the_next_step_every_time():
    gen = ls.random.Stream(9, "fc1.weight")
    key = {"seed": 9, "stream": ls.random.stream_of("fc1.weight")}
    assert torch.equal(gen.words(5), ls.random.words(5, **key, step=0))
    assert torch.equal(gen.signs(5), ls.random.signs(5, **key, step=1))
    assert torch.equal(gen.uniform((2, 3)), ls.random.uniform((2, 3), **key, step=2))
    assert torch.equal(gen.normal(5, 2.0), ls.random.normal(5, 2.0, **key, step=3))
    truncated = ls.random.truncated_normal(5, 0.5, **key, step=4)
    assert torch.equal(gen.truncated_normal(5, 0.5), truncated)
    assert torch.equal(gen.permutation(7), ls.random.permutation(7, **key, step=5))
    assert repr(gen) == "Stream(seed=9, name='fc1.weight', step=6)"


def test_streams_of_other_names_and_steps_share_no_words():
    gens = [ls.random.Stream(0, name) for name in ("a", "b", "")]
    draws = [gen.words(500) for gen in gens for _ in range(3)]
    assert len(torch.cat(draws).unique()) == 9 * 500


def test_as_stream():
    gen = ls.random.Stream(1, "a")
    assert ls.random.as_stream(gen, "b") is gen
    new = ls.random.as_stream(5, "b")
    assert (new.seed, new.name, new.step) == (5, "b", 0)
    assert ls.random.as_stream(None).seed == 0


def test_seeds_from_generators():
    assert ls.random.as_seed(None) == 0
    assert ls.random.as_seed(-3) == -3
    generator = torch.Generator().manual_seed(0)
    first, second = ls.random.as_seed(generator), ls.random.as_seed(generator)
    assert first != second
    assert ls.random.as_seed(torch.Generator().manual_seed(0)) == first
    assert 2**32 < first < 2**64  # both halves are drawn
    state = torch.get_rng_state()
    ls.random.normal(10, seed=first)
    assert torch.equal(torch.get_rng_state(), state)  # global state is left alone


def test_nothing_reads_global_state():
    torch.manual_seed(1)
    a = ls.random.normal(10, seed=0)
    torch.manual_seed(2)
    assert torch.equal(ls.random.normal(10, seed=0), a)


def test_a_seed_and_its_signed_form_are_one():
    assert torch.equal(ls.random.words(9, 2**64 - 5), ls.random.words(9, -5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ls.random.words(3, 2**64), ValueError, "seed must fit 64 bits, got 1844.*modulo"),
        (lambda: ls.random.words(3, -(2**63) - 1), ValueError, "seed must fit 64 bits"),
        (
            lambda: ls.random.words(3, 0, -1),
            ValueError,
            r"stream must be in \[0, 2\*\*32\), got -1",
        ),
        (lambda: ls.random.words(3, 0, 2**32), ValueError, "stream must be in"),
        (lambda: ls.random.normal(3, seed=0, step=-1), ValueError, "step must be in .* got -1"),
        (lambda: ls.random.key(0, 0, 2**32), ValueError, "step must be in"),
        (lambda: ls.random.as_seed(1.5), TypeError, "generator must be an int seed.*got 1.5"),
        (lambda: ls.random.as_seed(True), TypeError, "got True"),
        (lambda: ls.random.as_seed("0"), TypeError, "got '0'"),
    ],
)
def test_bad_keys(call, error, message):
    with pytest.raises(error, match=message):
        call()
