"""The C++ autograd nodes of masked layers (linear/eager_masked.h) among what autograd offers."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from frames import beyond
from tolerances import close, of_sum
from torch import nn
from torch.utils.checkpoint import checkpoint

import lottery_sparse as ls
from lottery_sparse.nn import rest
from lottery_sparse.ops.common.eager import has_node
from lottery_sparse.ops.compact import op as products

pytestmark = pytest.mark.numeric

if not has_node():
    pytest.skip("lottery_sparse._eager is not built for this torch", allow_module_level=True)

SPARSE, DENSE = "MaskedLinearBackward", "AddmmBackward0"
LAYERS = {
    "linear": (lambda: nn.Linear(110, 70), (9, 110)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), (3, 6, 7, 5)),
}
FROZEN = {"zero": "zero", "values": ls.frozen.Seeded("uniform", 3, std=0.5)}


def layer(kind="linear", density=0.1, frozen="zero"):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = ls.sparsify_(nn.Sequential(make()))
    mask = torch.rand(model[0].weight.shape) < density
    ls.set_masks_(model, {"0.weight": mask}, frozen)
    return model[0], torch.randn(shape, requires_grad=True)


def gradients(made, x, dy):
    return torch.autograd.grad(made(x), (x, *made.parameters()), dy)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("shape", [(1, 110), (40, 110), (110,), (2, 3, 110), (0, 110)], ids=str)
def test_linear_matches_float64(density, frozen, shape):
    made, _ = layer("linear", density, FROZEN[frozen])
    x = torch.randn(shape, requires_grad=True)
    dy = torch.randn(*shape[:-1], 70)
    y = made(x)
    dx, dw, db = torch.autograd.grad(y, (x, made.weight, made.bias), dy)
    w, z, g = made.weight.detach().double(), x.detach().double(), dy.double()
    rows, outs = z.reshape(-1, 110), g.reshape(-1, 70)
    kept = made.weight_mask.double()
    for got, wanted, scale, terms in (
        (y, F.linear(z, w, made.bias.double()), F.linear(z.abs(), w.abs()) + 1, 111),
        (dx, g @ w, g.abs() @ w.abs(), 70),
        (dw, outs.T @ rows * kept, outs.abs().T @ rows.abs(), len(rows)),
        (db, outs.sum(0), outs.abs().sum(0), len(rows)),
    ):
        assert got.shape == wanted.shape
        assert ((got.detach() - wanted).abs() <= of_sum(wanted, scale, terms, got.dtype)).all()
    assert not dw[~made.weight_mask].any()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("frozen", FROZEN)
def test_conv_has_the_gradients_of_torch_where_kept(frozen, memory_format):
    made, x = layer("conv", 0.4, FROZEN[frozen])
    made = made.to(memory_format=memory_format)
    x = x.detach().to(memory_format=memory_format).requires_grad_()
    dy = torch.randn(3, 8, 7, 5)
    weight = made.weight.detach().clone().requires_grad_()
    y = F.conv2d(x, weight, made.bias, padding=1)
    wanted = torch.autograd.grad(y, (x, weight, made.bias), dy)
    dx, dw, db = gradients(made, x, dy)
    assert torch.equal(made(x), y)
    assert torch.equal(dx, wanted[0])
    assert torch.equal(db, wanted[2])
    assert torch.equal(dw, torch.where(made.weight_mask, wanted[1], 0.0))


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_bfloat16_autocast(density):
    made, x = layer("linear", density)
    x = torch.randn(64, 110, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, made.weight), dy)
    assert (dx.dtype, dw.dtype) == (torch.float32, torch.float32)
    w, z, g = (t.detach().bfloat16().double() for t in (made.weight, x, dy))
    assert ((dx - g @ w).abs() <= of_sum(g @ w, g.abs() @ w.abs(), 70, torch.bfloat16)).all()
    wanted = g.T @ z * made.weight_mask
    assert ((dw - wanted).abs() <= of_sum(wanted, g.abs().T @ z.abs(), 64, torch.bfloat16)).all()
    assert not dw[~made.weight_mask].any()


def test_which_node():
    assert layer(density=0.1)[0](torch.randn(40, 110)).grad_fn.name() == SPARSE
    assert layer(density=0.5)[0](torch.randn(40, 110)).grad_fn.name() == DENSE


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("changed", ["weight", "weight_mask", "x"])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_what_the_backward_reads_must_not_change(kind, changed, density):
    made, x = layer(kind, density)
    y = made(x).sum()
    with torch.no_grad():
        if changed == "weight_mask":
            made.weight_mask.logical_not_()
        else:
            (x if changed == "x" else made.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_twice_and_again(kind, density):
    made, x = layer(kind, density)
    y = made(x).square().sum()
    first = torch.autograd.grad(y, (x, *made.parameters()), retain_graph=True)
    graph = torch.autograd.grad(y, (x, *made.parameters()), create_graph=True)
    for a, b in zip(first, graph, strict=True):
        close(a, b.detach())
        assert b.requires_grad
    (second,) = torch.autograd.grad(graph[1].sum(), made.weight, retain_graph=True)
    assert not second[~made.weight_mask].any()
    y.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        y.backward()


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_gradients_of_gradients(density):
    made, x = layer("linear", density)
    made, x = made.double(), torch.randn(3, 110, dtype=torch.float64, requires_grad=True)
    weight = made.weight.detach().clone().requires_grad_()

    def second(y, w):
        (first,) = torch.autograd.grad(y.pow(3).sum(), w, create_graph=True)
        return torch.autograd.grad((first * made.weight_mask).square().sum(), (x, w))

    wanted = second(F.linear(x, weight, made.bias), weight)
    got = second(made(x), made.weight)
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1] * made.weight_mask)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_hooks_and_checkpoints(kind, density):
    made, x = layer(kind, density)
    dy = torch.randn_like(made(x))
    wanted = gradients(made, x, dy)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        y = made(x)
    for got in (
        torch.autograd.grad(y, (x, *made.parameters()), dy),
        torch.autograd.grad(checkpoint(made, x, use_reentrant=False), (x, *made.parameters()), dy),
    ):
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)
    seen = []
    made.weight.register_hook(lambda g: seen.append(g))
    made(x).backward(dy)
    assert torch.equal(seen[0], wanted[1])
    assert torch.equal(made.weight.grad, wanted[1])


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_only_asked_gradients(density):
    made, x = layer("linear", density)
    for wanted in ([x], [made.weight], [made.bias], [x, made.bias]):
        got = torch.autograd.grad(made(x).sum(), wanted)
        assert [g.shape for g in got] == [w.shape for w in wanted]
    assert not made.requires_grad_(False)(x.detach()).requires_grad
    with torch.no_grad():
        assert not made(x).requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's, of what it saves
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_compiled_autograd(density):
    from torch._dynamo import compiled_autograd

    made, x = layer("linear", density)
    made(x).sum().backward()
    wanted, x.grad, made.weight.grad = (x.grad, made.weight.grad), None, None
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="aot_eager")):
        made(x).sum().backward()
    close(x.grad, wanted[0])
    close(made.weight.grad, wanted[1])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_a_write_that_counts_no_version_is_seen(kind, density):
    made, x = layer(kind, density)
    made.weight.data.add_(1)
    wanted = torch.where(made.weight_mask, made.weight.detach(), 0.0)
    y = made(x)
    assert torch.equal(made.weight, wanted) or density == 0.1
    if kind == "linear":
        close(y, F.linear(x, wanted, made.bias))
    else:
        close(y, F.conv2d(x, wanted, made.bias, padding=1))


def test_a_copy_chooses_as_its_layer_from_the_first_call_on():
    made, x = layer("linear", 0.5)
    copied = copy.deepcopy(made)  # its weight was never seen at rest
    assert copied(x).grad_fn.name() == DENSE
    assert torch.equal(copied(x), made(x))


@pytest.mark.parametrize(
    ("kind", "form"), [("linear", "masked"), ("linear", "compact"), ("conv", "masked")]
)
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_python_frames_beyond_torch(kind, form, density):
    """Forward and backward, float32 and eager: at most 15 more than the layer of torch."""
    made, x = layer(kind, density)
    if form == "compact":
        made = ls.compact_(nn.Sequential(made))[0]
    assert beyond(made, LAYERS[kind][0](), x) <= 15


@pytest.mark.parametrize(
    ("kind", "form"), [("linear", "masked"), ("linear", "compact"), ("conv", "masked")]
)
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_python_frames_without_the_node(kind, form, density, monkeypatch):
    monkeypatch.setattr(rest, "eager", cache(lambda: None))
    monkeypatch.setattr(products, "eager", cache(lambda: None))
    made, x = layer(kind, density)
    if form == "compact":
        made = ls.compact_(nn.Sequential(made))[0]
    assert beyond(made, LAYERS[kind][0](), x) <= 40
    assert made(x).grad_fn.name() not in (
        SPARSE, "KeptGradientBackward", "CompactLinearBackward",
    )  # fmt: skip


def test_a_gradient_that_somebody_else_holds_is_not_written_to():
    made, x = layer(density=0.5)
    y = made(x)
    node = y.grad_fn.next_functions[2][0].next_functions[0][0]
    assert node.name() == "KeptGradientBackward"
    held = []
    node.register_prehook(lambda grads: held.append(grads[0]))
    dy = torch.randn_like(y)
    y.backward(dy)
    dw = dy.mT @ x.detach()
    torch.testing.assert_close(held[0], dw)
    torch.testing.assert_close(made.weight.grad, torch.where(made.weight_mask, dw, 0.0))
