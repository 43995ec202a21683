"""Models with learned masks: from dense ones, evaluated, side by side, and as masked ones."""

from __future__ import annotations

import math

import pytest
import torch
from supermask_models import dense, images, layers, learning, options, rounded, train
from tolerances import after, close
from torch import nn

import lottery_sparse as ls
from lottery_sparse.nn.supermask import FIRST_SAMPLE
from lottery_sparse.ops import sample_mask

pytestmark = pytest.mark.numeric

# ---- from dense ----------------------------------------------------------------------------------


def test_swapped_layers_keep_what_they_hold():
    model = dense()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    modules = list(model)
    assert ls.supermask_(model) is model
    assert all(a is b for a, b in zip(model, modules, strict=True))
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)
    streams = {int(layer.key[1]) for layer in layers(model)}
    assert streams == {ls.random.stream_of(f"{i}.score") for i in (0, 4, 6)}


def test_filter_leaves_layers_out():
    model = ls.supermask_(dense(), filter_fn=lambda module, name: name != "6")
    assert type(model[6]) is nn.Linear
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.score", "4.score"]


def test_shared_weights_are_refused_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(TypeError, match="0 cannot learn a mask: its weight is shared"):
        ls.supermask_(model)
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


# ---- what is drawn -------------------------------------------------------------------------------


def test_training_draws_anew_and_evaluation_leaves_it_alone():
    model = learning()
    x = images()
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    again = learning()
    again.eval()
    evaluated = [again(x) for _ in range(3)]
    assert not torch.equal(evaluated[0], evaluated[1])
    again.train()
    assert torch.equal(again(x), first)
    assert torch.equal(again(x), second)


def test_evaluation_modes():
    model, x = learning(), images()
    model.eval()
    ls.learning.use_masks_(model, "threshold")
    assert torch.equal(model(x), model(x))
    assert ls.masks_of(model) == ls.Masks(
        {n.replace("score", "weight"): s > 0 for n, s in model.named_parameters() if "score" in n}
    )
    ls.learning.use_masks_(model, 5)
    fifth, masks = model(x), ls.masks_of(model)
    ls.learning.use_masks_(model, "sample")
    samples = [model(x) for _ in range(6)]
    assert torch.equal(samples[5], fifth)
    ls.learning.use_masks_(model, masks)
    assert torch.equal(model(x), fifth)
    key = layers(model)[0].key.clone()
    key[2] = FIRST_SAMPLE + 5
    assert torch.equal(masks["0.weight"], sample_mask(layers(model)[0].score, key) != 0)


def test_a_probability_of_one_half_is_not_used_by_the_threshold():
    model = ls.supermask_(dense())
    assert ls.masks_of(model).kept == 0


def test_sampled_goes_through_samples_and_restores():
    model, x = learning(), images()
    model.eval()
    ls.learning.use_masks_(model, "threshold")
    before = model(x)
    outputs = [(masks, model(x)) for masks in ls.learning.sampled(model, 4)]
    assert torch.equal(model(x), before)
    assert len({tuple(y.flatten().tolist()) for _, y in outputs}) == 4
    for i, (masks, y) in enumerate(outputs):
        ls.learning.use_masks_(model, i)
        assert torch.equal(model(x), y)
        assert ls.masks_of(model) == masks
    ls.learning.use_masks_(model, "threshold")
    for _ in ls.learning.sampled(model, 4):
        break
    assert torch.equal(model(x), before)


def test_densities():
    layer = ls.nn.SupermaskLinear(300, 200, init_score=-1.0)
    p = 1 / (1 + math.e)
    # of a sigmoid, of the sum of all and of the division
    assert layer.expected_density == pytest.approx(p, rel=after(300 * 200, torch.float32))
    assert abs(float(layer.sample(0).float().mean()) - p) < 0.01
    close(layer.probability, torch.sigmoid(layer.score))


# ---- masked layers with the mask -----------------------------------------------------------------


@options
@pytest.mark.parametrize("masks", ["threshold", "sample", 3, None])
def test_masked_layers_compute_what_was_evaluated(options, masks):
    model, x = learning(**options), images()
    model.eval()
    ls.learning.use_masks_(model, {"sample": 0, None: "threshold"}.get(masks, masks))
    expected, chosen = model(x), ls.masks_of(model)
    assert ls.sparsify_(model, learned=masks) is model
    close(model(x), expected)
    assert ls.masks_of(model) == chosen
    assert all(p.requires_grad for p in model.parameters())
    assert type(model[0]) is ls.nn.MaskedConv2d
    fresh = ls.sparsify_(dense())
    fresh.load_state_dict(model.state_dict(), strict=True)
    model.train()
    train(ls.compact_(model), 2)
    assert ls.masks_of(model) == chosen


# ---- networks side by side -----------------------------------------------------------------------


@rounded
@options
def test_networks_side_by_side_are_each_alone(options, round_mask):
    models = [learning(seed=e, round_mask=round_mask, **options) for e in range(3)]
    many = ls.ensemble.replicate(models)
    assert [tuple(layer.key.shape) for layer in layers(many)] == [(3, 3)] * 3
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=2.0, momentum=0.9)
        for m in (many, *models)
    ]
    for step in range(3):
        x = images(step)
        y = many(x)
        y.square().mean((1, 2)).sum().backward()
        for e, model in enumerate(models):
            out = model(x)
            close(y[e], out)
            out.square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    many.eval()
    ls.learning.use_masks_(many, 1)
    x = images(9)
    y = many(x)
    for e, model in enumerate(models):
        one = ls.ensemble.select(many, e)
        ls.learning.use_masks_(model, 1)
        for (name, a), (_, b) in zip(
            one.state_dict().items(), model.state_dict().items(), strict=True
        ):
            close(a, b, msg=name)
        assert torch.equal(layers(one)[0].key, layers(model)[0].key)
        close(one.eval()(x), y[e])


def test_replicate_by_seeds():
    many = ls.ensemble.replicate(learning(weights="signed_constant", init_score=0.3), seeds=[7, 8])
    for e, seed in enumerate((7, 8)):
        layer = layers(ls.ensemble.select(many, e))[1]
        assert layer.key[0] == seed
        assert layer.key[2] == 0
        assert (layer.score == torch.tensor(0.3)).all()
        assert layer.weight.abs().unique().numel() == 1
    assert not torch.equal(layers(many)[1].weight[0], layers(many)[1].weight[1])


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ls.supermask_(dense(), "ones"), ValueError, "weights must be one of init, signed"),
        (lambda: ls.supermask_(dense(), evaluation="mean"), ValueError, "evaluation must be one"),
        (lambda: ls.supermask_(dense(), init_score=float("nan")), ValueError, "a finite number"),
        (lambda: ls.supermask_(nn.ReLU()), ValueError, "no layer to learn a mask"),
        (lambda: ls.nn.SupermaskLinear(3, 4, weights="x"), ValueError, "weights must be one of"),
        (lambda: ls.learning.use_masks_(dense(), "sample"), ValueError, "no supermask layer"),
        (lambda: ls.learning.use_masks_(learning(), "mean"), ValueError, "masks must be sample"),
        (lambda: ls.learning.use_masks_(learning(), -1), ValueError, "a sample has a number"),
        (lambda: ls.learning.use_masks_(learning(), {}), ValueError, "masks must hold 0.weight"),
        (lambda: ls.sparsify_(dense(), learned=1), ValueError, "the model has none"),
        (lambda: ls.supermask_(nn.MultiheadAttention(4, 2)), TypeError, "out_proj cannot learn"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()
