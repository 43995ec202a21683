"""supermask_linear_sgd: the steps of torch.optim.SGD on the gradients of supermask_linear."""

from __future__ import annotations

import pytest
import torch
from supermask_problems import supermask_problem
from tolerances import close

import lottery_sparse as ls
from lottery_sparse import ops

pytestmark = pytest.mark.numeric


def steps(p, fused, backend):
    """[score, velocity, dx, db] after three steps."""
    x, score, bias = (t.detach().clone().requires_grad_() for t in (p.x, p.score, p.bias))
    velocity, key = torch.zeros_like(p.score), p.key.clone()
    optimizer = torch.optim.SGD([score], lr=0.7, momentum=0.9)
    for _ in range(3):
        x.grad = bias.grad = score.grad = None
        with ls.use_backend(backend):
            if fused:
                args = x, score, velocity, p.weight, key, bias
                ops.supermask_linear_sgd(*args, lr=0.7, rescale=p.rescale).backward(p.dy)
                assert score.grad is None
            else:
                y = ops.supermask_linear(x, score, p.weight, key, bias, rescale=p.rescale)
                y.backward(p.dy)
                optimizer.step()
                velocity = optimizer.state[score]["momentum_buffer"]
        key[..., 2] += 1
    return [t.detach() for t in (score, velocity, x.grad, bias.grad)]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("weight", ["tensor", "sign x constant"])
@pytest.mark.parametrize(("networks", "shared"), [(None, False), (2, True), (2, False)])
def test_equals_the_optimizer(weight, rescale, networks, shared):
    p = supermask_problem((9, 37), (5, 37), weight, rescale, networks, shared)
    expected = steps(p, False, "dense")
    for backend in ("dense", "reference"):
        for a, b in zip(steps(p, True, backend), expected, strict=True):
            close(a, b)


def test_one_backward_each():
    p = supermask_problem((9, 37), (5, 37))
    score = p.score.clone().requires_grad_()
    args = p.x, score, torch.zeros_like(p.score), p.weight, p.key
    y = ops.supermask_linear_sgd(*args, lr=0.1)
    y.backward(p.dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(p.dy)


def test_errors():
    p = supermask_problem((9, 37), (5, 37))
    score, velocity = p.score.clone().requires_grad_(), torch.zeros_like(p.score)
    with pytest.raises(ValueError, match="score must be contiguous and require grad"):
        ops.supermask_linear_sgd(p.x, p.score, velocity, p.weight, p.key, lr=0.1)
    with pytest.raises(ValueError, match="velocity must be a"):
        ops.supermask_linear_sgd(p.x, score, velocity[1:], p.weight, p.key, lr=0.1)
    weight = p.weight.clone().requires_grad_()
    with pytest.raises(ValueError, match="weight must be a constant"):
        ops.supermask_linear_sgd(p.x, score, velocity, weight, p.key, lr=0.1)


def test_it_is_not_for_the_compiler():
    score = torch.zeros(3, 4, requires_grad=True)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return ops.supermask_linear_sgd(
            x, score, torch.zeros(3, 4), torch.ones(3, 4), ls.random.key(0), lr=0.1
        )

    with pytest.raises(Exception, match=r"supermask_linear with torch\.optim\.SGD instead"):
        compiled(torch.ones(2, 4))
