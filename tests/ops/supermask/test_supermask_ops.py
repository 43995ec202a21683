"""Learned masks: products and gradients of the straight-through expression, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPES, NETWORKS
from supermask_problems import WEIGHTS, check, supermask_problem
from tolerances import close
from torch.library import opcheck

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops import (
    dispatch,
    sample_bits,
    sample_mask,
    supermask_conv2d,
    supermask_linear,
)
from lottery_sparse.ops.bits import reference as bits_reference
from lottery_sparse.ops.supermask import reference as supermask_reference

pytestmark = pytest.mark.numeric

KEY = ls.random.key(5, ls.random.stream_of("fc1.score"), 3)
LINEAR = (9, 37), (5, 37)
CONV = (4, 3, 3, 2), (2, 6, 7, 5)
# steps as wide as the kernel: torch's float16 convolutions round where windows overlap
GEOMETRY = {"stride": (3, 2), "padding": (1, 0), "groups": 2}
AVAILABLE = dispatch.available("supermask_linear", "cpu")

networks = pytest.mark.parametrize("networks", NETWORKS)
weights = pytest.mark.parametrize("weight", WEIGHTS)
rescaled = pytest.mark.parametrize("rescale", [False, True])


def both(weight, rescale, networks="single", **options):
    """A linear and a convolutional problem."""
    count, shared = NETWORKS[networks]
    args = weight, rescale, count, shared
    return (
        supermask_problem(*LINEAR, *args, **options),
        supermask_problem(*CONV, *args, **options, **GEOMETRY),
    )


# ---- sampling --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", dispatch.available("sample_bits", "cpu"))
def test_bits_are_those_of_sample_mask(backend):
    for shape in [(1, 1), (7, 33), (3, 128), (5, 784), (0, 5), (4, 0), (2, 7, 33), (0, 2, 3)]:
        for dtype in (*DTYPES, torch.float64):
            score = (2 * torch.randn(shape)).to(dtype)
            steps = torch.arange(shape[0] if len(shape) == 3 else 1)
            key = torch.stack([KEY + torch.tensor([0, 0, int(s)]) for s in steps] or [KEY])
            key = key[: len(steps)] if len(shape) == 3 else key[0]
            with ls.use_backend(backend):
                bits, kept = sample_bits(score, key)
            mask = sample_mask(score, key).bool()
            assert torch.equal(bits, bits_reference.pack_mask(mask))
            assert kept.dtype == torch.int64
            assert torch.equal(kept, mask.sum((-2, -1)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_draws_the_same(threads):
    score = torch.randn(129, 301, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        bits, kept = sample_bits(score, KEY)
    finally:
        torch.set_num_threads(before)
    expected = supermask_reference.sample_bits(score, KEY)
    assert torch.equal(bits, expected[0])
    assert torch.equal(kept, expected[1])


@pytest.mark.parametrize("backend", dispatch.available("sample_bits", "cpu"))
def test_extreme_scores(backend):
    score = torch.tensor([[math.inf, -math.inf, math.nan, 100.0, -110.0]]).repeat(200, 1)
    with ls.use_backend(backend):
        bits, kept = sample_bits(score, KEY)
    assert ops.unpack_mask(bits, 5).unique(dim=0).tolist() == [[True, False, False, True, False]]
    assert kept == 400


@pytest.mark.parametrize("logit", [-4.0, 0.0, 0.3])
def test_density_is_the_probability(logit):
    shape, p = (100, 400), 1 / (1 + math.exp(-logit))
    _, kept = sample_bits(torch.full(shape, logit), KEY)
    assert abs(float(kept) / 40_000 - p) < 4 * math.sqrt(p * (1 - p) / 40_000)


def test_the_same_key_draws_the_same_mask_and_the_next_step_another():
    p = supermask_problem(*LINEAR)
    first, again = p.run(), p.run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    p.key[2] += 1  # in place, as a CUDA graph does
    assert not torch.equal(p.run()[0], first[0])
    check(p, p.run())


# ---- values and gradients --------------------------------------------------------------------


@networks
@rescaled
@weights
@pytest.mark.parametrize("backend", AVAILABLE)
def test_matches_float64(backend, weight, rescale, networks):
    for dtype in DTYPES:
        for p in both(weight, rescale, networks, dtype=dtype):
            with ls.use_backend(backend):
                check(p, p.run(), f"on {backend} in {dtype}")


@weights
@pytest.mark.parametrize("score_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_score_has_a_dtype_of_its_own(score_dtype, weight):
    for backend in AVAILABLE:
        for p in both(weight, True, score_dtype=score_dtype):
            with ls.use_backend(backend):
                check(p, p.run(), f"on {backend}")


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("level", [-40.0, -4.0, 40.0])
def test_few_ones_none_and_all(level, backend):
    # with no ones r counts one; then the gradients of scores near -40 are 0 in float32 anyway
    for p in both("tensor", True, "networks", level=level):
        with ls.use_backend(backend):
            check(p, p.run(), f"on {backend}")


@pytest.mark.parametrize("backend", AVAILABLE)
def test_an_empty_mask_gives_the_bias_and_a_gradient(backend):
    p = supermask_problem(*LINEAR)
    none = torch.zeros_like(p.score).bool()
    bits = ops.pack_mask(none)
    with ls.use_backend(backend):
        got = p.run(bits)
    assert torch.equal(got[0], p.bias.expand(got[0].shape))
    assert got[2].isfinite().all()
    assert got[2].abs().min() > 0
    check(p, got, masks=[none.double()])


@settings(max_examples=25)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 140),
    batch=st.integers(0, 20),
    networks=st.sampled_from(list(NETWORKS)),
    weight=st.sampled_from(WEIGHTS),
    rescale=st.booleans(),
)
def test_any_shape(rows, columns, batch, networks, weight, rescale):
    shapes = (rows, columns), (batch, columns)
    p = supermask_problem(*shapes, weight, rescale, *NETWORKS[networks])
    for name in AVAILABLE:
        with ls.use_backend(name):
            check(p, p.run(), f"on {name}")


@networks
@rescaled
def test_a_given_mask_is_used(rescale, networks):
    for p in both("tensor", rescale, networks):
        mask = sample_mask(p.score, p.key).bool()
        expected = p.run()
        for given_mask in (mask, ops.pack_mask(mask.flatten(1 - p.rank))):
            got = p.run(given_mask)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_leading_dimensions_of_x():
    p = supermask_problem(*LINEAR)
    y = supermask_linear(p.x, p.score, p.weight, p.key, p.bias)
    one = supermask_linear(p.x[0], p.score, p.weight, p.key, p.bias)
    many = supermask_linear(p.x.view(1, 5, 1, 37), p.score, p.weight, p.key, p.bias)
    close(one, y[0])
    assert torch.equal(many.view(5, 9), y)
    c = supermask_problem(*CONV, **GEOMETRY)
    args = c.score, c.weight, c.key, c.bias
    image = supermask_conv2d(c.x[0], *args, **c.options)
    close(image, supermask_conv2d(c.x, *args, **c.options)[0])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3)], ids=str)
def test_only_some_inputs_want_gradients(wanted):
    for p in both("tensor", True):
        every = p.run()[1:]
        tensors = (p.x, p.score, p.bias, p.weight)
        inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        op = supermask_conv2d if p.options else supermask_linear
        x, score, bias, weight = inputs
        y = op(x, score, weight, p.key, bias, rescale=True, **p.options)
        got = torch.autograd.grad(y, [inputs[i] for i in wanted], p.dy)
        for a, i in zip(got, wanted, strict=True):
            close(a, every[i])


def test_what_a_dropped_weight_holds_reaches_only_its_own_score():
    p = supermask_problem(*LINEAR)
    mask = sample_mask(p.score, p.key).bool()
    nan = p.weight.masked_fill(~mask, torch.nan)
    score = p.score.clone().requires_grad_()
    x = p.x.clone().requires_grad_()
    for rescale in (False, True):
        y = supermask_linear(x, score, nan, p.key, rescale=rescale)
        dx, dscore = torch.autograd.grad(y, (x, score), p.dy)
        assert y.isfinite().all()
        assert dx.isfinite().all()
        assert torch.equal(dscore.isnan(), ~mask)


def test_saved_for_backward_is_an_eighth_of_a_byte_a_weight():
    saved = []
    p = supermask_problem((256, 512), (4, 512), "sign x constant")
    score = p.score.clone().requires_grad_()
    pack = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with pack:
        supermask_linear(p.x, score, p.weight, p.key, rescale=True)
    own = {t.data_ptr(): t for t in saved} | {}
    for t in (p.x, score, p.weight.signs):
        own.pop(t.data_ptr(), None)
    assert sum(t.nbytes for t in own.values()) <= score.numel() // 8 + 16


# ---- what torch asks -------------------------------------------------------------------------


def call(p):
    """The op's own arguments for a problem."""
    inputs = [t.detach().requires_grad_() for t in (p.x, p.score, p.bias)]
    flat = p.score.flatten(1 - p.rank)
    bits, kept = sample_bits(flat, p.key)
    signs = None
    weight = p.weight
    if isinstance(weight, ops.SignConstant):
        weight, signs = weight.constant, weight.signs
    else:
        weight = weight.detach().requires_grad_()
    geometry = ([3, 2], [1, 0], [1, 1], 2) if p.options else ()
    return inputs[0], inputs[1], weight, bits, kept, inputs[2], signs, *geometry


@pytest.mark.parametrize(
    ("weight", "networks"), [("tensor", "single"), ("sign x constant", "shared x")]
)
def test_opcheck(weight, networks):
    problems = both(weight, True, networks)
    for p in problems if weight == "tensor" else problems[:1]:
        stem = "supermask_conv2d" if p.options else "supermask_linear"
        args = call(p)
        opcheck(getattr(torch.ops.lottery_sparse, stem).default, args)
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        backward = p.dy, *args[:5], args[6], *args[7:], True, weight == "tensor", True
        opcheck(getattr(torch.ops.lottery_sparse, f"{stem}_backward").default, backward)
    opcheck(torch.ops.lottery_sparse.sample_bits.default, (p.score.flatten(1 - p.rank), p.key))


def test_second_derivatives_say_what_to_do():
    p = supermask_problem(*LINEAR)
    score = p.score.clone().requires_grad_()
    y = supermask_linear(p.x, score, p.weight, p.key)
    (dscore,) = torch.autograd.grad(y.square().sum(), score, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"differentiable once.*ops\.sample_mask"):
        dscore.sum().backward()


@rescaled
@weights
def test_vmap_equals_a_loop(weight, rescale):
    for networks in NETWORKS:
        for p in both(weight, rescale, networks, dtype=torch.float64, score_dtype=torch.float64):
            op = supermask_conv2d if p.options else supermask_linear
            scores = torch.stack([p.score, p.score + 1])
            keys = torch.stack([p.key, p.key + torch.tensor([0, 0, 9])])
            inputs = torch.stack([p.x, -2 * p.x])

            def loss(x, score, key, p=p, op=op):
                y = op(x, score, p.weight, key, p.bias, rescale=rescale, **p.options)
                return y.square().sum()

            for dims in [
                (None, 0, 0),
                (0, 0, None),
                (0, None, 0),
                (0, None, None),
                (None, 0, None),
            ]:
                args = [
                    many if d == 0 else one
                    for d, many, one in zip(
                        dims, (inputs, scores, keys), (p.x, p.score, p.key), strict=True
                    )
                ]
                for f in (loss, torch.func.grad(loss, (0, 1))):
                    got = torch.vmap(f, dims)(*args)
                    each = [
                        f(*(a[i] if d == 0 else a for a, d in zip(args, dims, strict=True)))
                        for i in range(2)
                    ]
                    expected = (
                        torch.stack(each)
                        if f is loss
                        else tuple(torch.stack(parts) for parts in zip(*each, strict=True))
                    )
                    close(got, expected)


def test_autocast_casts_all_but_the_score():
    p = supermask_problem(*LINEAR)
    x, score, weight, bias = (t.requires_grad_() for t in (p.x, p.score, p.weight, p.bias))
    with torch.autocast("cpu", torch.bfloat16):
        y = supermask_linear(x, score, weight, p.key, bias, rescale=True)
    assert y.dtype == torch.bfloat16
    low = [t.detach().bfloat16().requires_grad_() for t in (x, weight, bias)]
    expected = supermask_linear(low[0], score, low[1], p.key, low[2], rescale=True)
    assert torch.equal(y, expected)
    dy = p.dy.bfloat16()
    got = torch.autograd.grad(y, (x, score, weight, bias), dy)
    wanted = torch.autograd.grad(expected, (low[0], score, low[1], low[2]), dy)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_compiled_equals_eager_for_every_step():
    for p in both("tensor", True):
        op = supermask_conv2d if p.options else supermask_linear

        def step(x, score, key, p=p, op=op):
            return op(x, score, p.weight, key, p.bias, rescale=True, **p.options).square().sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        inputs = [t.clone().requires_grad_() for t in (p.x, p.score)]
        for _ in range(2):
            expected = torch.autograd.grad(step(*inputs, p.key), inputs)
            got = torch.autograd.grad(compiled(*inputs, p.key), inputs)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            p.key[2] += 1


def test_a_learned_mask_learns():
    torch.manual_seed(0)
    x = torch.randn(256, 20)
    target = F.linear(x, torch.where(torch.arange(20) < 10, 1.0, 0.0).expand(3, 20))
    score, key = torch.zeros(3, 20, requires_grad=True), KEY.clone()
    for _ in range(60):
        y = supermask_linear(x, score, torch.ones(3, 20), key)
        (gradient,) = torch.autograd.grad(F.mse_loss(y, target), score)
        with torch.no_grad():
            score -= 10 * gradient
        key[2] += 1
    assert ((score > 0) == (torch.arange(20) < 10)).all()


# ---- errors ----------------------------------------------------------------------------------

X, S, W = torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X, S, W), {}, "exactly one of key and mask must be given, got neither"),
        ((X, S, W, KEY), {"mask": S.bool()}, "got both"),
        ((X, S.long(), W, KEY), {}, "score must be of a floating dtype, got torch.int64"),
        ((X, S[0], W, KEY), {}, r"score must be \[N, K\] or have one more"),
        ((X, S, W[:2], KEY), {}, r"weight has shape \(2, 5\), but score has \(3, 5\)"),
        ((X, S, W.double(), KEY), {}, r"weight is torch\.float64, but x is torch\.float32"),
        ((X, S, W, KEY.expand(2, 3)), {}, r"key must be int64 \[3\].*of shape \(2, 3\)"),
        ((X, S.expand(2, 3, 5), W.expand(2, 3, 5), KEY), {}, r"key must be int64 \[2, 3\]"),
        ((X[:, :4], S, W, KEY), {}, r"x has shape \(2, 4\).*needs \[\.\.\., 5\]"),
        ((X, S, W, KEY, torch.zeros(5)), {}, r"bias has shape \(5,\).*needs \(3,\)"),
        ((X, S, W), {"mask": torch.zeros(3, 1).int()}, r"packed mask has shape \(3, 1\)"),
        ((X, S, W, KEY.to("meta")), {}, "key is on meta, but score is on cpu; move one"),
        ((X, S.to("meta"), W, KEY.to("meta")), {}, "score is on meta, but x is on cpu; move one"),
        (
            (X, S, ops.SignConstant.of(W, torch.ones(4)), KEY),
            {},
            r"constant must be one number, or one per network.*got shape \(4,\)",
        ),
    ],
)
def test_bad_input(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        supermask_linear(*args, **kwargs)


def test_bad_convolutions():
    x, score = torch.zeros(2, 4, 5, 5), torch.zeros(3, 2, 3, 3)
    for groups, message in [(2, "groups=2 must divide the 3"), (1, "needs .* with C = 2")]:
        with pytest.raises(ValueError, match=message):
            supermask_conv2d(x, score, score, KEY, groups=groups)
    with pytest.raises(ValueError, match=r"score must be \[N, K\], or \[E, N, K\].*flatten"):
        sample_bits(score, KEY)
