"""sample_mask: a pure function of score and key, with the straight-through gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tolerances import close
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import lottery_sparse as ls
from lottery_sparse.ops import dispatch, sample_mask

pytestmark = pytest.mark.numeric

OP = torch.ops.lottery_sparse.sample_mask.default
KEY = ls.random.key(5, ls.random.stream_of("fc1.score"), 3)
GOLDEN_MASK = "000000110000100111111011"


def by_definition(score: torch.Tensor, seed: int, stream: int, step: int) -> torch.Tensor:
    """From the words that NumPy draws: 24 bits below floor(p 2^24), p in float64."""
    words = ls.random.words(score.numel(), seed, stream, step).numpy().view(np.uint32)
    exact = score.detach().float().double().numpy().reshape(-1)
    probability = 1 / (1 + np.exp(-exact))
    mask = (words >> 8) < np.floor(np.nan_to_num(probability) * 2.0**24)
    return torch.from_numpy(mask).view(score.shape).to(score.dtype)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (33, 5), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_follows_its_definition(shape, dtype):
    score = (2 * torch.randn(shape)).to(dtype)
    for seed, stream, step in [(0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), (5, 6, 7)]:
        mask = sample_mask(score, ls.random.key(seed, stream, step))
        assert mask.dtype == dtype
        assert torch.equal(mask, by_definition(score, seed, stream, step))


@pytest.mark.parametrize("backend", dispatch.available("sample_mask", "cpu"))
def test_the_boundary_is_exact(backend):
    draws = (ls.random.words(2000, *KEY.tolist()).to(torch.int64) >> 8) & 0xFFFFFF
    low = draws < 2**20  # where a float32 score resolves halves of 2^-24
    for beyond, expected in [(0.5, 0.0), (1.5, 1.0)]:  # floor(p 2^24) = draw, draw + 1
        score = torch.logit((draws.double() + beyond) * 2.0**-24).float()
        with ls.use_backend(backend):
            mask = sample_mask(score, KEY)
        assert torch.equal(mask, by_definition(score, *KEY.tolist()))
        assert (mask[low] == expected).all()
    assert low.sum() > 50


def test_golden_mask():
    score = torch.linspace(-2, 2, 24)
    bits = "".join(str(int(m)) for m in sample_mask(score, KEY).tolist())
    assert bits == GOLDEN_MASK


def test_the_key_decides():
    score = torch.zeros(4000)
    first = sample_mask(score, KEY)
    torch.manual_seed(99)
    assert torch.equal(sample_mask(score, KEY), first)
    for other in range(3):  # another seed, stream or step is another draw
        key = KEY.clone()
        key[other] += 1
        agree = float((sample_mask(score, key) == first).float().mean())
        assert abs(agree - 0.5) < 4 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize("logit", [-4.0, -1.0, 0.0, 0.3, 3.0])
def test_probability_is_the_sigmoid(logit):
    n = 40_000
    p = 1 / (1 + math.exp(-logit))
    mean = float(sample_mask(torch.full((n,), logit), KEY).mean())
    assert abs(mean - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_extreme_scores():
    score = torch.tensor([math.inf, -math.inf, math.nan, 100.0, -110.0]).repeat_interleave(500)
    mask = sample_mask(score, KEY).view(5, 500)
    assert mask.unique(dim=1).flatten().tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_more_score_never_drops_an_entry():
    score = torch.randn(1000)
    assert (sample_mask(score + 0.5, KEY) >= sample_mask(score, KEY)).all()


def test_one_key_per_network():
    score = torch.randn(3, 4, 5)
    keys = torch.stack([ls.random.key(0, 1, 2), ls.random.key(-1, 2, 3), ls.random.key(0, 1, 2)])
    together = sample_mask(score, keys)
    for e in range(3):  # each as if it were alone
        assert torch.equal(together[e], sample_mask(score[e], keys[e]))
    assert sample_mask(torch.zeros(0, 4), torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 4)


def test_any_strides():
    score = torch.randn(6, 5)
    expected = sample_mask(score, KEY)
    for strided in (score.T.contiguous().T, score.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(sample_mask(strided, KEY), expected)
    assert torch.equal(sample_mask(score, KEY.repeat_interleave(2)[::2]), expected)
    keys = torch.stack([KEY, KEY + 1])
    two = torch.randn(2, 7)
    assert torch.equal(sample_mask(two, keys.T.contiguous().T), sample_mask(two, keys))


# ---- gradients -------------------------------------------------------------------------------


def test_straight_through_gradient():
    score, dm = torch.randn(50, dtype=torch.float64, requires_grad=True), torch.randn(50).double()
    (gradient,) = torch.autograd.grad(sample_mask(score, KEY), score, dm, create_graph=True)
    p = torch.sigmoid(score)
    close(gradient, dm * p * (1 - p))
    # and its own derivative, dm p (1 - p) (1 - 2 p)
    (second,) = torch.autograd.grad(gradient.sum(), score)
    close(second, dm * p * (1 - p) * (1 - 2 * p))


def test_the_gradient_is_that_of_the_expected_mask():
    score = torch.randn(10, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.sigmoid(score).sum(), score)
    (gradient,) = torch.autograd.grad(sample_mask(score, KEY).sum(), score)
    close(gradient, expected)


def test_saturated_scores_have_no_gradient():
    score = torch.tensor([200.0, -200.0, math.inf, -math.inf], requires_grad=True)
    (gradient,) = torch.autograd.grad(sample_mask(score, KEY).sum(), score)
    assert gradient.tolist() == [0.0] * 4


# ---- what torch asks -------------------------------------------------------------------------


def test_opcheck():
    opcheck(OP, (torch.randn(3, 4, requires_grad=True), KEY))
    keys = torch.stack([KEY, KEY + 1])
    opcheck(OP, (torch.randn(2, 5, dtype=torch.float16, requires_grad=True), keys))
    opcheck(OP, (torch.randn(4, 3).T, KEY))


def test_vmap_and_func_grad():
    scores, keys = torch.randn(3, 4, 5), torch.stack([KEY, KEY + 1, KEY + 2])
    for in_dims in [(0, None), (0, 0), (None, 0), (2, None)]:
        score = scores if in_dims[0] is not None else scores[0]
        key = keys if in_dims[1] is not None else KEY
        size = score.shape[in_dims[0]] if in_dims[0] is not None else 3
        pairs = [
            (
                score if in_dims[0] is None else score.select(in_dims[0], i),
                key if in_dims[1] is None else key[i],
            )
            for i in range(size)
        ]
        expected = torch.stack([sample_mask(s, k) for s, k in pairs])
        assert torch.equal(torch.vmap(sample_mask, in_dims)(score, key), expected)

    def loss(score, key):
        return (sample_mask(score, key) * torch.arange(5.0)).sum()

    gradients = torch.vmap(torch.func.grad(loss))(scores, keys)
    p = torch.sigmoid(scores)
    close(gradients, torch.arange(5.0) * p * (1 - p))


def test_vmap_of_networks_with_a_key_each():
    scores = torch.randn(2, 3, 4)
    keys = torch.stack([KEY, KEY + 1, KEY + 2])
    expected = torch.stack([sample_mask(s, keys) for s in scores])
    assert torch.equal(torch.vmap(sample_mask, (0, None))(scores, keys), expected)
    nested = torch.vmap(torch.vmap(sample_mask), (0, None))(scores, keys)
    assert torch.equal(nested, expected)


def test_compiled_equals_eager_for_every_step():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sample_mask, fullgraph=True, backend=counter)
    score, key = torch.randn(20, requires_grad=True), KEY.clone()
    for _ in range(4):
        eager, traced = sample_mask(score, key), compiled(score, key)
        assert torch.equal(traced, eager)
        gradients = [torch.autograd.grad(m.sum(), score)[0] for m in (eager, traced)]
        close(*gradients)
        key[2] += 1
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("score", "key", "message"),
    [
        (torch.zeros(3).long(), KEY, "score must be of a floating dtype, got torch.int64"),
        (torch.zeros(3), KEY.int(), r"key must be int64 \[3\].*got torch\.int32.*ls\.random\.key"),
        (torch.zeros(3), KEY[:2], r"of shape \(2,\)"),
        (torch.zeros(3), KEY.expand(2, 3), r"of shape \(2, 3\)"),
        (torch.tensor(0.0), KEY.expand(1, 3), r"of shape \(1, 3\)"),
        (torch.zeros(3), KEY.to("meta"), "key is on meta, but score is on cpu; move one"),
    ],
)
def test_bad_input(score, key, message):
    with pytest.raises(ValueError, match=message):
        sample_mask(score, key)
