"""keep_top against NumPy's lexsort: exact counts, seeded ties, on every backend alike."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import lottery_sparse as ls
from lottery_sparse.ops import dispatch, keep_top

AVAILABLE = dispatch.available("keep_top", "cpu")
backend = pytest.mark.parametrize("backend", AVAILABLE)
OP = torch.ops.lottery_sparse.keep_top.default
GOLDEN_TIES = [5, 7, 14, 15, 20, 21, 22, 23]


def by_sorting(scores, masks, count, seed, streams) -> list[np.ndarray]:
    """Rank by (score, random word), both descending, then by position."""
    values = np.concatenate([s.double().numpy().ravel() for s in scores])
    words = [ls.random.words(s.numel(), seed, t) for s, t in zip(scores, streams, strict=True)]
    ties = np.concatenate([w.numpy().view(np.uint32) for w in words]).astype(np.int64)
    kept = np.flatnonzero(np.concatenate([m.numpy().ravel() for m in masks]))
    order = kept[np.lexsort((kept, -ties[kept], -(values[kept] + 0.0)))]
    chosen = np.zeros(values.size, dtype=bool)
    chosen[order[:count]] = True
    ends = np.cumsum([s.numel() for s in scores])[:-1]
    parts = zip(np.split(chosen, ends), scores, strict=True)
    return [part.reshape(tuple(s.shape)) for part, s in parts]


def check(scores, masks, count, seed=0, streams=None):
    streams = [0] * len(scores) if streams is None else streams
    expected = by_sorting(scores, masks, count, seed, streams)
    for name in AVAILABLE:
        with ls.use_backend(name):
            got = keep_top(scores, masks, count, seed, streams)
        for a, b in zip(got, expected, strict=True):
            assert np.array_equal(a.numpy(), b), name
        assert sum(int(m.sum()) for m in got) == count


# coarse values tie; both zeros, infinities and the smallest numbers are among them
VALUES = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, float("inf"), -float("inf"), 0.5]


@settings(max_examples=80)
@given(
    scores=st.lists(st.lists(st.sampled_from(VALUES), max_size=40), min_size=1, max_size=4),
    density=st.floats(0, 1),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    streams=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4),
)
def test_matches_sorting(scores, density, fraction, seed, streams):
    g = np.random.default_rng(seed)
    masks = [torch.from_numpy(g.random(len(s)) < density) for s in scores]
    count = round(fraction * sum(int(m.sum()) for m in masks))
    check([torch.tensor(s) for s in scores], masks, count, seed, streams[: len(scores)])


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    + [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8],
    ids=str,
)
def test_every_dtype_by_the_backend_chosen_by_itself(dtype):
    scores = (torch.randn(30, 7) * 20).to(dtype)
    mask = torch.rand(30, 7) < 0.7
    for count in (0, 1, 50, int(mask.sum())):
        expected = by_sorting([scores], [mask], count, 3, [9])
        assert np.array_equal(keep_top(scores, mask, count, 3, 9).numpy(), expected[0])


def test_scores_closer_than_float32_can_tell():
    scores = 1.0 + torch.arange(10, dtype=torch.float64) * 2.0**-50
    assert keep_top(scores, torch.ones(10).bool(), 4).tolist() == [False] * 6 + [True] * 4
    large = 2**53 + torch.arange(10)
    assert keep_top(large, torch.ones(10).bool(), 4).tolist() == [False] * 6 + [True] * 4


@backend
def test_ties_break_at_random_by_seed_and_stream(backend):
    scores, mask = torch.zeros(1000), torch.ones(1000, dtype=torch.bool)
    with ls.use_backend(backend):
        chosen = [
            keep_top(scores, mask, 500, seed, stream)
            for seed, stream in itertools.product((0, 1, 2**63), (0, 1))
        ]
        again = keep_top(scores, mask, 500, 0, 0)
    assert torch.equal(chosen[0], again)
    for a, b in itertools.combinations(chosen, 2):
        common = int((a & b).sum())  # 250 +- 8 (hypergeometric) if they are independent
        assert 200 < common < 300
    halves = [int(c[:500].sum()) for c in chosen]  # no preference for low positions
    assert all(200 < h < 300 for h in halves)


@backend
def test_golden_ties(backend):
    with ls.use_backend(backend):
        chosen = keep_top(torch.zeros(24), torch.ones(24).bool(), 8, 42, ls.random.stream_of("w"))
    assert chosen.nonzero().flatten().tolist() == GOLDEN_TIES


@backend
def test_zeros_of_both_signs_tie(backend):
    plus, mask = torch.zeros(64), torch.ones(64).bool()
    with ls.use_backend(backend):
        expected = keep_top(plus, mask, 20)
        assert torch.equal(keep_top(-plus, mask, 20), expected)
        mixed = torch.where(torch.arange(64) % 3 == 0, -plus, plus)
        assert torch.equal(keep_top(mixed, mask, 20), expected)


@backend
def test_streams_belong_to_tensors(backend):
    scores, mask = torch.zeros(200), torch.ones(200).bool()
    with ls.use_backend(backend):
        a, b = keep_top([scores, scores], [mask, mask], 200, 0, [1, 2])
        c, d = keep_top([scores, scores], [mask, mask], 200, 0, [2, 1])
        same = keep_top([scores, scores], [mask, mask], 200, 0, 7)
    assert torch.equal(a, d)
    assert torch.equal(b, c)
    assert not torch.equal(a, b)
    # with one stream the same entries tie pairwise, and the first tensor wins the last of them
    assert int((same[0] ^ same[1]).sum()) <= 1


@backend
def test_global_order_knows_no_tensors(backend):
    g = np.random.default_rng(0)
    scores = torch.from_numpy(g.permutation(600).astype(np.float32))
    mask = torch.ones(600).bool()
    with ls.use_backend(backend):
        whole = keep_top(scores, mask, 123)
        parts = keep_top(list(scores.split(250)), list(mask.split(250)), 123)
    assert torch.equal(torch.cat(parts), whole)
    assert isinstance(parts, list)


@backend
def test_shapes_strides_and_empty_tensors(backend):
    scores, mask = torch.randn(8, 6), torch.rand(8, 6) < 0.7
    with ls.use_backend(backend):
        expected = keep_top(scores.T.contiguous(), mask.T.contiguous(), 10)
        assert torch.equal(keep_top(scores.T, mask.T, 10), expected)
        empty = torch.zeros(0, 3)
        a, b = keep_top([empty, scores], [empty.bool(), mask], 10)
        assert a.shape == (0, 3)
        assert torch.equal(b, keep_top(scores, mask, 10))
        assert keep_top(torch.tensor(2.0), torch.tensor(True), 1).item() is True
        assert keep_top(empty, empty.bool(), 0).shape == (0, 3)


@backend
def test_arguments_stay_and_results_are_new(backend):
    scores, mask = torch.randn(50), torch.rand(50) < 0.7
    before = scores.clone(), mask.clone()
    with ls.use_backend(backend):
        result = keep_top(scores, mask, int(mask.sum()))
    assert torch.equal(result, mask)
    result.fill_(False)
    assert torch.equal(scores, before[0])
    assert torch.equal(mask, before[1])


@backend
def test_nan_at_a_kept_entry_is_an_error(backend):
    scores = [torch.zeros(4), torch.tensor([1.0, torch.nan, -torch.nan])]
    masks = [torch.ones(4).bool(), torch.tensor([True, True, False])]
    with ls.use_backend(backend):
        with pytest.raises(ValueError, match=r"scores\[1\] holds NaN at 1 kept entries"):
            keep_top(scores, masks, 2)
        masks[1][1] = False  # what is pruned may hold anything
        assert sum(int(m.sum()) for m in keep_top(scores, masks, 5)) == 5


def test_no_gradient():
    scores = torch.randn(5, requires_grad=True)
    assert not keep_top(scores, torch.ones(5).bool(), 2).requires_grad


def test_vmap_equals_a_loop():
    scores, masks = torch.randn(3, 20).round(), torch.rand(20, 3) < 0.8
    got = torch.vmap(lambda s, m: keep_top(s, m, 5, 1, 2), (0, 1))(scores, masks)
    expected = torch.stack([keep_top(scores[i], masks[:, i], 5, 1, 2) for i in range(3)])
    assert torch.equal(got, expected)
    shared = torch.ones(20).bool()
    a, b = torch.vmap(lambda s: tuple(keep_top([s, scores[0]], [shared, shared], 9)))(scores)
    for i in range(3):
        both = keep_top([scores[i], scores[0]], [shared, shared], 9)
        assert torch.equal(a[i], both[0])
        assert torch.equal(b[i], both[1])


def test_opcheck():
    scores, masks = (
        [torch.randn(3, 4), torch.randn(5)],
        [torch.ones(3, 4).bool(), torch.ones(5) > 0],
    )
    opcheck(OP, (scores, masks, 6, 1, [2, 3]))
    opcheck(OP, ([scores[0].double()], [masks[0]], 6, -1, [0]))


def test_compiled_equals_eager():
    scores, mask = torch.randn(40), torch.rand(40) < 0.8
    compiled = torch.compile(keep_top, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, mask, 7, 5, 6), keep_top(scores, mask, 7, 5, 6))


ONES = torch.ones(4).bool()
BAD = {
    "count above kept": (
        (torch.zeros(4), torch.tensor([True, False, True, False]), 3),
        "count is 3, but only 2 entries are kept so far",
    ),
    "count negative": ((torch.zeros(4), ONES, -1), "count must be at least 0, got -1"),
    "mask dtype": (
        (torch.zeros(4), torch.ones(4), 1),
        r"masks\[0\] must be bool of shape \(4,\) on cpu, got torch\.float32",
    ),
    "mask shape": (([torch.zeros(4)] * 2, [ONES, ONES[:3]], 1), r"masks\[1\].*got.*\(3,\)"),
    "mask device": ((torch.zeros(4), ONES.to("meta"), 1), r"masks\[0\].*on cpu, got.*on meta"),
    "mixed dtypes": (
        ([torch.zeros(4), torch.zeros(4).half()], [ONES, ONES], 1),
        "scores must share one real dtype, got torch.float32 and torch.float16",
    ),
    "complex": ((torch.zeros(4, dtype=torch.complex64), ONES, 1), "one real dtype"),
    "fewer masks": (([torch.zeros(4)] * 2, [ONES], 1), "equally many.*got 2, 1 and 2"),
    "fewer streams": (([torch.zeros(4)], [ONES], 1, 0, [1, 2]), "got 1, 1 and 2"),
    "nothing": (([], [], 0), "at least one"),
    "seed": ((torch.zeros(4), ONES, 1, 2**64), "seed must fit 64 bits"),
    "stream": ((torch.zeros(4), ONES, 1, 0, -1), r"stream must be in \[0, 2\*\*32\), got -1"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, message):
    for name in AVAILABLE:
        with ls.use_backend(name), pytest.raises(ValueError, match=message):
            keep_top(*arguments)


def test_a_tensor_wants_one_mask_and_one_stream():
    with pytest.raises(TypeError, match="masks must be a tensor and stream an int"):
        keep_top(torch.zeros(4), [ONES], 1)
    with pytest.raises(TypeError, match="stream an int"):
        keep_top(torch.zeros(4), ONES, 1, 0, [0])
