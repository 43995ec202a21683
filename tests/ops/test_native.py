"""The compiled CPU kernels against plain oracles: NumPy sorting, float64 products, known answers.

test_native_build.py runs this file again for every CPU variant (LS_CPU) in a process of its own.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from tolerances import of_sum

from lottery_sparse.ops.bits import reference as bits_reference
from lottery_sparse.ops.random import reference as random_reference
from lottery_sparse.ops.selection import reference as selection_reference

if importlib.util.find_spec("lottery_sparse._C") is None:
    pytest.skip("the native kernels (lottery_sparse._C) are not built", allow_module_level=True)

from lottery_sparse.ops.bits import cpu as bits_cpu
from lottery_sparse.ops.masked import cpu as masked_cpu
from lottery_sparse.ops.masked.arguments import MaskedArgs
from lottery_sparse.ops.random import cpu as random_cpu
from lottery_sparse.ops.selection import cpu as selection_cpu

pytestmark = pytest.mark.numeric

_host = pytest.importorskip(
    "lottery_sparse._host", reason="_host is not built", exc_type=ImportError
)

ops = torch.ops.lottery_sparse_native
CHUNK = 1 << 18  # kKeepTopChunk: selection splits tensors at multiples of it


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


# ---- Philox --------------------------------------------------------------------------------

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


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    block, stream, step = counter[0] | counter[1] << 32, counter[2], counter[3]
    assert _host.philox(key[0] | key[1] << 32, stream, step, block) == answer


def words_of(count: int, seed: int, stream: int, step: int) -> np.ndarray:
    """Element i from the block that holds it, one at a time."""
    seed %= 2**64
    blocks = [_host.philox(seed, stream, step, b) for b in range(-(-count // 4))]
    return np.array(blocks, dtype=np.uint32).reshape(-1)[:count]


KEYS = [(0, 0, 0), (-1, 2**32 - 1, 2**32 - 1), (2**63 - 1, 7, 11), (-(2**63), 1, 0)]


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 5, 63, 64, 257])
def test_laws_by_their_definition(key, count):
    words = words_of(count, *key)
    assert (random_cpu.random_words(count, *key).numpy().view(np.uint32) == words).all()
    uniform = (words >> 8).astype(np.float64) * 2.0**-24
    assert (random_cpu.random_uniform(count, *key).numpy() == uniform).all()

    bits = words_of(-(-count // 32), *key)
    signs = [1.0 if bits[i // 32] >> (i % 32) & 1 else -1.0 for i in range(count)]
    assert random_cpu.random_signs(count, *key).tolist() == signs

    table = torch.arange(2**15, dtype=torch.int32) * 3 + 1
    halves = words_of(-(-count // 2), *key).view(np.uint16)[:count].astype(np.int64)
    value = ((halves & 0x7FFF) * 3 + 1) * 2.0**-20
    normal = np.where(halves & 0x8000, -value, value).astype(np.float32)
    assert (random_cpu.random_normal(count, *key, table).numpy() == normal).all()


@pytest.mark.parametrize("law", ["random_words", "random_signs", "random_uniform"])
def test_long_draws_match_the_reference(law, threads):
    args = (3 * 2**13 + 17, 1234567, 5, 6)  # several parts and a ragged end
    assert torch.equal(getattr(random_cpu, law)(*args), getattr(random_reference, law)(*args))


def test_a_draw_is_a_prefix_of_a_longer_one(threads):
    assert torch.equal(
        random_cpu.random_words(50, 1, 2, 3), random_cpu.random_words(20000, 1, 2, 3)[:50]
    )


# ---- keep_top ------------------------------------------------------------------------------


def keep_top_by_sorting(scores, masks, count, seed, streams):
    """(score descending, word descending, position ascending), by NumPy's lexsort."""
    value = np.concatenate([s.numpy().ravel().astype(np.float64) for s in scores]) + 0.0
    word = np.concatenate(
        [
            random_reference.random_words(s.numel(), seed, stream, 0).numpy().view(np.uint32)
            for s, stream in zip(scores, streams, strict=True)
        ]
    ).astype(np.int64)
    kept = np.concatenate([m.numpy().ravel() for m in masks])
    order = np.lexsort((np.arange(value.size), -word, -np.where(kept, value, -np.inf)))
    chosen = np.zeros(value.size, dtype=bool)
    chosen[order[kept[order]][:count]] = True
    parts = np.split(chosen, np.cumsum([s.numel() for s in scores])[:-1])
    return [torch.from_numpy(p).view(s.shape) for p, s in zip(parts, scores, strict=True)]


SCORES = {
    "normal": lambda g, n: g.normal(size=n),
    "all equal": lambda g, n: np.zeros(n),
    "both zeros": lambda g, n: np.copysign(0.0, g.normal(size=n)),
    "two values": lambda g, n: g.integers(0, 2, size=n) * 2.0 - 1.0,
    "coarse": lambda g, n: np.round(g.normal(size=n), 1),
    "extremes": lambda g, n: g.choice([np.inf, -np.inf, 3e38, -3e38, 1e-45, -1e-45, 0.0], size=n),
    "sorted": lambda g, n: np.sort(g.normal(size=n)),
    "one far tensor": lambda g, n: g.normal(size=n) * 1e-6 + g.integers(0, 2) * 100,
}
SIZES = [(1,), (64,), (1, 63, 65), (4096, 1, 100), (20000, 5000)]


def check_selection(kind, sizes, density, fractions, seed):
    g = rng(seed, len(sizes), sum(sizes))
    scores = [torch.from_numpy(SCORES[kind](g, n).astype(np.float32)) for n in sizes]
    masks = [torch.from_numpy(g.random(n) < density) for n in sizes]
    streams = [int(s) for s in g.integers(0, 2**32, size=len(sizes))]
    kept = sum(int(m.sum()) for m in masks)
    for fraction in fractions:
        args = (scores, masks, round(fraction * kept), seed, streams)
        got, expected = selection_cpu.keep_top(*args), keep_top_by_sorting(*args)
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(a, b), f"{kind}, tensor {i}, keep {args[2]} of {kept}"


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", SCORES)
def test_keep_top_matches_sorting(kind, sizes, density):
    check_selection(kind, sizes, density, [0.0, 0.01, 0.5, 0.8, 1.0], seed=3)


@pytest.mark.parametrize("kind", SCORES)
def test_keep_top_over_several_chunks(kind, threads):
    check_selection(kind, (2 * CHUNK + 77, 1000, CHUNK), 0.7, [0.2, 0.5], seed=5)


def test_keep_top_with_few_kept_entries():
    # too few for the sample to bracket anything
    check_selection("normal", (CHUNK,), 0.001, [0.3], seed=7)
    check_selection("coarse", (CHUNK,), 0.001, [0.3], seed=7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int16])
def test_keep_top_of_other_dtypes(dtype):
    scores = torch.from_numpy(rng(1).normal(size=500) * 50).to(dtype)
    mask = torch.ones(500, dtype=torch.bool)
    expected = selection_reference.keep_top([scores], [mask], 100, 9, [4])
    assert selection_cpu.why_not([scores]) is None
    assert torch.equal(selection_cpu.keep_top([scores], [mask], 100, 9, [4])[0], expected[0])


def test_keep_top_refuses_what_float32_cannot_hold():
    scores = torch.zeros(3, dtype=torch.float64)
    assert "float64" in str(selection_cpu.why_not([scores]))


def test_keep_top_names_the_tensor_with_nan():
    scores = [torch.zeros(4), torch.tensor([1.0, float("nan"), -float("nan")])]
    masks = [torch.ones(4, dtype=torch.bool), torch.tensor([True, True, True])]
    with pytest.raises(ValueError, match=r"scores\[1\] holds NaN at 2 kept entries"):
        selection_cpu.keep_top(scores, masks, 2, 0, [0, 0])
    masks[1][1:] = False  # what is pruned already may hold anything
    assert sum(int(m.sum()) for m in selection_cpu.keep_top(scores, masks, 2, 0, [0, 0])) == 2


def test_keep_top_of_more_than_there_are():
    with pytest.raises(ValueError, match="count is 5, but only 2 entries"):
        selection_cpu.keep_top([torch.zeros(3)], [torch.tensor([True, True, False])], 5, 0, [0])


# ---- masks as bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [0, 1, 31, 32, 33, 64, 127, 128, 129, 784])
@pytest.mark.parametrize("rows", [(), (0,), (1,), (5,), (2, 65)], ids=str)
def test_pack_mask_matches_the_reference(rows, columns, threads):
    mask = torch.from_numpy(rng(columns).random(rows + (columns,)) < 0.5)
    bits = bits_cpu.pack_mask(mask)
    assert torch.equal(bits, bits_reference.pack_mask(mask))
    assert torch.equal(bits_cpu.unpack_mask(bits, columns), mask)
    assert bits_cpu.count_kept(mask) == int(mask.sum())


def test_any_nonzero_byte_is_kept():
    mask = torch.arange(256, dtype=torch.uint8).view(torch.bool)
    expected = torch.arange(256) > 0
    assert bits_cpu.count_kept(mask) == 255
    assert torch.equal(bits_cpu.unpack_mask(bits_cpu.pack_mask(mask), 256), expected)


def test_unpack_mask_checks_the_number_of_words():
    with pytest.raises(RuntimeError, match="129 columns take 8 words"):
        bits_cpu.unpack_mask(torch.zeros(2, 4, dtype=torch.int32), 129)


# ---- masked_linear -----------------------------------------------------------------------------

# (N, K): one row, one column, less than a vector, odd, the paper's
LINEAR_SHAPES = [(1, 1), (1, 130), (40, 1), (7, 9), (33, 65), (10, 100), (300, 784)]
BATCHES = [0, 1, 2, 7, 31, 32, 33, 60, 64, 65, 70]
DENSITIES = [0.0, 0.02, 0.5, 1.0]


def problem(n, k, batch, density, networks=None, shared=False, seed=0):
    """x, weight (NaN at pruned entries), mask, bias, dy."""
    g = rng(n, k, batch, int(density * 100), networks or 0, seed)
    lead = () if networks is None else (networks,)

    def normal(*shape):
        return torch.from_numpy(g.normal(size=shape).astype(np.float32))

    mask = torch.from_numpy(g.random(lead + (n, k)) < density)
    weight = normal(*lead, n, k).where(mask, float("nan"))
    x = normal(batch, k) if shared else normal(*lead, batch, k)
    return x, weight, mask, normal(*lead, n), normal(*lead, batch, n)


def exact(x, weight, mask, bias, dy):
    """[(y, scale, terms), …] of y, dx and dw in float64; scale = sum of absolute products."""
    x, bias, dy = x.double(), bias.double().unsqueeze(-2), dy.double()
    w = weight.double().where(mask, 0.0)

    def products(x, w, bias, dy):
        dx, dw = dy @ w, (dy.mT @ x) * mask
        return x @ w.mT + bias, dx if dx.dim() == x.dim() else dx.sum(0), dw

    values = products(x, w, bias, dy)
    scales = products(x.abs(), w.abs(), bias.abs(), dy.abs())
    shared = len(weight) if x.dim() < weight.dim() else 1
    terms = x.shape[-1] + 1, weight.shape[-2] * shared, x.shape[-2]
    return list(zip(values, scales, terms, strict=True))


def run_native(x, weight, mask, bias, dy):
    a = MaskedArgs(x, weight, mask, bias)
    return masked_cpu.masked_linear(a), *masked_cpu.masked_linear_backward(a, dy, True, True)


def check_linear(*args):
    for got, (expected, scale, terms) in zip(run_native(*args), exact(*args), strict=True):
        assert got.shape == expected.shape
        assert ((got - expected).abs() <= of_sum(expected, scale, terms, got.dtype)).all()


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_masked_linear_matches_float64(shape, density):
    for batch in BATCHES:
        check_linear(*problem(*shape, batch, density))


@pytest.mark.parametrize("shared", [False, True], ids=["own x", "shared x"])
@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (33, 65), (20, 300)], ids=str)
def test_networks_side_by_side_match_float64(shape, networks, shared):
    for batch in (0, 1, 60, 70):
        check_linear(*problem(*shape, batch, 0.1, networks, shared))


@pytest.mark.parametrize("shape", [(3, 2**16 + 5), (2**16 + 5, 3)], ids=str)
def test_more_columns_than_16_bits_hold(shape):
    check_linear(*problem(*shape, 5, 0.3))
    check_linear(*problem(*shape, 70, 0.3))


def test_empty_and_full_rows_and_columns():
    x, weight, mask, bias, dy = problem(33, 65, 70, 0.3)
    mask[3], mask[:, 5], mask[7], mask[:, 64] = False, False, True, True
    weight = torch.ones_like(weight).where(mask, float("nan"))
    check_linear(x, weight, mask, bias, dy)


def test_pruned_entries_reach_nothing_and_get_exact_zero():
    x, weight, mask, bias, dy = problem(33, 65, 60, 0.3)
    assert weight.isnan().any()
    y, dx, dw = run_native(x, weight, mask, bias, dy)
    assert not y.isnan().any()
    assert not dx.isnan().any()
    assert (dw[~mask] == 0).all()


def test_only_what_is_needed_is_computed():
    x, weight, mask, bias, dy = problem(33, 65, 60, 0.3)
    _, dx, dw = run_native(x, weight, mask, bias, dy)
    only_dx = ops.masked_linear_backward(dy, x, weight, mask, True, False)
    only_dw = ops.masked_linear_backward(dy, x, weight, mask, False, True)
    assert torch.equal(only_dx[0], dx)
    assert torch.equal(only_dw[1], dw)
    assert only_dx[1].shape == only_dw[0].shape == (0,)


@pytest.mark.parametrize("batch", [1, 60, 200])
@pytest.mark.parametrize("shared", [False, True], ids=["own x", "shared x"])
def test_same_bits_for_any_thread_count(batch, shared):
    args = problem(130, 700, batch, 0.2, networks=3, shared=shared)
    expected = run_native(*args)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run_native(*args), expected, strict=True))


@pytest.mark.parametrize("batch", [60, 200])
def test_same_bits_alone_or_among_others(batch):
    x, weight, mask, bias, dy = problem(130, 300, batch, 0.2, networks=4)
    together = run_native(x, weight, mask, bias, dy)
    for e in range(4):
        alone = run_native(x[e], weight[e], mask[e], bias[e], dy[e])
        assert all(torch.equal(a, b[e]) for a, b in zip(alone, together, strict=True))


def test_dx_of_a_shared_x_is_the_sum_in_order():
    x, weight, mask, bias, dy = problem(33, 65, 60, 0.3, networks=3, shared=True)
    _, dx, _ = run_native(x, weight, mask, bias, dy)
    parts = [run_native(x, weight[e], mask[e], bias[e], dy[e])[1] for e in range(3)]
    assert torch.equal(dx, parts[0] + parts[1] + parts[2])


def test_strided_inputs_and_packed_masks():
    args = problem(33, 65, 60, 0.3)
    expected = run_native(*args)
    strided = [a.repeat_interleave(2, -1)[..., ::2] for a in args]
    assert not strided[0].is_contiguous()
    packed = [args[0], args[1], bits_cpu.pack_mask(args[2]), *args[3:]]
    for variation in (strided, packed):
        assert all(torch.equal(a, b) for a, b in zip(run_native(*variation), expected, strict=True))


def test_it_says_why_it_refuses():
    x, weight, mask, bias, _ = problem(3, 4, 2, 0.5)
    a = MaskedArgs(x, weight, mask, bias)
    assert masked_cpu.why_not(a) is None
    assert "zero" in str(masked_cpu.why_not(a._replace(frozen=weight)))
    double = MaskedArgs(x.double(), weight.double(), mask)
    assert "float64" in str(masked_cpu.why_not(double))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(2, 5)}, r"x has shape \(2, 5\).*weight \(3, 4\)"),
        ({"x": torch.zeros(2, 4, dtype=torch.float64)}, "x must be Float.*got Double"),
        ({"mask": torch.ones(4, 3, dtype=torch.bool)}, r"mask has shape \(4, 3\)"),
        ({"mask": torch.ones(3, 4)}, "mask must be Bool"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4\)"),
        ({"weight": torch.zeros(4)}, r"weight has shape \(4\)"),
    ],
)
def test_the_rim_checks_what_it_dereferences(wrong, message):
    arguments = {
        "x": torch.zeros(2, 4),
        "weight": torch.zeros(3, 4),
        "mask": torch.ones(3, 4, dtype=torch.bool),
        "bias": torch.zeros(3),
    }
    with pytest.raises(RuntimeError, match=message):
        ops.masked_linear(**arguments | wrong)
