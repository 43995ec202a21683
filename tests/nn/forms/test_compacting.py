"""compact_ and expand_, new masks on compact layers, and what the other functions make of them."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
import torch._dynamo.testing
from test_compact_layers import EPS, is_fresh, pair_of_networks, same_weights, tied, train
from tolerances import USUAL, close
from torch import nn

import lottery_sparse as ls
from lottery_sparse.nn.compact.registry import holders_of, optimizers_of

pytestmark = pytest.mark.numeric

ADAM = {"lr": 0.01, "eps": EPS, "amsgrad": True}


def rolled(model, by=1):
    """Masks that keep as many weights elsewhere, some of them the same."""
    return {n: m.roll(by, 0) for n, m in ls.masks_of(model).items()}


def by_position(layer, slots):
    kept = layer.kept
    blank = torch.zeros_like(layer.weight_effective, dtype=slots.dtype)
    return ls.ops.compact.reference.kept_weight(slots, blank, kept.starts, kept.columns)


def compact_layers(model):
    return [m for m in model.modules() if isinstance(m, ls.nn.CompactLinear | ls.nn.CompactConv2d)]


def snapshot(model, optimizer=None):
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    tensors += [t for layer in compact_layers(model) for t in (*layer.kept, layer.weight_effective)]
    if optimizer is not None:
        tensors += [v for state in optimizer.state.values() for v in state.values()]
    return [t.clone() for t in tensors if t is not None]


def unchanged(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- compact_ and expand_ -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["zero", ls.frozen.Constant(0.2), ls.frozen.Seeded("sign", 4)], ids=str
)
def test_there_and_back(source):
    plain, _ = pair_of_networks(source)
    model = copy.deepcopy(plain)
    layers, masks = [model[i] for i in (0, 3, 4)], [model[i].weight_mask for i in (0, 3, 4)]
    assert ls.compact_(model, spare=1) is model
    assert [type(m).__name__ for m in layers] == ["CompactConv2d", "CompactLinear", "CompactLinear"]
    assert [m.capacity for m in layers] == [int(m.sum()) + 1 for m in masks]
    assert all(m.weight_mask is mask for m, mask in zip(layers, masks, strict=True))
    parameters = list(model.parameters())
    same_weights(model, plain)
    ls.compact_(model)
    assert list(model.parameters()) == parameters, "compact layers stay as they are"
    x = torch.randn(3, 1, 4, 4)
    close(model(x), plain(x))
    assert ls.sparsify_(model) is model
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert all(m._buffers.keys() == n._buffers.keys() for m, n in zip(model, plain, strict=True))
    assert all(vars(m).keys() == vars(n).keys() for m, n in zip(model, plain, strict=True))
    same_weights(model, plain)
    assert torch.equal(model(x), plain(x))
    ls.sparsify_(model)
    ls.set_masks_(model, rolled(model))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_compacting_and_expanding_in_the_middle_of_a_training(kind):
    arguments = ADAM if kind is torch.optim.Adam else {"lr": 0.02, "momentum": 0.9}
    plain, _ = pair_of_networks(ls.frozen.Constant(0.1))
    model = copy.deepcopy(plain)
    groups = [{"params": [m.weight for m in (model[0], model[3])]}, {"params": []}]
    groups[1]["params"] = [
        p for p in model.parameters() if all(p is not q for q in groups[0]["params"])
    ]
    optimizer, other = kind(groups, **arguments), kind(plain.parameters(), **arguments)
    for i, change in enumerate((ls.compact_, ls.sparsify_, ls.compact_, None)):
        train(model, optimizer, 5, seed=i)
        train(plain, other, 5, seed=i)
        same_weights(model, plain, 20 * USUAL)
        if change is None:
            break
        grads = [p.grad for p in model.parameters()]
        change(model, optimizer=optimizer)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()}
        assert {id(p) for p in optimizer.state} == {id(p) for p in held}
        assert all(p.grad is not None and p.grad.shape == p.shape for p in held)
        assert len(grads) == len(held)
    for layer, reference in zip(compact_layers(model), (plain[0], plain[3], plain[4]), strict=True):
        for key, value in optimizer.state[layer.weight].items():
            expected = other.state[reference.weight][key]
            if value.dim():
                value = by_position(layer, value)
                expected = expected * reference.weight_mask
            close(value, expected, 20 * USUAL)


def test_frozen_parameters_stay_frozen():
    plain, _ = pair_of_networks()
    plain[3].weight.requires_grad_(False)
    ls.compact_(plain)
    assert [m.weight.requires_grad for m in compact_layers(plain)] == [True, False, True]
    assert [m.weight.requires_grad for m in ls.sparsify_(plain)[3:]] == [False, True]


def test_what_cannot_be_compacted_is_named_and_nothing_changed():
    class Scaled(ls.nn.MaskedLinear):
        pass

    model = nn.Sequential(ls.nn.MaskedLinear(3, 4), Scaled(4, 2))
    with pytest.raises(TypeError, match=r"1\.weight belongs to a Scaled"):
        ls.compact_(model)
    assert type(model[0]) is ls.nn.MaskedLinear
    nn.utils.parametrizations.weight_norm(layer := ls.nn.MaskedLinear(3, 4))
    with pytest.raises(TypeError, match="computes its weight"):
        ls.compact_(layer)
    with pytest.raises(ValueError, match="spare must be 0 or more, got -1"):
        ls.compact_(model[0], spare=-1)
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        ls.compact_(nn.Sequential(ls.nn.MaskedLinear(3, 4, device="meta")))
    with pytest.raises(ValueError, match="meta device"):
        ls.nn.CompactLinear(3, 4, device="meta")
    compact = nn.utils.parametrizations.weight_norm(ls.nn.CompactLinear(3, 4))
    with pytest.raises(RuntimeError, match=r"cannot be computed.*ls\.sparsify_"):
        compact(torch.randn(2, 3))


@pytest.mark.parametrize("method", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("change", [ls.compact_, ls.sparsify_])
def test_hooks_on_a_gradient_do_not_go_unnoticed(change, method):
    plain, compact = pair_of_networks()
    model = plain if change is ls.compact_ else compact
    parameter = model[3].weight
    handle = getattr(parameter, method)(lambda gradient: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"^3\.weight becomes a new Parameter without the"):
            change(model)
        assert model[3].weight is parameter, "nothing has changed"
        handle.remove()
        change(model)
    assert model[3].weight is not parameter


def test_no_more_slots_than_weights():
    model = ls.compact_(ls.nn.MaskedLinear(3, 4), spare=100)
    assert model.capacity == 12


# ---- a new mask ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["zero", ls.frozen.Constant(0.2), ls.frozen.Seeded("normal", 4)], ids=str
)
def test_values_gradients_and_state_move_with_the_weights(source):
    _, model = pair_of_networks(ls.frozen.Constant(0.3))
    optimizer = torch.optim.Adam(model.parameters(), **ADAM)
    train(model, optimizer, 3)
    layers = compact_layers(model)
    parameters = [m.weight for m in layers]
    lists = [[id(t) for t in m.kept] for m in layers]
    old = [
        (m.weight_mask.clone(), m.effective_weight.detach(), by_position(m, m.weight.grad))
        for m in layers
    ]
    states = [
        {
            k: by_position(m, v) if v.dim() else v.clone()
            for k, v in optimizer.state[m.weight].items()
        }
        for m in layers
    ]
    masks = rolled(model)
    ls.set_masks_(model, masks, source, optimizer)
    assert is_fresh(model)
    assert [m.weight for m in layers] == parameters
    assert [[id(t) for t in m.kept] for m in layers] == lists, "a compiled model runs on"
    for layer, mask, (old_mask, effective, grad), state in zip(
        layers, masks.values(), old, states, strict=True
    ):
        assert torch.equal(layer.weight_mask, mask)
        # regrown weights start at what they held, with no gradient and no state
        assert (mask & ~old_mask).any()
        assert torch.equal(layer.effective_weight[mask], effective[mask])
        assert torch.equal(by_position(layer, layer.weight.grad), grad * mask)
        for key, value in optimizer.state[layer.weight].items():
            value = by_position(layer, value) if value.dim() else value
            before = state[key]
            assert torch.equal(value, before * mask if before.dim() else before)
        kept = int(layer.kept.kept)
        assert kept == int(mask.sum())
        assert not layer.weight[kept:].any()
    other = ls.sparsify_(copy.deepcopy(model))
    x = torch.randn(3, 1, 4, 4)
    close(other(x), model(x))
    if source == "zero":
        assert not any(m.effective_weight[~m.weight_mask].any() for m in layers)


def test_training_goes_on_as_the_plain_model_after_a_new_mask():
    plain, model = pair_of_networks()
    optimizers = [torch.optim.Adam(m.parameters(), **ADAM) for m in (plain, model)]
    for i in range(3):
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            train(each, optimizer, 5, seed=i)
        same_weights(model, plain, 20 * USUAL)
        # subsets: a plain layer's regrown weights would take up what the raw weight holds
        masks = {n: m & (torch.rand(m.shape) < 0.8) for n, m in ls.masks_of(plain).items()}
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            ls.set_masks_(each, masks, ls.frozen.Constant(0.1), optimizer)
        same_weights(model, plain, 20 * USUAL)


def test_more_weights_than_slots_are_refused_and_nothing_changed():
    _, model = pair_of_networks(ls.frozen.Constant(0.2), spare=1)
    optimizer = torch.optim.Adam(model.parameters(), **ADAM)
    train(model, optimizer, 2)
    before = snapshot(model, optimizer)
    masks = rolled(model)
    full = masks | {"4.weight": torch.ones(3, 6)}
    with pytest.raises(
        ValueError, match=r"4\.weight keeps 18 weights, but.* slots; call ls\.sparsify_"
    ):
        ls.set_masks_(model, full, "zero", optimizer)
    assert unchanged(before, snapshot(model, optimizer))
    one_more = masks["4.weight"].clone()
    one_more.view(-1)[int((~one_more).flatten().nonzero()[0])] = True
    ls.set_masks_(model, masks | {"4.weight": one_more}, "zero", optimizer)
    assert int(model[4].kept.kept) == model[4].capacity


@pytest.mark.parametrize("given", ["stepped", "by compact_"])
def test_state_that_would_be_misplaced_is_refused(given):
    plain, model = pair_of_networks(ls.frozen.Constant(0.2))
    model = plain if given == "by compact_" else model
    optimizer = torch.optim.Adam(model.parameters(), **ADAM)
    train(model, optimizer, 2)
    if given == "by compact_":
        ls.compact_(model, optimizer)
    before = snapshot(model, optimizer)
    for other in (None, torch.optim.SGD(model.parameters())):
        with pytest.raises(ValueError, match=r"Adam holds state for.* 0\.weight.*optimizer=optim"):
            ls.set_masks_(model, rolled(model), "zero", other)
    state = ls.sparsify_(copy.deepcopy(model)).state_dict()
    with pytest.raises(RuntimeError, match=r"Adam holds state for the kept weights of 0\.weight"):
        model.load_state_dict(state | {"0.weight_mask": state["0.weight_mask"].roll(1, 0)})
    assert unchanged(before, snapshot(model, optimizer))
    model.load_state_dict(state)  # the same masks: nothing is misplaced
    assert unchanged(before, snapshot(model, optimizer))
    ls.set_masks_(model, rolled(model), "zero", optimizer)


def test_no_state_or_a_dead_optimizer_needs_none():
    _, model = pair_of_networks()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    ls.set_masks_(model, rolled(model))
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 1)
    assert optimizers_of(model[0].weight) == [optimizer]
    optimizer.cycle = optimizer  # waits for the garbage collector
    gc.disable()
    try:
        del optimizer
        ls.set_masks_(model, rolled(model))
    finally:
        gc.enable()
    assert optimizers_of(model[0].weight) == []


def test_the_registry_forgets():
    model = tied()
    ls.compact_(model)
    weight = model[0].weight
    assert {id(h) for h in holders_of(weight)} == {id(model[0]), id(model[2])}
    assert [h.weight_effective.shape for h in holders_of(weight)] == [(6, 6), (6, 6)]
    assert holders_of(model[0].bias) == []
    ls.sparsify_(model)
    assert holders_of(weight) == []
    assert holders_of(model[0].weight) == []


# ---- one graph for ten masks -------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["zero", ls.frozen.Constant(0.1), ls.frozen.Seeded("sign", 1)], ids=str
)
def test_one_compiled_graph_across_ten_mask_changes(source):
    _, model = pair_of_networks(source)
    eager = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01, eps=EPS) for m in (model, eager)]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(4, 1, 4, 4)
    for change in range(11):
        if change:
            masks = rolled(model, change)
            if change % 2:  # fewer weights, then more again
                masks["3.weight"] = masks["3.weight"] & (torch.rand(6, 48) < 0.5)
            for each, optimizer in zip((model, eager), optimizers, strict=True):
                ls.set_masks_(each, masks, source, optimizer)
        for each, call, optimizer in zip(
            (model, eager), (compiled, eager), optimizers, strict=True
        ):
            optimizer.zero_grad()
            y = call(x)
            y.square().sum().backward()
            optimizer.step()
            each.y = y.detach()
        close(model.y, eager.y, 11 * USUAL)
        same_weights(model, eager, 11 * USUAL)
    assert counter.frame_count == 1


# ---- the other functions -----------------------------------------------------------------------


def test_sparsify_masks_of_dense_state_dict_and_densify():
    plain, model = pair_of_networks(ls.frozen.Constant(0.1))
    model.append(nn.Linear(3, 2))
    ls.sparsify_(model)
    assert [type(m).__name__ for m in model if hasattr(m, "weight_mask")] == [
        "MaskedConv2d", "MaskedLinear", "MaskedLinear", "MaskedLinear",
    ]  # fmt: skip
    masks = dict(ls.masks_of(model))
    del masks["5.weight"]
    assert ls.Masks(masks) == ls.masks_of(plain)
    state = ls.dense_state_dict(model[:5])
    dense = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.Linear(6, 3)
    )
    dense.load_state_dict(state)
    x = torch.randn(2, 1, 4, 4)
    close(dense(x), plain(x))
    assert torch.equal(ls.densify_(model)[:5](x), dense(x))
    assert [type(m) for m in model] == [type(m) for m in [*dense, model[5]]]


def ticket_training(model, stop_at=None):
    return train(model, torch.optim.Adam(model.parameters(), lr=0.01), stop_at or 5) and None


@pytest.mark.parametrize("arguments", [{}, {"mask0": "freeze_init", "rewind_to": 2}], ids=str)
def test_find_ticket_on_a_compact_model(arguments):
    torch.manual_seed(0)
    plain, _ = pair_of_networks()
    ls.set_masks_(plain, {n: torch.ones_like(m) for n, m in ls.masks_of(plain).items()})
    compact = ls.compact_(copy.deepcopy(plain))
    tickets = [
        ls.find_ticket(m, ticket_training, 2, 0.7, criterion="magnitude_increase", **arguments)
        for m in (plain, compact)
    ]
    agree = {n: (tickets[0].masks[n] == m).double().mean() for n, m in tickets[1].masks.items()}
    assert min(agree.values()) > 0.9, "apart from rounding"
    assert tickets[0].masks.kept == tickets[1].masks.kept
    assert ls.masks_of(compact) == tickets[1].masks
    assert is_fresh(compact)


def test_a_ticket_goes_into_a_compact_network_with_its_masks():
    plain, compact = pair_of_networks()
    dense = copy.deepcopy(plain)
    ls.set_masks_(dense, {n: torch.ones_like(m) for n, m in ls.masks_of(plain).items()})
    ticket = ls.find_ticket(dense, ticket_training, 1, 0.3)
    assert ls.masks_of(ticket.apply_(compact)) == ticket.masks
    roomy = ls.compact_(plain, spare=10**6)
    assert ls.masks_of(ticket.apply_(roomy)) == ticket.masks
    x = torch.randn(2, 1, 4, 4)
    close(roomy(x), ticket.apply_(ls.sparsify_(compact))(x))
