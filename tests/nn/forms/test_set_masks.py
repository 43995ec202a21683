"""set_masks_ and masks_of: masks and frozen values into a model and out, nothing half-written."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import lottery_sparse as ls


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    )


def half(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(mask.shape, generator=generator) < 0.5
        for name, mask in ls.masks_of(model).items()
    }


def same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_set_masks_and_masks_of():
    model = ls.sparsify_(network())
    masks = half(model)
    buffers = [model[i].weight_mask for i in (0, 4)]
    assert ls.set_masks_(model, masks) is model
    assert all(model[i].weight_mask is b for i, b in zip((0, 4), buffers, strict=True))
    read = ls.masks_of(model)
    assert read == ls.Masks(masks)
    read["0.weight"].fill_(False)
    masks["4.weight"].fill_(False)
    assert ls.masks_of(model).kept > 0, "both ways are copies"
    assert model[0].weight_mask.any()
    assert model[4].weight_mask.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_numeric_masks(dtype):
    model = ls.sparsify_(nn.Linear(3, 3))
    ls.set_masks_(model, {"weight": torch.eye(3, dtype=dtype)})
    assert torch.equal(model.weight_mask, torch.eye(3).bool())


def test_names_left_out_keep_what_they_have():
    model = ls.sparsify_(network())
    masks = half(model)
    ls.set_masks_(model, masks, ls.frozen.Constant(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ls.set_masks_(model, {"4.weight": torch.ones(5, 16)})
    after = model.state_dict()
    for name in ("0.weight", "0.weight_mask", "0.weight_frozen"):
        assert torch.equal(after[name], before[name])
    assert "4.weight_frozen" not in after


def test_one_frozen_source_or_one_per_name():
    model = ls.sparsify_(network())
    masks = half(model)
    w = {name: model.get_parameter(name).detach().clone() for name in masks}
    tensor = torch.randn(5, 16)
    ls.set_masks_(model, masks, {"4.weight": tensor})
    assert torch.equal(
        model[4].effective_weight, torch.where(masks["4.weight"], w["4.weight"], tensor)
    )
    assert (model[0].effective_weight[~masks["0.weight"]] == 0).all(), "names left out: zero"
    tensor.zero_()
    assert (model[4].effective_weight != 0).all(), "a copy"

    ls.set_masks_(model, masks, ls.frozen.Seeded("sign", seed=3, std=0.5))
    for name, layer in (("0.weight", model[0]), ("4.weight", model[4])):
        stream = ls.random.stream_of(name)
        drawn = ls.random.signs(w[name].shape, seed=3, stream=stream) * 0.5
        assert torch.equal(layer.effective_weight, torch.where(masks[name], w[name], drawn))


@pytest.mark.parametrize("law", ["normal", "truncated_normal", "uniform", "sign"])
def test_seeded_laws_take_the_std_of_the_layer(law):
    model = ls.sparsify_(nn.Linear(60, 50))
    std = model.weight.detach().double().std(correction=0)
    with pytest.warns(UserWarning, match="layer collapse"):
        ls.set_masks_(model, {"weight": torch.zeros(50, 60)}, ls.frozen.Seeded(law, 1))
    drawn = model.effective_weight.detach() / std
    assert abs(drawn.std() - 1) < 0.05
    assert abs(drawn.mean()) < 0.05


def test_constant_takes_std_and_signs_of_the_weight():
    model = ls.sparsify_(nn.Linear(6, 5))
    w = model.weight.detach().clone()
    mask = torch.rand(5, 6) < 0.5
    ls.set_masks_(model, {"weight": mask}, ls.frozen.Constant())
    expected = torch.where(mask, w, w.sign() * w.double().std(correction=0).float())
    assert torch.equal(model.effective_weight, expected)


def test_optimizer_state_is_zeroed_where_pruned():
    model = ls.sparsify_(network())
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    for _ in range(2):
        model(torch.randn(4, 1, 4, 4)).square().sum().backward()
        optimizer.step()
    masks = half(model)
    kept = {
        (name, key): value.clone()
        for name in masks
        for key, value in optimizer.state[model.get_parameter(name)].items()
    }
    ls.set_masks_(model, masks, optimizer=optimizer)
    for (name, key), before in kept.items():
        after = optimizer.state[model.get_parameter(name)][key]
        if key == "step":
            assert after == before
        else:
            assert torch.equal(after, torch.where(masks[name], before, 0))
    bias = optimizer.state[model[4].bias]
    assert (bias["exp_avg"] != 0).any()
    ls.set_masks_(model, masks, optimizer=torch.optim.SGD(model.parameters()))  # no state yet


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"masks": {"4.bias": torch.ones(5)}},
            ValueError,
            "masks names 4.bias, but masked",
        ),
        (
            {"masks": {"4.weight": torch.ones(16, 5)}},
            ValueError,
            "mask of 4.weight has shape",
        ),
        ({"masks": {"4.weight": torch.full((5, 16), 0.5)}}, ValueError, "must hold only 0 and 1"),
        ({"masks": {"4.weight": [[1]]}}, TypeError, "mask of 4.weight must be a tensor, got list"),
        ({"frozen": torch.zeros(5, 16)}, ValueError, r"frozen values of 0.weight must be.*\(4, 1"),
        ({"frozen": "one"}, TypeError, "frozen source of 0.weight must be"),
        ({"frozen": 0.5}, TypeError, "frozen source of 0.weight must be"),
        ({"frozen": {"4.weight": torch.ones(5, 16).int()}}, ValueError, "values of 4.weight must"),
        ({"frozen": {"1.weight": "zero"}}, ValueError, "frozen names 1.weight, but masks only"),
        ({"optimizer": 3}, TypeError, "optimizer must be"),
    ],
    ids=range(10),
)
def test_nothing_is_half_written(arguments, error, message):
    model = ls.sparsify_(network())
    ls.set_masks_(model, half(model, 1), ls.frozen.Constant(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = half(model, 2) | arguments.get("masks", {})  # the first layer's mask is right
    with pytest.raises(error, match=message):
        ls.set_masks_(model, **arguments | {"masks": masks})
    same(model.state_dict(), before)


def test_masks_must_map_names():
    with pytest.raises(TypeError, match="masks must map names to tensors, got list"):
        ls.set_masks_(ls.nn.MaskedLinear(3, 3), [torch.eye(3)])


def test_a_collapsed_layer_is_allowed_and_warned_about():
    model = ls.sparsify_(network())
    masks = half(model) | {"4.weight": torch.zeros(5, 16)}
    with pytest.warns(UserWarning, match=r"4\.weight keeps no weight at all"):
        ls.set_masks_(model, masks)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(model(x), model[4].bias.expand(2, 5))
    model(x).sum().backward()
    assert (model[4].weight.grad == 0).all()


def test_a_warning_that_is_an_error_leaves_nothing_half_written():
    model = ls.sparsify_(network())
    with pytest.raises(UserWarning, match="layer collapse"):  # pytest turns warnings into errors
        ls.set_masks_(model, half(model) | {"4.weight": torch.zeros(5, 16)})
    assert ls.masks_of(model).density == 1


def test_a_dense_model_says_what_to_do():
    with pytest.raises(ValueError, match=r"no masked layer; call ls\.sparsify_\(model\)"):
        ls.set_masks_(nn.Linear(3, 3), {"weight": torch.eye(3)})
    assert ls.masks_of(nn.Linear(3, 3)) == ls.Masks({})


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (lambda: ls.frozen.Seeded("gauss", 1), ValueError, "law must be one of"),
        (
            lambda: ls.frozen.Seeded("normal", 1.5),
            TypeError,
            "seed must be a whole number, got 1.5",
        ),
        (
            lambda: ls.frozen.Seeded("normal", None),
            TypeError,
            "seed must be a whole number, got None",
        ),
        (
            lambda: ls.frozen.Seeded("normal", True),
            TypeError,
            "seed must be a whole number, got True",
        ),
        (lambda: ls.frozen.Seeded("normal", 2**64), ValueError, "seed must fit 64 bits"),
        (lambda: ls.frozen.Seeded("normal", 1, -1.0), ValueError, "std is a standard .* got -1.0"),
        (lambda: ls.frozen.Seeded("normal", 1, math.nan), ValueError, "std .* finite .* got nan"),
        (lambda: ls.frozen.Seeded("normal", 1, math.inf), ValueError, "std .* finite .* got inf"),
        (lambda: ls.frozen.Seeded("normal", 1, 10**400), ValueError, "std .* finite .* got 1000"),
        (lambda: ls.frozen.Seeded("normal", 1, torch.ones(2)), ValueError, "std .* got tensor"),
        (lambda: ls.frozen.Seeded("normal", 1, "0.1"), TypeError, "std .* got '0.1'"),
        (
            lambda: ls.frozen.Seeded("normal", 1, 0.1, -1),
            ValueError,
            r"stream must be in \[0, 2\*\*32",
        ),
        (
            lambda: ls.frozen.Seeded("normal", 1, 0.1, "a"),
            TypeError,
            "stream must be a whole number",
        ),
        (lambda: ls.frozen.Seeded(["normal"], 1), ValueError, "law must be one of"),
        (
            lambda: ls.frozen.SignOf("zero", 1),
            TypeError,
            "source must be ls.frozen.Seeded, got str",
        ),
        (
            lambda: ls.frozen.SignOf(ls.frozen.Seeded("sign", 1), -1),
            ValueError,
            "constant .* at least 0, got -1",
        ),
        (lambda: ls.frozen.Constant(-0.5), ValueError, "constant .* at least 0, got -0.5"),
        (lambda: ls.frozen.Constant("1"), TypeError, "constant is a magnitude"),
        (lambda: ls.frozen.Constant(float("nan")), ValueError, "constant is a magnitude"),
    ],
)
def test_sources_that_make_no_sense(source, error, message):
    with pytest.raises(error, match=message):
        source()


def test_numbers_of_numpy_are_numbers():
    plain = ls.frozen.Seeded("normal", seed=2**63 + 5, std=0.5, stream=7)
    fancy = ls.frozen.Seeded("normal", np.uint64(2**63 + 5), np.float32(0.5), np.int64(7))
    assert fancy == plain
    assert [type(v) for v in (fancy.seed, fancy.std, fancy.stream)] == [int, float, int]
    assert ls.frozen.Constant(torch.tensor(0.25)) == ls.frozen.Constant(0.25)
    model = ls.set_masks_(ls.sparsify_(nn.Linear(6, 5)), {"weight": torch.ones(5, 6)}, fancy)
    again = ls.sparsify_(nn.Linear(6, 5))
    again.load_state_dict(model.state_dict())  # through JSON


@pytest.mark.parametrize("seed", [np.int64(-3), np.uint64(2**63 + 5), np.int32(7)])
def test_seeds_of_numpy_draw_what_ints_draw(seed):
    drawn = ls.random.words(9, seed, np.int64(4), np.uint32(2))
    assert torch.equal(drawn, ls.random.words(9, int(seed), 4, 2))
    assert torch.equal(ls.random.key(seed, np.int64(4)), ls.random.key(int(seed), 4))


@pytest.mark.parametrize("source", [ls.frozen.Seeded("normal", 1), ls.frozen.Constant()], ids=repr)
def test_an_empty_layer_has_no_deviation(source):
    with pytest.warns(UserWarning, match="zero-element"):
        model = ls.sparsify_(nn.Linear(0, 5))
    with pytest.warns(UserWarning, match="layer collapse"):  # and torch says nothing
        ls.set_masks_(model, {"weight": torch.ones(5, 0)}, source)
    assert model(torch.ones(2, 0)).shape == (2, 5)


@pytest.mark.parametrize("frozen", ["zero", ls.frozen.Constant(0.3)], ids=str)
def test_regrown_weights_start_from_what_they_held(frozen):
    """The same in every form, and after a state_dict was loaded."""

    def pruned():
        torch.manual_seed(0)
        model = ls.sparsify_(nn.Sequential(nn.Linear(6, 5)))
        mask = torch.arange(30).view(5, 6) % 3 == 0
        return ls.set_masks_(model, {"0.weight": mask}, frozen), mask

    full = {"0.weight": torch.ones(5, 6)}
    torch.manual_seed(0)
    raw = nn.Linear(6, 5).weight.detach()
    model, mask = pruned()
    held = model[0].weight.detach().clone()
    assert torch.equal(held[mask], raw[mask])
    assert not torch.equal(held[~mask], raw[~mask])
    resumed = ls.sparsify_(nn.Sequential(nn.Linear(6, 5)))
    resumed.load_state_dict(pruned()[0].state_dict())
    compact = ls.sparsify_(nn.Sequential(nn.Linear(6, 5)))
    compact.load_state_dict({"0.weight": raw, "0.bias": torch.zeros(5)})
    ls.set_masks_(ls.compact_(compact), {"0.weight": mask}, frozen)  # with room for all
    for each in (model, resumed, compact):
        assert torch.equal(ls.set_masks_(each, full)[0].effective_weight, held)
