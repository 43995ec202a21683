"""ops.Drawn: the bits of ls.random, in every backend, under transforms and torch's checks."""

from __future__ import annotations

import contextlib

import pytest
import torch
from problems import linear_problem
from tolerances import close
from torch.library import opcheck

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops.random import reference

pytestmark = pytest.mark.numeric

LAWS = ("sign", "normal", "truncated_normal")
STD = 0.0371


def pair(law, shape, seed=2**63 + 5, dtype=torch.float32):
    """The source, and the tensor that it stands for."""
    tensor = ls.random.LAWS[law](shape, STD, seed=seed, stream=7).to(dtype)
    return ops.Drawn.of(law, ls.random.key(seed, 7), STD, dtype), tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_the_bits_of_random(law, dtype):
    for shape in (3, 5), (7, 64), (40, 33), (5, 4, 3, 2), (0, 3):
        drawn, tensor = pair(law, shape, dtype=dtype)
        assert torch.equal(reference.drawn(drawn.values, drawn.key, torch.Size(shape)), tensor)


@pytest.mark.parametrize("backend", ["reference", "dense", None])
@pytest.mark.parametrize("law", LAWS)
def test_layers_hold_what_a_tensor_would(law, backend):
    p = linear_problem(9, 40, 5)
    drawn, tensor = pair(law, (9, 40))
    score, key = torch.randn(9, 40), ls.random.key(1)
    with ls.use_backend(backend) if backend else contextlib.nullcontext():
        y, expected = (ops.masked_linear(p.x, p.weight, p.mask, p.bias, f) for f in (drawn, tensor))
        close(y, expected)
        y, expected = (
            ops.supermask_linear(p.x, score, w, key, rescale=True) for w in (drawn, tensor)
        )
        close(y, expected)


def test_autocast_rounds_the_values():
    drawn, tensor = pair("normal", (9, 40))
    p = linear_problem(9, 40, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.masked_linear(p.x, p.weight, p.mask, p.bias, drawn)
        assert torch.equal(y, ops.masked_linear(p.x, p.weight, p.mask, p.bias, tensor))


def test_vmap_equals_a_loop():
    p = linear_problem(9, 40, 5, networks=3)
    sources = [pair("normal", (9, 40), seed)[0] for seed in range(3)]
    keys, values = torch.stack([s.key for s in sources]), sources[0].values

    def layer(x, weight, mask, key):
        return ops.masked_linear(x, weight, mask, None, ops.Drawn(key, values))

    got = torch.vmap(layer)(p.x, p.weight, p.mask, keys)
    for e in range(3):
        close(got[e], layer(p.x[e], p.weight[e], p.mask[e], keys[e]))


@pytest.mark.parametrize("law", LAWS[:2])
def test_opcheck(law):
    p = linear_problem(9, 40, 5)
    drawn, _ = pair(law, (9, 40))
    x, weight = (t.detach().requires_grad_() for t in (p.x, p.weight.nan_to_num()))
    args = x, weight, p.mask, p.bias, drawn.values, drawn.key
    opcheck(torch.ops.lottery_sparse.masked_linear.default, args)
    backward = p.dy, p.x, weight.detach(), p.mask, drawn.values, drawn.key, True, True
    opcheck(torch.ops.lottery_sparse.masked_linear_backward.default, backward)
    bits, kept = ops.sample_bits(torch.randn(9, 40), ls.random.key(0))
    args = x, torch.randn(9, 40).requires_grad_(), drawn.values, bits, kept, p.bias, drawn.key
    opcheck(torch.ops.lottery_sparse.supermask_linear.default, args)


def test_errors_name_the_way_out():
    p = linear_problem(9, 40, 5, networks=2)
    drawn, _ = pair("normal", (9, 40))

    def call(key, values):
        ops.masked_linear(p.x, p.weight, p.mask, None, ops.Drawn(key, values))

    with pytest.raises(ValueError, match=r"key of a Drawn must be int64 \[2, 3\]"):
        call(drawn.key.expand(3, 3), drawn.values)
    with pytest.raises(ValueError, match=r"values of a Drawn must be \[2\] or \[2, 32768\]"):
        call(drawn.key, drawn.values[:5])
    with pytest.raises(ValueError, match="give other laws as a tensor"):
        ops.Drawn.of("uniform", drawn.key)
