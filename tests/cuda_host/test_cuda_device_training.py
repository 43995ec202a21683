"""The CUDA kernels of training on a GPU; test_cuda_compact.py and others emulate them."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import products
from test_cuda_compact import check, entries, problem
from tolerances import USUAL, close
from torch import nn

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits import reference as bits_reference
from lottery_sparse.ops.compact import reference as compact_reference

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and dispatch.built("cuda")),
    reason="needs a CUDA device and _C_cuda",
)

# (N, K, B, density): ragged, chunks of columns in both directions, a batch of several panels
SHAPES = [(1, 1, 1, 1.0), (33, 70, 37, 0.2), (300, 784, 60, 0.02), (2500, 4096, 200, 0.02)]
FORMS = ["single", "networks", "shared x"]
OPTIMIZERS = {"SGD": {"momentum": 0.9}, "Adam": {"capturable": True}, "AdamW": {"fused": True}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compact_linear(shape, form, dtype):
    x, values, lists, weight, dy, mask = problem(form, *shape, dtype)
    bias = torch.randn(*mask.shape[:-1]).to(dtype)
    a, w, g, b = (t.double() for t in (x, weight, dy, bias.unsqueeze(-2)))
    x, values, weight, dy, bias = (t.cuda() for t in (x, values, weight, dy, bias))
    lists = type(lists)(*(t.cuda() for t in lists))
    x, values = x.requires_grad_(), values.requires_grad_()
    results = []
    for _ in range(2):
        with ls.use_backend("cuda"):
            y = ops.compact_linear(x, values, lists, weight, bias, True)
            results.append([y, *torch.autograd.grad(y, (x, values), dy)])
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)
    y, dx, dv = (t.detach().cpu() for t in results[0])
    terms = products(mask.shape, x, dy, {})
    check(y, a @ w.mT + b, a.abs() @ w.mT.abs() + b.abs(), terms["y"])
    expected = g @ w, g.abs() @ w.abs()
    check(dx, *(t.sum(0) if form == "shared x" else t for t in expected), terms["dx"])
    expected = g.mT @ a, g.mT.abs() @ a.abs()
    check(dv, *(entries(t, mask, values.shape[-1]) for t in expected), terms["dw"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_captured_training_step(name):
    """A step of a compact model, replayed, against the same steps by torch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 90), nn.ReLU(), nn.Linear(90, 10)).cuda()
    masks = {f"{i}.weight": torch.rand(model[i].weight.shape) < 0.1 for i in (0, 2)}
    model = ls.compact_(ls.set_masks_(ls.sparsify_(model), masks))
    same = copy.deepcopy(model)
    x = torch.randn(50, 200, device="cuda")

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    mine = getattr(ls.optim, name)(model.parameters(), lr=1e-2, **OPTIMIZERS[name])
    theirs = getattr(torch.optim, name)(same.parameters(), lr=1e-2, **OPTIMIZERS[name])
    with ls.use_backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step(model, mine)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(model, mine)
        for _ in range(3):
            graph.replay()
    with ls.use_backend("reference"):
        for _ in range(5):
            step(same, theirs)
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        close(p, q, 5 * USUAL)
    for layer in (model[0], model[2]):
        kept = layer.kept
        fresh = compact_reference.kept_weight(
            layer.weight, torch.zeros_like(layer.weight_effective), kept.starts, kept.columns
        )
        assert torch.equal(layer.weight_effective, fresh)


@pytest.mark.parametrize("shape", [(1,), (3, 33), (4, 129), (300, 784), (2, 4096, 4096)], ids=str)
def test_bits(shape):
    mask = torch.rand(shape, device="cuda") < 0.3
    with ls.use_backend("cuda"):
        bits = ops.pack_mask(mask)
        assert torch.equal(ops.unpack_mask(bits, shape[-1]), mask)
    assert torch.equal(bits, bits_reference.pack_mask(mask))
