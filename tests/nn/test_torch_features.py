"""Layers under what else torch does with modules: fx, replicas, processes, inference mode, EMA."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from masked_layers import SOURCES
from tolerances import close
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lottery_sparse as ls

kinds = pytest.mark.parametrize("kind", ["masked", "compact"])
frozen = pytest.mark.parametrize("frozen", SOURCES)


def model_of(kind, frozen="zero"):
    """(a model with a convolution and linear layers, an input)."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding="same"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 6),
        nn.Linear(6, 3),
    )
    return convert(model, kind, frozen), torch.randn(5, 1, 4, 4)


def convert(model, kind, frozen="zero"):
    ls.sparsify_(model)
    source = SOURCES[frozen]
    if callable(source):
        source = {f"{i}.weight": source(model[i].weight.detach()) for i in (0, 3, 4)}
    masks = {name: torch.rand(m.shape) < 0.5 for name, m in ls.masks_of(model).items()}
    ls.set_masks_(model, masks, source)
    return ls.compact_(model) if kind == "compact" else model


def step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    return optimizer


def moved(model):
    """The model's masks, each kept weight moved by one."""
    return {name: m.flatten().roll(1).view(m.shape) for name, m in ls.masks_of(model).items()}


# ---- torch.fx ------------------------------------------------------------------------------------


@kinds
def test_fx_keeps_the_layers(kind):
    model, x = model_of(kind, "constant")
    traced = torch.fx.symbolic_trace(model)
    assert [type(m) for m in traced.children()] == [type(m) for m in model]
    assert len(traced.graph.nodes) == len(model) + 2
    assert traced.state_dict().keys() == model.state_dict().keys()
    for changed in (traced, copy.deepcopy(traced)):
        step(changed, x)
        ls.set_masks_(changed, moved(changed))
        alone, _ = model_of("masked")
        alone.load_state_dict(changed.state_dict())
        close(changed(x), alone(x))


def test_fx_of_packed_layers():
    model = nn.Sequential(ls.nn.PackedLinear(torch.randn(4, 5).sign()), nn.ReLU())
    x = torch.randn(2, 5)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("layer", [ls.nn.MaskedLinear(3, 4), ls.nn.CompactConv2d(1, 2, 3)], ids=str)
def test_fx_of_a_layer_by_itself_says_what_to_do(layer):
    with pytest.raises(TypeError, match=rf"cannot trace a {type(layer).__name__} by itself.*Seq"):
        torch.fx.symbolic_trace(layer)


# ---- nn.DataParallel -----------------------------------------------------------------------------


@pytest.fixture
def replicate(monkeypatch):
    """torch.nn.parallel.replicate with a broadcast that needs no GPU."""
    module = sys.modules["torch.nn.parallel.replicate"]

    def broadcast(tensors, devices, detach=False):
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    return lambda model: module.replicate(model, [0, 1])


@kinds
@frozen
def test_replicas_compute_and_train_the_layer(kind, frozen, replicate):
    model, x = model_of(kind, frozen)
    with torch.no_grad():
        model[3].weight.mul_(1.5)  # which no forward has seen yet
    before = {name: b.clone() for name, b in model.named_buffers()}
    ys = [replica(part) for replica, part in zip(replicate(model), x.split(3), strict=True)]
    torch.cat(ys).square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    y = model(x)
    close(torch.cat(ys), y)
    y.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        close(gradient, parameter.grad)
    for replica in replicate(model):
        assert torch.equal(replica[3].effective_weight, model[3].effective_weight)
    held = dict(model.named_buffers())
    assert held.keys() == before.keys()
    step(model, x)
    assert torch.equal(replicate(model)[0](x), model(x))


# ---- buffers of another model --------------------------------------------------------------------


def pair_of_models(kind, frozen):
    """(two models with other weights, masks and frozen values, an input)."""
    model, x = model_of(kind, frozen)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    source = SOURCES[frozen]
    if callable(source):
        source = {f"{i}.weight": source(model[i].effective_weight.detach()) for i in (0, 3, 4)}
    ls.set_masks_(other, moved(model), source)
    return model, other, x


@kinds
@frozen
def test_a_model_is_another_one_once_all_its_tensors_are_copied(kind, frozen):
    """As DistributedDataParallel does with those of rank 0."""
    model, other, x = pair_of_models(kind, frozen)
    assert not torch.allclose(model(x), other(x))
    tensors = [[*m.parameters(), *m.buffers()] for m in (model, other)]
    for value, written in zip(*tensors, strict=True):
        written.detach().copy_(value)
    others = [other, copy.deepcopy(other)]
    if frozen != "seeded":  # whose law and seed are no tensors: made again, it is that of `other`
        others.append(copy.deepcopy(other).double().float())
    step(model, x)
    for same in others:
        step(same, x)
        close(same(x), model(x))
        for i in (0, 3, 4):
            close(same[i].effective_weight, model[i].effective_weight)
    masks = moved(model)
    for same in (model, other):
        ls.set_masks_(same, masks, ls.frozen.Constant(0.1))
    close(other(x), model(x))


@pytest.mark.parametrize(
    ("kind", "frozen", "compiled"),
    [
        *((kind, frozen, False) for kind in ("masked", "compact") for frozen in SOURCES),
        ("compact", "constant", True),
    ],
)
def test_functional_calls_with_all_tensors_of_another_model(kind, frozen, compiled):
    model, other, x = pair_of_models(kind, frozen)
    expected, before = other(x), model(x)
    expected.square().sum().backward()

    def call(parameters, buffers):
        return torch.func.functional_call(model, (parameters, buffers), (x,))

    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    values = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    y = call(values, dict(other.named_buffers()))
    close(y, expected)
    y.square().sum().backward()
    for name, parameter in other.named_parameters():
        close(values[name].grad, parameter.grad)
    close(call(dict(other.named_parameters()), dict(other.named_buffers())), y)
    assert torch.equal(model(x), before)


# ---- other processes -----------------------------------------------------------------------------


def in_another_process(models, x, results):
    torch.set_num_threads(1)
    for model in models:
        y = model(x)
        step(model, x)
        ls.set_masks_(model, moved(model))
        results.put((y.detach().numpy(), model(x).detach().numpy()))


@pytest.mark.slow
def test_spawned_processes():
    context = torch.multiprocessing.get_context("spawn")
    models = [model_of(kind, "constant")[0] for kind in ("masked", "compact")]
    x, results = torch.randn(5, 1, 4, 4), context.SimpleQueue()
    process = context.Process(target=in_another_process, args=(copy.deepcopy(models), x, results))
    process.start()
    for model in models:
        got, after = map(torch.from_numpy, results.get())
        close(got, model(x).detach())
        step(model, x)
        ls.set_masks_(model, moved(model))
        close(after, model(x).detach())
    process.join()
    assert process.exitcode == 0


# ---- torch.inference_mode ------------------------------------------------------------------------


def use_everything(model, x, train=True):
    """Everything that a layer does, one after the other."""
    model(x)
    optimizer = step(model, x) if train else None
    ls.set_masks_(model, moved(model), ls.frozen.Constant(0.1), optimizer)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    y = model(x)
    close(copy.deepcopy(model)(x), y)
    close(ls.nn.refresh_(ls.compact_(ls.sparsify_(model)))(x), y)
    ls.densify_(ls.sparsify_(model))
    close(model(x), y)
    close(model.double()(x.double()).float(), y)


@kinds
@frozen
def test_layers_made_under_inference_mode_train_afterwards(kind, frozen):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding="same"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 6),
        nn.Linear(6, 3),
    )
    x = torch.randn(5, 1, 4, 4)
    with torch.inference_mode():
        model = convert(model, kind, frozen)
        model(x)
        ls.set_masks_(model, moved(model), ls.frozen.Constant(0.1))
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
        model(x)
    assert not any(b.is_inference() for b in model.buffers())
    use_everything(model, x)


@kinds
def test_everything_under_inference_mode(kind):
    with torch.inference_mode():
        model, x = model_of(kind, "constant")
        use_everything(model, x, train=False)


@kinds
def test_copies_made_under_inference_mode(kind):
    model, x = model_of(kind, "constant")
    with torch.inference_mode():
        other = copy.deepcopy(model)
        y = other(x)
        other[4].weight.mul_(2)
        assert not torch.equal(other(x), y)
    with torch.no_grad():
        assert torch.equal(model(x), y)
        twice = other(x)
        assert torch.equal(copy.deepcopy(other)(x), twice)
    networks = ls.ensemble.replicate(
        [ls.sparsify_(nn.Sequential(nn.Linear(3, 4))) for _ in range(2)]
    )
    with torch.inference_mode():
        side = ls.ensemble.replicate([ls.ensemble.select(networks, e) for e in (1, 0)])
    assert not any(b.is_inference() for b in side.buffers())


# ---- averages of models --------------------------------------------------------------------------


def averaged(model, x, **options):
    """An average over five steps of a model, and the plain average of what it consists of."""
    average = AveragedModel(model, **options)
    parameters = []
    for _ in range(5):
        step(model, x)
        average.update_parameters(model)
        parameters.append([p.detach().clone() for p in model.parameters()])
    return average, parameters


@kinds
@frozen
def test_averages_hold_frozen_values(kind, frozen):
    model, x = model_of(kind, frozen)
    average, parameters = averaged(model, x)
    for got, each in zip(average.module.parameters(), zip(*parameters, strict=True), strict=True):
        close(got, torch.stack(each).mean(0))
    for i in (0, 3, 4):
        pruned = ~model[i].weight_mask
        held = average.module[i].effective_weight
        assert torch.equal(held[pruned], model[i].effective_weight[pruned])
    average(x)
    ls.set_masks_(model, moved(model), ls.frozen.Constant(0.1) if frozen == "constant" else "zero")
    if frozen in ("constant", "zero") and kind != "compact":  # the same buffers as before
        average.update_parameters(model)
        average(x)
        assert torch.equal(average.module[3].weight_mask, model[3].weight_mask)


@kinds
@frozen
def test_averages_of_buffers_too(kind, frozen):
    model, x = model_of(kind, frozen)
    fn = get_ema_multi_avg_fn(0.9)
    plain, _ = averaged(copy.deepcopy(model), x, multi_avg_fn=fn)
    average, _ = averaged(model, x, multi_avg_fn=fn, use_buffers=True)
    close(average(x), plain(x))
    for layer, other in zip(average.module, plain.module, strict=True):
        if hasattr(layer, "weight"):
            close(layer.effective_weight, other.effective_weight)
            assert torch.equal(layer.weight_mask, other.weight_mask)


# ---- torch.compile -------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("optimizer", [ls.optim.SGD, torch.optim.SGD], ids=["ls", "torch"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_a_compiled_training_step_breaks_its_graph_and_is_right(kind, optimizer):
    model, x = model_of(kind, "constant")
    twin = copy.deepcopy(model)

    def train(model, optimizer):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    torch._dynamo.reset()
    compiled = torch.compile(train, backend="aot_eager")
    ours = optimizer(model.parameters(), lr=0.01, momentum=0.9)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        compiled(model, ours)
        train(twin, theirs)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        close(parameter, other)
    with torch.no_grad():
        close(model(x), twin(x))


def test_a_step_in_a_full_graph_says_that_it_breaks_it():
    model, x = model_of("compact")
    optimizer = ls.optim.SGD(model.parameters(), lr=0.01)
    model(x).sum().backward()
    torch._dynamo.reset()
    step = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"_KernelStep\.step|disable"):
        step()
