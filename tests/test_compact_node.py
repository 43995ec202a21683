"""The C++ autograd node of compact linear layers (csrc/eager.cpp) among what autograd offers."""

from __future__ import annotations

import pytest
import torch
from test_compact_layers import pair
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import lottery_sparse as ls
from lottery_sparse.compact import KeptLists
from lottery_sparse.ops import compact

if not compact.has_node():
    pytest.skip("lottery_sparse._eager is not built for this torch", allow_module_level=True)

NODE = "CompactLinearBackward"
NETWORKS = (None, 3)
# (N, K, B): one; more rows than a block of a dense dW; few features; columns around 16 and 64
SHAPES = [(1, 1, 1), (330, 70, 40), (20, 64, 3), (5, 63, 33), (161, 15, 64), (7, 200, 0)]
TOLERANCE = 1e-6  # of the sum of absolute products


def layer(density=0.3, frozen="zero", products="auto"):
    torch.manual_seed(0)
    _, made = pair(nn.Linear(40, 30), frozen, density)
    made.products = products
    return made, torch.randn(6, 40, requires_grad=True)


@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(networks, shared, density, shape):
    if shared and networks is None:
        return
    n, k, batch = shape
    e = () if networks is None else (networks,)
    mask = torch.rand(*e, n, k) < density
    kept = KeptLists.of(mask)
    spare = 3
    kept = KeptLists.of(mask, kept.columns.shape[-1] + spare)
    weight = torch.randn(*e, n, k) * mask
    values = ls.reference.gather_kept(weight, kept.starts, kept.columns).requires_grad_()
    x = torch.randn(*(() if shared else e), batch, k, requires_grad=True)
    bias = torch.randn(*e, n, requires_grad=True)
    dy = torch.randn(*e, batch, n)
    y = ls.ops.compact_linear(x, values, kept, weight, bias, zero=True)
    assert y.grad_fn.name() == NODE
    dx, dv, db = torch.autograd.grad(y, (x, values, bias), dy)
    w, g, z = weight.double(), dy.double(), x.detach().double()
    dw = ls.reference.gather_kept(g.mT @ z, kept.starts, kept.columns)
    dw_abs = ls.reference.gather_kept(g.abs().mT @ z.abs(), kept.starts, kept.columns)
    by_network = (g @ w), (g.abs() @ w.abs())
    wanted_dx, dx_abs = (t.sum(0) if shared else t for t in by_network)
    for got, wanted, scale in (
        (y, z @ w.mT + bias.detach().double().unsqueeze(-2), z.abs() @ w.abs().mT + 1),
        (dx, wanted_dx, dx_abs),
        (dv, dw, dw_abs),
        (db, g.sum(-2), g.abs().sum(-2)),
    ):
        assert got.shape == wanted.shape
        assert ((got.detach() - wanted).abs() <= TOLERANCE * scale).all()


@pytest.mark.parametrize("changed", ["x", "weight", "lists", "weight_effective"])
@pytest.mark.parametrize("density", [0.3, 0.9])
def test_what_the_backward_reads_must_not_change(changed, density):
    made, x = layer(density)
    y = made(x).sum()
    with torch.no_grad():
        read = {"x": x, "lists": made.kept.starts}
        (read[changed] if changed in read else getattr(made, changed)).add_(0)
    if (changed, density) == ("weight_effective", 0.3):  # which nobody reads
        y.backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_effective_weight_may_be_read_before_the_backward():
    made, x = layer()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made(x).sum().backward()
    optimizer.step()
    y = made(x).sum()
    before = made.weight_effective.clone()  # refreshed now
    y.backward()
    assert torch.equal(before, made.weight_effective)


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_twice_and_again(density):
    made, x = layer(density)
    y = made(x).square().sum()
    first = torch.autograd.grad(y, (x, *made.parameters()), retain_graph=True)
    graph = torch.autograd.grad(y, (x, *made.parameters()), create_graph=True)
    for a, b in zip(first, graph, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-5)
        assert b.requires_grad
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_hooks_hold_what_the_batch_made():
    made, x = layer()
    made(x).sum().backward()
    wanted, x.grad, made.weight.grad = (x.grad, made.weight.grad), None, None
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), id_):
        y = made(x).sum()
    assert {tuple(t.shape) for t in packed} == {(6, 40), tuple(made.weight.shape), (1, 1, 40, 32)}
    y.backward()
    assert torch.equal(x.grad, wanted[0])
    assert torch.equal(made.weight.grad, wanted[1])
    x.grad = made.weight.grad = None
    checkpoint(made, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, wanted[0])
    assert torch.equal(made.weight.grad, wanted[1])


def id_(tensor):
    return tensor


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_only_asked_gradients(density):
    made, x = layer(density)
    for wanted in ([x], [made.weight], [made.bias], [x, made.bias]):
        got = torch.autograd.grad(made(x).sum(), wanted)
        assert [g.shape for g in got] == [w.shape for w in wanted]
    assert not made.requires_grad_(False)(x.detach()).requires_grad
    with torch.no_grad():
        assert not made(x).requires_grad


def test_compiled_autograd():
    made, x = layer()
    made(x).sum().backward()
    wanted, x.grad, made.weight.grad = (x.grad, made.weight.grad), None, None
    from torch._dynamo import compiled_autograd

    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="aot_eager")):
        made(x).sum().backward()
    assert torch.equal(x.grad, wanted[0])
    assert torch.equal(made.weight.grad, wanted[1])


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_whoever_watches_gets_the_op(monkeypatch):
    made, x = layer()
    wanted = made(x)
    assert wanted.grad_fn.name() == NODE

    def by_op(y):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        return y.grad_fn.name() != NODE

    with Mode():
        assert by_op(made(x))
    with ls.backends.use_backend("reference"):
        assert by_op(made(x))
    monkeypatch.setenv("LS_BACKEND", "reference")
    assert by_op(made(x))
    monkeypatch.delenv("LS_BACKEND")
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        made(forward_ad.make_dual(x.detach(), x.detach()))  # no tangent is lost in silence
    assert not by_op(made(x))


def test_any_number_of_dimensions_and_a_wrong_one():
    made, x = layer()
    y = made(x)
    assert torch.equal(made(x[0]), made(x[:1])[0])
    torch.testing.assert_close(made(x.view(2, 3, 40)).view(6, 30), y, rtol=0, atol=0)
    for wrong in (x[:, :39], torch.zeros(())):
        with pytest.raises(ValueError, match=r"input has shape .*, but this layer needs"):
            made(wrong)
