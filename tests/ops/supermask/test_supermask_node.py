"""The C++ autograd node of supermask layers (linear/eager_supermask.h) beside the op's own way."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from frames import beyond
from tolerances import of_sum
from torch import nn
from torch.utils.checkpoint import checkpoint

import lottery_sparse as ls
from lottery_sparse.nn import supermask
from lottery_sparse.ops.common.eager import has_node

pytestmark = pytest.mark.numeric

if not has_node():
    pytest.skip("lottery_sparse._eager is not built for this torch", allow_module_level=True)

NODE = "SupermaskLinearBackward"
SHAPES = [(9, 110), (1, 110), (110,), (2, 3, 110), (0, 110)]
rescaled = pytest.mark.parametrize("rescale", [False, True])


def layer(mode="train", bias=True, **options):
    torch.manual_seed(0)
    made = ls.nn.SupermaskLinear(110, 70, bias=bias, seed=3, stream=5, **options)
    with torch.no_grad():
        made.score += torch.randn(made.score.shape)
        if bias:
            made.bias += torch.randn(made.bias.shape)
    if mode != "train":
        made.eval()
    if mode == "threshold":
        made.evaluation = mode
    if mode == "held":
        made.evaluate_with(torch.rand(made.score.shape) < 0.3)
    return made


@pytest.fixture
def by_op(monkeypatch):
    """Whatever runs within computes by the registered op, or its Python way."""

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(supermask, "eager", cache(lambda: None))
            return call()

    return run


def step(made, x, dy=None):
    """y and its gradients, of x and of the layer's parameters that have any."""
    y = made(x)
    wanted = [x, *(p for p in made.parameters() if p.requires_grad)]
    wanted = [t for t in wanted if t.requires_grad]
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) if dy is None else dy
    return y, *torch.autograd.grad(y, wanted, dy)


def equal(one, two):
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["train", "sample", "threshold", "held"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@rescaled
def test_the_bits_are_those_of_the_op(mode, shape, rescale, by_op):
    x = torch.randn(shape, requires_grad=True)
    one, two = (layer(mode, rescale=rescale) for _ in range(2))
    for _ in range(2):  # draws
        found = step(one, x)
        assert found[0].grad_fn.name() in (NODE, "ViewBackward0")
        equal(found, by_op(lambda: step(two, x)))
    assert torch.equal(one.key, two.key)
    assert torch.equal(one.sample_key, two.sample_key)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", ["score", "weight", "all"])
@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.float32, torch.float64)], ids=str)
@rescaled
def test_so_they_are_of_other_layers(bias, trained, dtypes, rescale, by_op):
    x = torch.randn(4, 110).to(dtypes[0]).requires_grad_(trained == "all")
    both = []
    for _ in range(2):
        made = layer(bias=bias, rescale=rescale).to(dtypes[0])
        made.score.data = made.score.data.to(dtypes[1])
        made.weight.requires_grad_(trained != "score")
        made.score.requires_grad_(trained != "weight")
        both.append(made)
    equal(step(both[0], x), by_op(lambda: step(both[1], x)))


@rescaled
def test_bfloat16_autocast(rescale, by_op):
    x = torch.randn(12, 110, requires_grad=True)
    one, two = (layer(rescale=rescale) for _ in range(2))

    def casting(made):
        with torch.autocast("cpu", torch.bfloat16):
            y = made(x)
        return y, *torch.autograd.grad(y, (x, made.score), torch.ones_like(y))

    found = casting(one)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32]
    equal(found, by_op(lambda: casting(two)))


@rescaled
def test_it_matches_float64(rescale):
    made, x, dy = layer(rescale=rescale), torch.randn(40, 110, requires_grad=True), None
    mask = ls.ops.sample_mask(made.score.detach(), made.key).double()
    dy = torch.randn(40, 70)
    y, dx, ds = step(made, x, dy)
    assert y.grad_fn.name() == NODE
    w, z, g = made.weight.double(), x.detach().double(), dy.double()
    p = made.score.detach().double().sigmoid()
    r = mask.numel() / mask.sum() if rescale else 1.0
    m = (mask + p - p.detach()).requires_grad_()
    factor = m.numel() / m.sum() if rescale else 1.0
    out = F.linear(z, w * m * factor, made.bias.double())
    (dm,) = torch.autograd.grad(out, m, g)
    size = F.linear(z.abs(), w.abs() * mask * r) + made.bias.double().abs()
    assert ((y - out).abs() <= of_sum(out, size, 112, y.dtype)).all()
    wanted, size = g @ (w * mask * r), g.abs() @ (w.abs() * mask * r)
    assert ((dx - wanted).abs() <= of_sum(wanted, size, 71, dx.dtype)).all()
    wanted, size = dm * p * (1 - p), (g.abs().T @ z.abs()) * w.abs() * r * p * (1 - p)
    if rescale:  # what flows through r is a sum over all weights
        size = size + ((g.abs().T @ z.abs()) * w.abs() * mask).sum() * r / mask.sum() * p * (1 - p)
    assert ((ds - wanted).abs() <= of_sum(wanted, size, 48, ds.dtype)).all()


def test_which_calls_it_takes():
    made, x = layer(), torch.randn(4, 110)
    assert made(x).grad_fn.name() == NODE
    with ls.use_backend("dense"):
        assert made(x).grad_fn.name() != NODE
    wide = ls.ensemble.replicate([layer(), layer()])
    assert wide(x).grad_fn.name() != NODE
    assert torch.func.vmap(lambda row: made(row))(x).shape == (4, 70)
    assert made.requires_grad_(False)(x).grad_fn is None
    with torch.no_grad():
        assert layer()(x).grad_fn is None


def test_what_does_not_fit_is_for_the_op_to_name():
    with pytest.raises(ValueError, match=r"x has shape \(4, 9\), but score \(70, 110\) needs"):
        layer()(torch.randn(4, 9))
    with pytest.raises(ValueError, match=r"weight is torch\.float32, but x is torch\.float64"):
        layer()(torch.randn(4, 110, dtype=torch.float64))


@pytest.mark.parametrize("changed", ["score", "weight", "x"])
def test_what_the_backward_reads_must_not_change(changed):
    made, x = layer(), torch.randn(4, 110, requires_grad=True)
    y = made(x).sum()
    with torch.no_grad():
        (x if changed == "x" else getattr(made, changed)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_mask_that_is_held_may_change():
    made, x = layer("held"), torch.randn(4, 110, requires_grad=True)
    wanted = step(made, x)
    y = made(x)
    made.held_mask.logical_not_()
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    equal(torch.autograd.grad(y, (x, made.score), dy), wanted[1:])


@rescaled
def test_a_second_derivative_is_refused_and_a_second_backward(rescale):
    made, x = layer(rescale=rescale), torch.randn(4, 110, requires_grad=True)
    y = made(x).square().sum()
    first = torch.autograd.grad(y, (x, made.score), retain_graph=True)
    graph = torch.autograd.grad(y, (x, made.score), create_graph=True)
    equal(first, (t.detach() for t in graph))
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(graph[1].sum(), x)
    made(x).sum().backward()
    y.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        y.backward()


@rescaled
def test_hooks(rescale):
    x = torch.randn(4, 110, requires_grad=True)
    wanted = step(layer(rescale=rescale), x)
    saved = []

    def pack(tensor):
        saved.append(tensor.dtype)
        return tensor.clone()

    made, dy = layer(rescale=rescale), torch.linspace(-1, 1, 280).view(4, 70)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = made(x)
    # all of it, so that a checkpoint forgets it: x, score, weight, bits, and what rescales
    assert saved == [torch.float32] * 3 + [torch.int32] + [torch.int64] * rescale
    equal(torch.autograd.grad(y, (x, made.score), dy), wanted[1:])
    seen, made = [], layer(rescale=rescale)
    made.score.register_hook(seen.append)
    made(x).backward(dy)
    equal((seen[0], made.score.grad), wanted[2:] * 2)


@pytest.mark.parametrize("reentrant", [False, True])
@rescaled
def test_checkpoints_draw_once(reentrant, rescale):
    x = torch.randn(4, 110, requires_grad=True)
    one, two = (layer(rescale=rescale) for _ in range(2))
    for _ in range(2):
        y, *wanted = step(one, x)
        again = checkpoint(two, x, use_reentrant=reentrant)
        assert torch.equal(y, again)
        two.score.grad = x.grad = None
        again.backward(torch.linspace(-1, 1, 280).view(4, 70))
        equal((x.grad, two.score.grad), wanted)
        assert torch.equal(one.key, two.key)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's, of what it saves
@rescaled
def test_compiled_autograd(rescale):
    from torch._dynamo import compiled_autograd

    x = torch.randn(4, 110, requires_grad=True)
    one, two = (layer(rescale=rescale) for _ in range(2))
    for _ in range(2):
        one.score.grad = two.score.grad = None
        one(x).sum().backward()
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="aot_eager")):
            two(x).sum().backward()
        assert torch.equal(one.score.grad, two.score.grad)


@pytest.mark.parametrize("mode", ["train", "sample", "threshold", "held"])
@rescaled
def test_python_frames_beyond_torch(mode, rescale):
    """Forward and backward, float32 and eager: at most 15 more than the layer of torch."""
    x = torch.randn(9, 110, requires_grad=True)
    assert beyond(layer(mode, rescale=rescale), nn.Linear(110, 70), x) <= 15


@pytest.mark.parametrize("mode", ["train", "sample", "threshold", "held"])
@rescaled
def test_python_frames_without_the_node(mode, rescale, by_op):
    x = torch.randn(9, 110, requires_grad=True)
    made = layer(mode, rescale=rescale)
    assert by_op(lambda: beyond(made, nn.Linear(110, 70), x)) <= 40
