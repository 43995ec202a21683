"""compact_linear and compact_conv2d under opcheck, torch.func, autocast and torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compact_problems import Arguments
from problems import FROZEN, GROUPED, NETWORKS, SMALL, conv_case, linear_problem
from tolerances import close
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import lottery_sparse as ls
from lottery_sparse.ops import compact_linear, dispatch
from lottery_sparse.ops.compact.kept import KeptLists

pytestmark = pytest.mark.numeric

LINEAR_BACKENDS = dispatch.available("compact_linear", "cpu")

OPCHECK = [
    ("networks", "zero", torch.float32, False),
    ("shared x", "sign x constant", torch.float64, False),
    ("single", "tensor", torch.float32, True),
]


@pytest.mark.parametrize(("networks", "frozen", "dtype", "convolution"), OPCHECK, ids=str)
def test_opcheck(networks, frozen, dtype, convolution):
    if convolution:
        p = conv_case(SMALL, GROUPED, 0.5, frozen, networks, dtype)
        rest = ([2, 2], [1, 1], [1, 1], 2)
    else:
        p, rest = linear_problem(2, 3, 2, 0.5, frozen, *NETWORKS[networks], dtype), ()
    a = Arguments.of(p)
    stem = "compact_conv2d" if convolution else "compact_linear"
    op = getattr(torch.ops.lottery_sparse, stem).default
    op_backward = getattr(torch.ops.lottery_sparse, f"{stem}_backward").default
    x, values, bias = (t.requires_grad_() for t in (p.x, a.values.nan_to_num(0.0), p.bias))
    effective = a.effective  # its layout decides on that of the results
    if convolution:
        effective = effective.contiguous(memory_format=torch.channels_last)
    opcheck(op, (x, values, bias, effective, *a.kept, a.zero, *rest))
    common = (x, values, effective, *a.kept, a.zero, *rest)
    opcheck(op_backward, (p.dy.requires_grad_(), *common, True, True))
    opcheck(op_backward, (p.dy, *common, False, True))


@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_vmap_equals_a_loop(backend, networks):
    a = Arguments.of(linear_problem(4, 5, 3, 0.5, "zero", *NETWORKS[networks]), spare=0)
    p = a.problem
    several = torch.stack([a.values, 2 * a.values])
    effective = torch.stack([a.effective, 2 * a.effective])
    xs, bias = torch.stack([p.x, -p.x, p.x.sin()]), p.bias

    def loss(x, values, bias, effective):
        return replace(a, effective=effective).call(x, values, bias).square().sum()

    each = torch.func.grad(loss, (0, 1, 2))
    with ls.use_backend(backend):
        got = torch.vmap(torch.vmap(each, (0, None, None, None)), (None, 0, None, 0))(
            xs, several, bias, effective
        )
        for i in range(2):
            for j in range(3):
                expected = each(xs[j], several[i], bias, effective[i])
                for value, one in zip(got, expected, strict=True):
                    close(value[i, j], one)
                inputs = [t.clone().requires_grad_() for t in (xs[j], several[i], bias)]
                plain = torch.autograd.grad(loss(*inputs, effective[i]), inputs)
                for one, other in zip(expected, plain, strict=True):
                    close(one, other)


@pytest.mark.parametrize("frozen", FROZEN)
def test_autocast_casts_like_linear(frozen):
    a = Arguments.of(linear_problem(5, 7, 3, 0.5, frozen))
    p = a.problem
    inputs = [t.requires_grad_() for t in (p.x, a.values.nan_to_num(0.0), p.bias)]
    with torch.autocast("cpu", torch.bfloat16):
        y = a.call(*inputs)
    low = [t.detach().bfloat16().requires_grad_() for t in inputs]
    expected = replace(a, effective=a.effective.bfloat16()).call(*low)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    got = torch.autograd.grad(y, inputs, p.dy.bfloat16())
    for g, e in zip(got, torch.autograd.grad(expected, low, p.dy.bfloat16()), strict=True):
        assert g.dtype == torch.float32
        assert torch.equal(g.bfloat16(), e)
    with torch.autocast("cpu", torch.bfloat16):
        gradient = torch.func.grad(lambda v: a.call(p.x, v, p.bias).float().sum())(a.values)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("networks", ["single", "networks"])
def test_compiled_equals_eager(networks):
    a = Arguments.of(linear_problem(5, 33, 3, 0.3, "zero", *NETWORKS[networks]), spare=0)
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, values, bias, effective, kept):
        b = replace(a, effective=effective, kept=KeptLists(*kept))
        return compact_linear(x, values, b.kept, effective, bias, True).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    inputs = [t.requires_grad_() for t in (a.problem.x, a.values, a.problem.bias)]
    rest = a.effective, tuple(a.kept)
    expected = torch.autograd.grad(step(*inputs, *rest), inputs)
    for _ in range(2):
        got = torch.autograd.grad(compiled(*inputs, *rest), inputs)
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert counter.frame_count == 1
