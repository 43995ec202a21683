"""Layers with learned masks: what they compute, draw, keep in a state_dict, and become."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from problems import TOLERANCE
from torch import nn

import lottery_sparse as ls
from lottery_sparse.ops import sample_mask
from lottery_sparse.supermask import FIRST_SAMPLE

OPTIONS = [{}, {"rescale": True}, {"weights": "signed_constant"}]
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
rounded = pytest.mark.parametrize("round_mask", [False, True])


def dense(seed=0, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular", bias=bias),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 7, bias=bias),
            nn.ReLU(),
            nn.Linear(7, 5),
        )


def learning(seed=0, scatter=True, **changes):
    """A model with learned masks, its scores spread out."""
    model = ls.supermask_(dense(seed), **{"seed": seed, **changes})
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed + 100)
        for layer in layers(model):
            layer.score += scatter * torch.randn(layer.score.shape)
    return model


def layers(model):
    return [m for m in model.modules() if isinstance(m, ls.SupermaskLinear | ls.SupermaskConv2d)]


def images(seed=0, batch=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 4, 4, generator=generator)


def train(model, steps, optimizer=None):
    scores = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(scores, lr=5.0, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        model(images(step)).square().sum(-1).mean().backward()
        optimizer.step()
    return optimizer


# ---- values and gradients ------------------------------------------------------------------------


def straight_through(layer, score, key):
    """The effective weight in float64, by the paper's expression."""
    p = torch.sigmoid(score)
    if layer.round_mask:
        coin = sample_mask(torch.zeros_like(layer.score), key)
        m = torch.where(coin != 0, (p > 0.5).double(), p)
    else:
        m = sample_mask(layer.score, key).detach().double() + p - p.detach()
    w = layer.weight.double() * m
    return w * (m.numel() / m.sum()) if layer.rescale else w


@rounded
@options
def test_a_step_is_the_expression_of_the_paper(options, round_mask):
    for kind, shape, x in [
        (ls.SupermaskLinear, (13, 9), torch.randn(6, 13)),
        (ls.SupermaskConv2d, (4, 6, 3, 2, 1), torch.randn(3, 4, 7, 7)),
    ]:
        layer = kind(*shape, round_mask=round_mask, seed=3, stream=5, **options)
        with torch.no_grad():
            layer.score += torch.randn(layer.score.shape)
            layer.bias += torch.randn(layer.bias.shape)
        for step in range(2):
            key = ls.random.key(3, 5, step)
            assert torch.equal(layer.key, key)
            score, xx = layer.score.detach().double(), x.double().requires_grad_()
            w = straight_through(layer, score.requires_grad_(), key)
            bias = layer.bias.double()
            args = () if kind is ls.SupermaskLinear else (2, 1)
            y = (F.linear if kind is ls.SupermaskLinear else F.conv2d)(xx, w, bias, *args)
            ours = x.clone().requires_grad_()
            got = layer(ours)
            dy = torch.randn(got.shape)
            wanted = torch.autograd.grad(y, (score, xx), dy.double())
            found = torch.autograd.grad(got, (layer.score, ours), dy)
            for a, b in zip((got, *found), (y, *wanted), strict=True):
                scale = b.abs().max()
                assert ((a.double() - b).abs().max() / scale) < 20 * TOLERANCE[torch.float32]


def test_the_gradient_of_a_rounded_weight_is_zero_where_the_coin_says_so():
    layer = ls.SupermaskLinear(30, 20, round_mask=True)
    layer(torch.randn(4, 30)).sum().backward()
    coin = sample_mask(torch.zeros(20, 30), ls.random.key(0, 0, 0)) != 0
    assert torch.equal(layer.score.grad == 0, coin)


def test_only_scores_train():
    model = nn.Sequential(*dense(), nn.BatchNorm1d(5))
    ls.supermask_(model)
    train_names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert train_names == {"0.score", "4.score", "6.score"}
    before = copy.deepcopy(model.state_dict())
    train(model, 2, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1))
    for name, value in model.state_dict().items():
        changed = "score" in name or ("key" in name and "sample" not in name) or "running" in name
        assert torch.equal(value, before[name]) != (changed or "batches" in name), name


def test_a_layer_learns_which_weights_help():
    torch.manual_seed(0)
    layer = ls.SupermaskLinear(20, 3, bias=False)
    x, useful = torch.randn(256, 20), torch.rand(3, 20) < 0.5
    target = F.linear(x, torch.where(useful, layer.weight, 0.0))
    optimizer = torch.optim.SGD([layer.score], lr=300.0, momentum=0.9)
    for _ in range(300):
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
    large = layer.weight.abs() > 0.05  # tiny ones hardly matter
    assert ((layer.score > 0) == useful)[large].float().mean() > 0.95


# ---- construction --------------------------------------------------------------------------------


def test_constructors_are_those_of_torch_with_options_by_name():
    for kind, plain in [(ls.SupermaskLinear, nn.Linear), (ls.SupermaskConv2d, nn.Conv2d)]:
        ours, theirs = inspect.signature(kind).parameters, inspect.signature(plain).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[len(theirs) :])
    torch.manual_seed(0)
    layer = ls.SupermaskLinear(5, 3, init_score=-1.5, dtype=torch.float64)
    torch.manual_seed(0)
    assert torch.equal(layer.weight, nn.Linear(5, 3, dtype=torch.float64).weight)
    assert (layer.bias == 0).all()
    assert layer.score.dtype == torch.float64
    assert (layer.score == -1.5).all()
    assert ls.SupermaskConv2d(2, 3, 3, bias=False).bias is None
    assert "weights=init, expected_density=0.1824" in repr(layer)


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


def test_signed_constants_have_one_magnitude_per_layer():
    model, plain = ls.supermask_(dense(), "signed_constant"), dense()
    for layer, old in zip(layers(model), (plain[0], plain[4], plain[6]), strict=True):
        std = old.weight.detach().double().std(correction=0)
        torch.testing.assert_close(layer.weight.double(), old.weight.sign().double() * std)


def test_filter_leaves_layers_out():
    model = ls.supermask_(dense(), filter_fn=lambda module, name: name != "6")
    assert type(model[6]) is nn.Linear
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.score", "4.score"]


def test_from_the_meta_device():
    with torch.device("meta"):
        model = ls.supermask_(dense(), seed=4, init_score=0.5)
    model = model.to_empty(device="cpu")
    expected = ls.supermask_(dense(), seed=4, init_score=0.5)
    for a, b in zip(layers(model), layers(expected), strict=True):
        assert torch.equal(a.key, b.key)
        assert torch.equal(a.sample_key, b.sample_key)
        assert torch.equal(a.score, b.score)


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
    ls.use_masks_(model, "threshold")
    assert torch.equal(model(x), model(x))
    assert ls.masks_of(model) == ls.Masks(
        {n.replace("score", "weight"): s > 0 for n, s in model.named_parameters() if "score" in n}
    )
    ls.use_masks_(model, 5)
    fifth, masks = model(x), ls.masks_of(model)
    ls.use_masks_(model, "sample")
    samples = [model(x) for _ in range(6)]
    assert torch.equal(samples[5], fifth)
    ls.use_masks_(model, masks)
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
    ls.use_masks_(model, "threshold")
    before = model(x)
    outputs = [(masks, model(x)) for masks in ls.sampled(model, 4)]
    assert torch.equal(model(x), before)
    assert len({tuple(y.flatten().tolist()) for _, y in outputs}) == 4
    for i, (masks, y) in enumerate(outputs):
        ls.use_masks_(model, i)
        assert torch.equal(model(x), y)
        assert ls.masks_of(model) == masks
    ls.use_masks_(model, "threshold")
    for _ in ls.sampled(model, 4):
        break
    assert torch.equal(model(x), before)


def test_densities():
    layer = ls.SupermaskLinear(300, 200, init_score=-1.0)
    p = 1 / (1 + 2.718281828**1)
    assert layer.expected_density == pytest.approx(p, abs=1e-6)
    assert abs(float(layer.sample(0).float().mean()) - p) < 0.01
    torch.testing.assert_close(layer.probability, torch.sigmoid(layer.score))


# ---- state ---------------------------------------------------------------------------------------


@rounded
def test_saved_and_resumed_is_the_same_to_the_bit(round_mask):
    whole, first = (learning(round_mask=round_mask) for _ in range(2))
    train(whole, 6)
    optimizer = train(first, 3)
    model, state = first.state_dict(), optimizer.state_dict()
    second = learning(seed=0, round_mask=round_mask, scatter=False)
    assert second.load_state_dict(copy.deepcopy(model), strict=True)
    scores = [p for p in second.parameters() if p.requires_grad]
    resumed = torch.optim.SGD(scores, lr=5.0, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(state))
    for step in range(3, 6):
        resumed.zero_grad()
        second(images(step)).square().sum(-1).mean().backward()
        resumed.step()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_state_dict_without_scores_does_not_load():
    with pytest.raises(RuntimeError, match="Missing key"):
        learning().load_state_dict(dense().state_dict())


def test_copies_draw_alike_and_apart():
    model = learning()
    model(images())
    twin = copy.deepcopy(model)
    assert torch.equal(model(images()), twin(images()))
    model(images())
    assert layers(model)[0].key[2] == layers(twin)[0].key[2] + 1


def test_dtypes_and_autocast():
    model = learning().double()
    assert model(images().double()).dtype == torch.float64
    assert layers(model)[0].key.dtype == torch.int64
    with torch.autocast("cpu", torch.bfloat16):
        y = learning()(images())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


@rounded
def test_compiled_steps_are_the_eager_ones(round_mask):
    eager, traced = (learning(rescale=True, round_mask=round_mask) for _ in range(2))
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for step in range(3):
        x = images(step)
        a, b = eager(x), compiled(x)
        torch.testing.assert_close(a, b)
        a.square().mean().backward()
        b.square().mean().backward()
    for one, two in zip(layers(eager), layers(traced), strict=True):
        assert torch.equal(one.key, two.key)
        torch.testing.assert_close(one.score.grad, two.score.grad)


# ---- masked layers with the mask -----------------------------------------------------------------


@options
@pytest.mark.parametrize("masks", ["threshold", "sample", 3, None])
def test_masked_layers_compute_what_was_evaluated(options, masks):
    model, x = learning(**options), images()
    model.eval()
    ls.use_masks_(model, {"sample": 0, None: "threshold"}.get(masks, masks))
    expected, chosen = model(x), ls.masks_of(model)
    assert ls.masked_(model, masks) is model
    torch.testing.assert_close(model(x), expected)
    assert ls.masks_of(model) == chosen
    assert all(p.requires_grad for p in model.parameters())
    assert type(model[0]) is ls.MaskedConv2d
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
    many = ls.replicate(models)
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
            torch.testing.assert_close(y[e], out, rtol=1e-4, atol=1e-5)
            out.square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    many.eval()
    ls.use_masks_(many, 1)
    x = images(9)
    y = many(x)
    for e, model in enumerate(models):
        one = ls.select(many, e)
        for (name, a), (_, b) in zip(
            one.state_dict().items(), model.state_dict().items(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(layers(one)[0].key, layers(model)[0].key)
        torch.testing.assert_close(one.eval()(x), y[e], rtol=1e-4, atol=1e-5)


def test_replicate_by_seeds():
    many = ls.replicate(learning(weights="signed_constant", init_score=0.3), seeds=[7, 8])
    for e, seed in enumerate((7, 8)):
        layer = layers(ls.select(many, e))[1]
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
        (lambda: ls.supermask_(nn.ReLU()), ValueError, "no nn.Linear or nn.Conv2d to learn a mask"),
        (lambda: ls.SupermaskLinear(3, 4, weights="x"), ValueError, "weights must be one of"),
        (lambda: ls.use_masks_(dense(), "sample"), ValueError, "no supermask layer; call ls.super"),
        (lambda: ls.use_masks_(learning(), "mean"), ValueError, "masks must be sample or thresh"),
        (lambda: ls.use_masks_(learning(), -1), ValueError, "a sample has a number, at least 0"),
        (lambda: ls.use_masks_(learning(), {}), ValueError, "masks must hold 0.weight of shape"),
        (lambda: ls.masked_(dense()), ValueError, "no supermask layer"),
        (lambda: ls.supermask_(nn.MultiheadAttention(4, 2)), TypeError, "out_proj cannot learn"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_shared_weights_are_refused_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(TypeError, match="0 cannot learn a mask: its weight is shared"):
        ls.supermask_(model)
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
