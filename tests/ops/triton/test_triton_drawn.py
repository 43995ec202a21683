"""Sources drawn inside the Triton kernels: to the bit what tensors of `ls.random` give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import DTYPES, NETWORKS, check, conv_problem, linear_problem
from supermask_problems import supermask_problem

import lottery_sparse as ls
from lottery_sparse import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAWS = ("sign", "normal", "truncated_normal")
STD = 0.3


def sources(law, like, rank):
    """The source drawn from a key for each network, and the tensor of `ls.random`."""
    seeds = [2**64 - 3 - e for e in range(len(like) if like.dim() > rank else 1)]
    shape = like.shape[-rank:]
    tensors = [ls.random.LAWS[law](shape, STD, seed=s, stream=5, step=2**32 - 1) for s in seeds]
    keys = [ls.random.key(seed, 5, 2**32 - 1) for seed in seeds]
    if like.dim() == rank:
        return ops.Drawn.of(law, keys[0], STD, like.dtype), tensors[0].to(like.dtype)
    values = ops.Drawn.of(law, keys[0], STD, like.dtype).values
    drawn = ops.Drawn(torch.stack(keys), values.expand(len(like), *values.shape))
    return drawn, torch.stack(tensors).to(like.dtype)


def moved(source):
    return type(source)(*(t.to(DEVICE) for t in source))


def same(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def verify_frozen(p, law):
    """Weights that a mask prunes hold what is drawn: to the bit what a tensor would hold."""
    drawn, tensor = sources(law, p.weight, p.rank)
    held = replace(p, frozen=tensor).to(DEVICE)
    with ls.use_backend("triton"):
        expected = held.run()
        assert same(replace(held, frozen=moved(drawn)).run(), expected)
        assert same(replace(held, frozen=moved(drawn)).run(held.packed), expected)
    check(held, expected, law)


def verify_weight(p, law):
    """The weight under a learned mask is what is drawn."""
    drawn, tensor = sources(law, p.score, p.rank)
    drawn = ops.Drawn(drawn.key, drawn.values.to(p.x.dtype))
    held = ops.SignConstant.of(tensor, STD, p.rank) if law == "sign" else tensor.to(p.x.dtype)
    if law == "sign" and p.score.dim() > p.rank:
        held = ops.SignConstant(held.signs, held.constant.expand(len(p.score)).contiguous())
    if law == "sign":
        held = ops.SignConstant(held.signs, held.constant.to(p.x.dtype))
    p = replace(p, weight=held).to(DEVICE)
    wanted = [p.x, p.score, p.bias]
    with ls.use_backend("triton"):
        expected = p.run()[:4]
        inputs = [t.detach().requires_grad_() for t in wanted]
        op = ops.supermask_conv2d if p.options else ops.supermask_linear
        options = {"rescale": p.rescale, **p.options}
        y = op(inputs[0], inputs[1], moved(drawn), p.key, inputs[2], **options)
        assert same([y.detach(), *torch.autograd.grad(y, inputs, p.dy)], expected)


# (N, K, B): rows of whole words of signs, of whole blocks of eight, of neither; more than a tile
SHAPES = [(5, 64, 3), (66, 40, 3), (9, 33, 2), (1, 1, 1), (3, 0, 2), (5, 132, 18)]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frozen_values(shape, law):
    verify_frozen(linear_problem(*shape), law)


@pytest.mark.parametrize("law", LAWS[:2])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("networks", NETWORKS)
def test_frozen_values_of_networks(networks, dtype, law):
    verify_frozen(linear_problem(10, 36, 3, 0.5, "zero", *NETWORKS[networks], dtype), law)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_weights_under_learned_masks(shape, law):
    verify_weight(supermask_problem(shape[:2], (shape[2], shape[1])), law)


@pytest.mark.parametrize("law", LAWS[:2])
@pytest.mark.parametrize("networks", NETWORKS)
def test_weights_of_networks(networks, law):
    for dtype in DTYPES[:2]:
        args = "tensor", True, *NETWORKS[networks], dtype
        verify_weight(supermask_problem((10, 36), (3, 36), *args), law)


@pytest.mark.parametrize(("networks", "law"), [("single", "sign"), ("shared x", "normal")])
def test_convolutions(networks, law):
    geometry = {"stride": (2, 1), "padding": 1, "groups": 2}
    lead = NETWORKS[networks]
    verify_frozen(conv_problem((2, 4), (2, 1), (3, 2), 1, 0.5, "zero", *lead, **geometry), law)
    args = "tensor", True, *lead
    verify_weight(supermask_problem((4, 1, 2, 1), (1, 2, 3, 2), *args, **geometry), law)


def test_one_key_for_all_networks():
    p = linear_problem(5, 40, 3, networks=2).to(DEVICE)
    drawn = moved(ops.Drawn.of("normal", ls.random.key(3), STD))
    each = ops.Drawn(drawn.key.expand(2, 3), drawn.values.expand(2, -1))
    with ls.use_backend("triton"):
        assert same(replace(p, frozen=drawn).run(), replace(p, frozen=each).run())
