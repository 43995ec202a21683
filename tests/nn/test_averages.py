"""Averages of a model whose mask changes on the way, by every kind of loop.

Where masks are copied or averaged the average has the model's new mask. Where numbers alone are, a
masked copy goes on under its own. Slots of compact Parameters stand for different weights then:
that is refused.
"""

from __future__ import annotations

import copy

import pytest
import torch
from masked_layers import SOURCES
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lottery_sparse as ls

DECAY = 0.5
X = torch.randn(16, 30, generator=torch.Generator().manual_seed(5))
forms = pytest.mark.parametrize("form", ["masked", "compact"])
densities = pytest.mark.parametrize("density", [0.1, 0.6])
REFUSED = "the slots of this CompactLinear .* ls.set_masks_ on the average, too"


def model_of(form, density=0.6, frozen="zero"):
    torch.manual_seed(0)
    model = ls.sparsify_(nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5)))
    ls.set_masks_(model, masks_at(model, density, seed=1), frozen)
    return ls.compact_(model) if form == "compact" else model


def masks_at(model, density, seed):
    """Masks of the same number of kept weights: none has more than there are slots."""
    generator = torch.Generator().manual_seed(seed)
    order = {
        name: torch.rand(mask.shape, generator=generator).flatten().argsort().argsort()
        for name, mask in ls.masks_of(model).items()
    }
    return {
        name: (order[name] < density * mask.numel()).view(mask.shape)
        for name, mask in ls.masks_of(model).items()
    }


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- loops: (average, model) -> None -------------------------------------------------------------


def yolo(average, model):
    state = model.state_dict()
    for name, value in average.state_dict().items():
        if value.dtype.is_floating_point:
            value *= DECAY
            value += (1 - DECAY) * state[name].detach()


def timm_v2(average, model):
    pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    for ours, theirs in pairs:
        ours.copy_(DECAY * ours + (1 - DECAY) * theirs)


def timm_v3(average, model):
    pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    for ours, theirs in pairs:
        if ours.is_floating_point():
            ours.lerp_(theirs, 1 - DECAY)
        else:
            ours.copy_(theirs)


def timm_v3_parameters(average, model):
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - DECAY)
    copy_buffers(average, model)


def copy_buffers(average, model):
    for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)


def polyak(average, model):
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.data.mul_(DECAY).add_(theirs.data, alpha=1 - DECAY)


def lerp(average, model):
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.lerp_(theirs, 1 - DECAY)


def hard(average, model):
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.copy_(theirs)


BY_STATE_DICT = [yolo, timm_v2, timm_v3]
BY_SLOT = [timm_v3_parameters, polyak, lerp, hard]
NUMBERS_ALONE = {yolo, polyak, lerp, hard}


@torch.no_grad()
def update(loop, average, model):
    loop(average, model)


def name_of(loop):
    return loop.__name__


def follow_by_hand(average, model, own_mask):
    """(what each weight of the average must be, its mask): dense tensors, selected by the mask."""
    wanted = {}
    for i in (0, 2):
        mask = average[i].weight_mask if own_mask else model[i].weight_mask
        mean = DECAY * average[i].effective_weight + (1 - DECAY) * model[i].effective_weight
        wanted[i] = torch.where(mask, mean, 0.0).detach(), mask.clone()
    return wanted


def assert_averaged(average, wanted):
    for i, (weight, mask) in wanted.items():
        torch.testing.assert_close(average[i].effective_weight, weight)
        assert torch.equal(average[i].weight_mask, mask)
    average(X)
    assert torch.equal(average.state_dict()["0.weight"], average[0].effective_weight)


@pytest.mark.parametrize("loop", BY_STATE_DICT + BY_SLOT, ids=name_of)
@forms
@densities
def test_a_new_mask_is_followed_or_refused(loop, form, density):
    model = model_of(form, density)
    average = copy.deepcopy(model)
    average(X)
    step(model)
    ls.set_masks_(model, masks_at(model, density, seed=2))
    step(model)
    wanted = follow_by_hand(average, model, own_mask=loop in NUMBERS_ALONE)
    update(loop, average, model)
    if form == "compact" and loop in BY_SLOT:
        for use in (average, lambda x: average.state_dict(), copy.deepcopy):
            with pytest.raises(RuntimeError, match=REFUSED):
                use(X if use is not copy.deepcopy else average)
        average.load_state_dict(model.state_dict())  # anew
        assert torch.equal(average(X), model(X))
        assert ls.masks_of(average) == ls.masks_of(model)
    elif loop is hard:  # a copy of the model's weights under the old mask
        assert ls.masks_of(average) != ls.masks_of(model)
    else:
        assert_averaged(average, wanted)


@densities
def test_an_average_by_data_is_seen_where_one_pruned_entry_moved(density):
    """No write of it counts a version, and the pruned entries that are looked at stay zero."""
    model = model_of("masked", density)
    average = copy.deepcopy(model)
    for i in (0, 2):  # one more is kept by the model
        mask = model[i].weight_mask.clone()
        new = (~mask).flatten().nonzero()[3]
        mask.view(-1)[new] = True
        ls.set_masks_(model[i], {"weight": mask})
        with torch.no_grad():
            model[i].weight.view(-1)[new] = 1.0
    average(X)
    step(model)
    wanted = follow_by_hand(average, model, own_mask=True)
    update(polyak, average, model)
    assert_averaged(average, wanted)


@pytest.mark.parametrize("form", ["masked", "compact"])
def test_an_average_by_data_is_seen_though_a_feature_is_always_zero(form):
    """The weights of that column never move, and rows are as many as make strides whole rows."""
    torch.manual_seed(0)
    model = ls.sparsify_(nn.Sequential(nn.Linear(64, 256)))
    mask = torch.ones(256, 64, dtype=torch.bool)
    mask[::2, 1] = form == "compact"  # a compact layer may keep everything
    ls.set_masks_(model, {"0.weight": mask})
    model, x = ls.compact_(model) if form == "compact" else model, torch.randn(32, 64)
    x[:, 0] = 0.0
    average = copy.deepcopy(model)
    average(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    assert torch.equal(model[0].effective_weight[:, 0], average[0].effective_weight[:, 0])
    with torch.no_grad():
        average[0].weight.data.lerp_(model[0].weight.data, 0.5)
        if form == "masked":
            average[0].weight.data[~mask] = 1.0
    y = average(x)
    wanted = (average[0].weight.view(256, 64) * mask).detach()
    torch.testing.assert_close(y, nn.functional.linear(x, wanted, average[0].bias))


@pytest.mark.parametrize("loop", BY_STATE_DICT + BY_SLOT, ids=name_of)
@forms
def test_setting_the_masks_of_both_is_the_way_out(loop, form):
    model = model_of(form)
    average = copy.deepcopy(model)
    for seed in (2, 3, 4):
        step(model)
        masks = masks_at(model, 0.6, seed)
        ls.set_masks_(model, masks)
        ls.set_masks_(average, masks)
        step(model)
        wanted = follow_by_hand(average, model, own_mask=True)
        update(loop, average, model)
        if loop is hard:
            assert torch.equal(average(X), model(X))
        else:
            assert_averaged(average, wanted)


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers"])
@pytest.mark.parametrize("way", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}])
def test_averaged_model(way, buffers):
    model = model_of("compact")
    early = AveragedModel(model, use_buffers=buffers, **way)
    late = AveragedModel(model, use_buffers=buffers, **way)
    step(model)
    early.update_parameters(model)
    ls.set_masks_(model, masks_at(model, 0.6, seed=2))
    for average in (early, late):
        average.update_parameters(model)
    step(model)
    late(X)  # its first update, so a copy of everything
    with pytest.raises(RuntimeError, match=REFUSED):
        early(X)
    late.update_parameters(model)
    late(X)
    assert ls.masks_of(late.module) == ls.masks_of(model)


def test_copies_of_everything_in_any_order():
    for parts in ((hard, copy_buffers), (copy_buffers, hard)):
        model = model_of("compact")
        target = copy.deepcopy(model)
        target(X)
        ls.set_masks_(model, masks_at(model, 0.6, seed=2))
        step(model)
        for part in parts:
            update(part, target, model)
        assert torch.equal(target(X), model(X))


@densities
def test_a_mask_that_is_written_alone_moves_the_weights(density):
    """By the buffers of another model, or in place."""
    for frozen in SOURCES:
        source = ls.frozen.Constant(0.2) if callable(SOURCES[frozen]) else SOURCES[frozen]
        copies = []
        for form in ("masked", "compact"):
            model = model_of(form, density, source)
            other = copy.deepcopy(model)
            step(other)
            new = masks_at(model, density, seed=2)
            new["0.weight"] = model[0].weight_mask.clone().roll(1, 0)
            ls.set_masks_(model, new, source)
            before = [b.clone() for b in other.buffers()]
            if all(a.shape == b.shape for a, b in zip(before, model.buffers(), strict=True)):
                update(copy_buffers, other, model)
                other[2].weight_mask[0, :3] = False
                copies.append(other)
        torch.testing.assert_close(copies[0](X), copies[1](X))
        for i in (0, 2):
            weights = [other[i].effective_weight for other in copies]
            torch.testing.assert_close(*weights)


def test_a_mask_written_under_an_optimizer_with_momentum_is_refused():
    model = model_of("compact")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).square().mean().backward()
    optimizer.step()
    model[0].weight_mask[0] = False
    for _ in range(2):
        with pytest.raises(ValueError, match=r"SGD holds state .* pass it: set_masks_"):
            model(X)


def test_copies_that_go_their_own_way():
    """Trained by optimizers, or by hand and said so."""
    model = model_of("compact")
    trained, by_hand, noisy = (copy.deepcopy(model) for _ in range(3))
    ls.set_masks_(model, masks_at(model, 0.6, seed=2))
    step(trained)
    for network in (trained, by_hand):
        network(X).square().mean().backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
    trained(X)
    with pytest.raises(RuntimeError, match=r"its numbers are meant, call ls\.nn\.refresh_"):
        by_hand(X)
    ls.nn.refresh_(by_hand)(X)
    with torch.no_grad():
        noisy[0].weight.mul_(2.0)
    ls.nn.refresh_(noisy)
    torch.testing.assert_close(noisy[0].effective_weight[noisy[0].weight_mask], noisy[0].weight)


def test_tied_layers_move_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    model[1].weight = model[0].weight
    ls.set_masks_(ls.sparsify_(model), {"0.weight": torch.rand(9, 9) < 0.5})
    ls.compact_(model)
    other, x = copy.deepcopy(model), torch.randn(3, 9)
    mask = model[0].weight_mask.clone().roll(1, 0)
    wanted = ls.sparsify_(copy.deepcopy(other))
    ls.set_masks_(wanted, {"0.weight": mask})
    ls.set_masks_(model, {"0.weight": mask})
    update(copy_buffers, other, model)
    torch.testing.assert_close(other(x), wanted(x))


def test_only_copies_are_asked_when_a_mask_changes():
    """Layers of one shape whose masks differ are not compared; a copy by a file is found, too."""
    model, other = model_of("compact"), model_of("compact")
    ls.set_masks_(other, masks_at(other, 0.6, seed=7))
    copies = [copy.deepcopy(model), model_of("compact")]
    copies[1].load_state_dict({n: v.clone() for n, v in model.state_dict().items()})
    for i in (0, 2):
        family = set(model[i]._derived.family)  # and perhaps copies that other tests left behind
        assert {each[i] for each in (model, *copies)} <= family
        assert other[i] not in family
    ls.set_masks_(model, masks_at(model, 0.6, seed=2))
    assert not {each[0] for each in copies} & set(model[0]._derived.family)
    for each in copies:
        update(lerp, each, model)
        with pytest.raises(RuntimeError, match=REFUSED):
            each(X)
    update(lerp, other, model)
    other(X)  # its mask was another one before
