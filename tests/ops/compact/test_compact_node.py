"""The C++ autograd node of compact linear layers (linear/eager.cpp) among what autograd offers."""

from __future__ import annotations

import re

import pytest
import torch
from test_compact_layers import pair
from tolerances import close, of_sum
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import lottery_sparse as ls
from lottery_sparse.ops.common.eager import has_node
from lottery_sparse.ops.compact.kept import KeptLists

pytestmark = pytest.mark.numeric

if not has_node():
    pytest.skip("lottery_sparse._eager is not built for this torch", allow_module_level=True)

NODE = "CompactLinearBackward"
NETWORKS = (None, 3)
# (N, K, B): one; more rows than a block of a dense dW; few features; columns around 16 and 64
SHAPES = [(1, 1, 1), (330, 70, 40), (20, 64, 3), (5, 63, 33), (161, 15, 64), (7, 200, 0)]


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
    values = ls.ops.compact.reference.gather_kept(
        weight, kept.starts, kept.columns
    ).requires_grad_()
    x = torch.randn(*(() if shared else e), batch, k, requires_grad=True)
    bias = torch.randn(*e, n, requires_grad=True)
    dy = torch.randn(*e, batch, n)
    y = ls.ops.compact_linear(x, values, kept, weight, bias, zero=True)
    assert y.grad_fn.name() == NODE
    dx, dv, db = torch.autograd.grad(y, (x, values, bias), dy)
    w, g, z = weight.double(), dy.double(), x.detach().double()
    dw = ls.ops.compact.reference.gather_kept(g.mT @ z, kept.starts, kept.columns)
    dw_abs = ls.ops.compact.reference.gather_kept(g.abs().mT @ z.abs(), kept.starts, kept.columns)
    by_network = (g @ w), (g.abs() @ w.abs())
    wanted_dx, dx_abs = (t.sum(0) if shared else t for t in by_network)
    b = bias.detach().double().unsqueeze(-2)
    for got, wanted, scale, terms in (
        (y, z @ w.mT + b, z.abs() @ w.abs().mT + b.abs(), k + 1),
        (dx, wanted_dx, dx_abs, n * (networks if shared else 1)),
        (dv, dw, dw_abs, batch),
        (db, g.sum(-2), g.abs().sum(-2), batch),
    ):
        assert got.shape == wanted.shape
        assert ((got.detach() - wanted).abs() <= of_sum(wanted, scale, terms, got.dtype)).all()


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
        close(a, b.detach())
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
        close(y, wanted)
        return y.grad_fn.name() != NODE

    with Mode():
        assert by_op(made(x))
    with ls.ops.dispatch.use_backend("reference"):
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


# ---- tensors that somebody gave other data -------------------------------------------------------


def replace(made, name, change):
    """Through .data, which counts no version and asks no layer."""
    if name.startswith("kept_"):
        tensor = getattr(made.kept, name.removeprefix("kept_"))
    else:
        tensor = made._derived.dense if name == "weight_effective" else getattr(made, name)
    tensor.data = change(tensor.data)


def strided(t):
    return torch.stack([t, t], -1)[..., 0]


UNFIT = [
    ("bias", lambda t: t[:1].clone(), "bias has shape (1)"),
    ("bias", lambda t: torch.cat([t, t]), "bias has shape (60)"),
    ("bias", torch.Tensor.double, "dtype"),
    ("weight", lambda t: t[:-5].clone(), "values"),
    ("weight", lambda t: t.view(1, -1), "values (1, "),
    ("weight", torch.Tensor.double, "weight is torch.float64, but x is torch.float32"),
    ("kept_columns", lambda t: t[:-5].clone(), "columns"),
    ("kept_columns", torch.Tensor.float, "columns must be Short"),
    ("kept_columns", torch.Tensor.int, "rows must be Int"),
    ("kept_starts", lambda t: t[:-1].clone(), "29 rows"),
    ("kept_starts", torch.Tensor.int, "starts must be Long"),
    ("kept_starts", lambda t: t + 10_000, "starts"),
    ("kept_column_starts", lambda t: t[:-1].clone(), "column_starts"),
    ("kept_column_starts", lambda t: t - 10_000, "column_starts"),
    ("kept_rows", lambda t: t[:-5].clone(), "rows"),
    ("kept_positions", lambda t: t[:-5].clone(), "positions"),
    ("kept_positions", torch.Tensor.long, "positions must be Int"),
]
UNFIT_IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(UNFIT)]


@pytest.mark.parametrize(("name", "change", "message"), UNFIT, ids=UNFIT_IDS)
def test_what_does_not_fit_is_not_read(name, change, message):
    made, x = layer()
    replace(made, name, change)
    with pytest.raises((RuntimeError, ValueError), match=re.escape(message)):
        made(x).sum().backward()


@pytest.mark.parametrize(("name", "change", "message"), UNFIT, ids=UNFIT_IDS)
def test_what_does_not_fit_the_backward_any_more(name, change, message):
    made, x = layer()
    y = made(x).sum()
    assert y.grad_fn.next_functions[0][0].name() == NODE
    replace(made, name, change)
    if name == "bias":
        y.backward()  # which it does not read
    else:
        with pytest.raises((RuntimeError, ValueError)):
            y.backward()


@pytest.mark.parametrize("density", [0.3, 0.9])
@pytest.mark.parametrize("shape", [(20, 40), (30, 39), (0,)], ids=str)
def test_an_effective_weight_that_does_not_fit(shape, density):
    made, x = layer(density)
    y = made(x).sum()
    replace(made, "weight_effective", lambda t: torch.zeros(shape))
    with pytest.raises(RuntimeError, match="have changed their shapes since its forward"):
        y.backward()
    if density == 0.9:  # else nobody reads it
        with pytest.raises(RuntimeError, match=r"size|dimension|shape|matrices"):
            made(x)


def test_an_x_that_does_not_fit_any_more():
    made, x = layer()
    y = made(x).sum()
    x.data = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"x \[2, 3\].*have changed their shapes"):
        y.backward()


@pytest.mark.parametrize("name", ["weight", "bias", *(f"kept_{n}" for n in KeptLists._fields)])
def test_strided_tensors(name):
    made, x = layer()
    wanted = torch.autograd.grad(made(x).square().sum(), [x, *made.parameters()])
    replace(made, name, strided)
    got = torch.autograd.grad(made(x).square().sum(), [x, *made.parameters()])
    close(got, wanted)


def test_a_hook_that_unpacks_other_tensors():
    """Their dtype, or their class: the registered op computes with them, or says why not."""
    made, x = layer()
    wanted = torch.autograd.grad(made(x).square().sum(), [x, made.weight])
    for unpack in (strided, lambda t: nn.Parameter(t.clone(), requires_grad=False)):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = made(x).square().sum()
        got = torch.autograd.grad(y, [x, made.weight])
        close(got, wanted)


def test_a_negative_view_as_a_gradient():
    """Its memory holds the numbers before their sign turned."""
    made, x = layer()
    dy = torch.randn(6, 30)
    wanted = torch.autograd.grad(made(x), [x, made.weight, made.bias], dy)
    negative = torch._neg_view(-dy)
    assert negative.is_neg()
    got = torch.autograd.grad(made(x), [x, made.weight, made.bias], negative)
    close(got, wanted)


def test_a_tangent_of_the_bias_is_not_lost():
    made, x = layer()
    with forward_ad.dual_level():
        bias = forward_ad.make_dual(made.bias.detach(), made.bias.detach())
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.functional_call(made, {"bias": bias}, (x,))
