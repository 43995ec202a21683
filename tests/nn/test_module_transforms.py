"""Masked layers under autocast, vmap, checkpointing, export and torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from masked_layers import SOURCES, dense_twin, masked
from tolerances import close
from torch import nn
from torch.utils.checkpoint import checkpoint

import lottery_sparse as ls

pytestmark = pytest.mark.numeric

# ---- transforms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Linear(7, 6), nn.Conv2d(4, 8, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("frozen", SOURCES)
def test_autocast(layer, frozen):
    layer = masked(copy.deepcopy(layer), frozen)
    x = torch.randn(3, 7) if isinstance(layer, nn.Linear) else torch.randn(3, 4, 5, 5)
    twin = dense_twin(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), twin(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    close(layer.weight.grad, twin.weight.grad * layer.weight_mask)


def test_functional_call_and_ensembles_under_vmap():
    """The recipe of torch.func for ensembles: parameters and masks stacked, one model."""
    models = []
    for _ in range(3):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.ReLU(), nn.Linear(8, 4))
        ls.sparsify_(model)
        masks = {n: torch.rand(m.shape) < 0.5 for n, m in ls.masks_of(model).items()}
        models.append(ls.set_masks_(model, masks, ls.frozen.Constant(0.25)))
    parameters, buffers = torch.func.stack_module_state(models)
    assert buffers["0.weight_mask"].shape == (3, 2, 1, 3, 3)
    x = torch.randn(5, 1, 4, 4)

    def loss(parameters, buffers, x):
        y = torch.func.functional_call(models[0], (parameters, buffers), (x,))
        return y.square().sum(), y

    gradients, y = torch.func.vmap(torch.func.grad(loss, has_aux=True), in_dims=(0, 0, None))(
        parameters, buffers, x
    )
    for i, model in enumerate(models):
        close(y[i], model(x))
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            close(gradients[name][i], parameter.grad)
        assert (gradients["3.weight"][i][~model[3].weight_mask] == 0).all()


def test_per_sample_gradients():
    layer, x = masked(nn.Linear(7, 6), "tensor"), torch.randn(4, 7)
    parameters = dict(layer.named_parameters())

    def loss(parameters, row):
        return torch.func.functional_call(layer, parameters, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).square().sum().backward()
    close(each["weight"].sum(0), layer.weight.grad)
    assert (each["weight"][:, ~layer.weight_mask] == 0).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model = nn.Sequential(masked(nn.Linear(7, 6)), nn.Tanh(), masked(nn.Linear(6, 5), "constant"))
    x = torch.randn(4, 7, requires_grad=True)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_double_backward():
    layer = masked(nn.Linear(4, 3, dtype=torch.float64), "tensor")
    twin, x = dense_twin(layer), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def penalty(module):
        (dx,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, module.weight))

    (gx, gw), (ex, ew) = penalty(layer), penalty(twin)
    close(gx, ex)
    close(gw, ew * layer.weight_mask)


def new_masks(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(mask.shape, generator=generator) < 0.1 + 0.08 * seed
        for name, mask in ls.masks_of(model).items()
    }


@pytest.mark.parametrize("frozen", ["zero", "constant", "seeded"])
def test_one_compiled_graph_across_ten_mask_changes(frozen):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 6), nn.Linear(6, 3)
    )
    ls.sparsify_(model)
    source = {
        "zero": "zero",
        "constant": ls.frozen.Constant(),
        "seeded": ls.frozen.Seeded("sign", 1),
    }[frozen]
    ls.set_masks_(model, new_masks(model, 10), source)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(4, 1, 4, 4)
    for change in range(11):
        if change:
            ls.set_masks_(model, new_masks(model, change), source)
        y = compiled(x)
        y.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        expected = model(x)
        expected.square().sum().backward()
        close(y, expected)
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            close(gradient, parameter.grad)
        model.zero_grad()
    assert counter.frame_count == 1


def test_export():
    layer = masked(nn.Linear(7, 6), "constant")
    x = torch.randn(3, 7)
    program = torch.export.export(layer, (x,))
    close(program.module()(x), layer(x))
