"""Layers with learned masks: what they compute, draw, and keep in a state_dict."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from supermask_models import dense, images, layers, learning, options, rounded, train
from tolerances import close
from torch import nn

import lottery_sparse as ls
from lottery_sparse.ops import sample_mask

pytestmark = pytest.mark.numeric

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
        (ls.nn.SupermaskLinear, (13, 9), torch.randn(6, 13)),
        (ls.nn.SupermaskConv2d, (4, 6, 3, 2, 1), torch.randn(3, 4, 7, 7)),
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
            args = () if kind is ls.nn.SupermaskLinear else (2, 1)
            y = (F.linear if kind is ls.nn.SupermaskLinear else F.conv2d)(xx, w, bias, *args)
            ours = x.clone().requires_grad_()
            got = layer(ours)
            dy = torch.randn(got.shape)
            wanted = torch.autograd.grad(y, (score, xx), dy.double())
            found = torch.autograd.grad(got, (layer.score, ours), dy)
            for a, b in zip((got, *found), (y, *wanted), strict=True):
                close(a.double(), b, dtype=torch.float32)


def test_the_gradient_of_a_rounded_weight_is_zero_where_the_coin_says_so():
    layer = ls.nn.SupermaskLinear(30, 20, round_mask=True)
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
    layer = ls.nn.SupermaskLinear(20, 3, bias=False)
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
    for kind, plain in [(ls.nn.SupermaskLinear, nn.Linear), (ls.nn.SupermaskConv2d, nn.Conv2d)]:
        ours, theirs = inspect.signature(kind).parameters, inspect.signature(plain).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[len(theirs) :])
    torch.manual_seed(0)
    layer = ls.nn.SupermaskLinear(5, 3, init_score=-1.5, dtype=torch.float64)
    torch.manual_seed(0)
    assert torch.equal(layer.weight, nn.Linear(5, 3, dtype=torch.float64).weight)
    assert (layer.bias == 0).all()
    assert layer.score.dtype == torch.float64
    assert (layer.score == -1.5).all()
    assert ls.nn.SupermaskConv2d(2, 3, 3, bias=False).bias is None
    assert "weights=init, expected_density=0.1824" in repr(layer)


def test_signed_constants_have_one_magnitude_per_layer():
    model, plain = ls.supermask_(dense(), "signed_constant"), dense()
    for layer, old in zip(layers(model), (plain[0], plain[4], plain[6]), strict=True):
        std = old.weight.detach().double().std(correction=0)
        close(layer.weight.double(), old.weight.sign().double() * std, dtype=torch.float32)


def test_from_the_meta_device():
    with torch.device("meta"):
        model = ls.supermask_(dense(), seed=4, init_score=0.5)
    model = model.to_empty(device="cpu")
    expected = ls.supermask_(dense(), seed=4, init_score=0.5)
    for a, b in zip(layers(model), layers(expected), strict=True):
        assert torch.equal(a.key, b.key)
        assert torch.equal(a.sample_key, b.sample_key)
        assert torch.equal(a.score, b.score)


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
        close(a, b)
        a.square().mean().backward()
        b.square().mean().backward()
    for one, two in zip(layers(eager), layers(traced), strict=True):
        assert torch.equal(one.key, two.key)
        close(one.score.grad, two.score.grad)


# ---- the choice of use_masks_ --------------------------------------------------------------------


def by_state_dict(model):
    other = learning(seed=5).eval()
    ls.learning.use_masks_(other, 2)  # whatever it evaluated with before
    other.load_state_dict(model.state_dict(), strict=True)
    return other


def by_assignment(model):
    other = learning(seed=5).eval()
    other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True, assign=True)
    return other


def by_safetensors(model):
    other = learning(seed=5).eval()
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(model.state_dict())))
    return other


def by_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


ROUND_TRIPS = [by_state_dict, by_assignment, by_safetensors, by_file, copy.deepcopy]


@pytest.mark.parametrize("round_trip", ROUND_TRIPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("choice", ["sample", "threshold", 3, "masks"])
def test_the_choice_of_masks_is_saved(choice, round_trip):
    model = learning().eval()
    masks = {n: torch.rand(m.shape) < 0.3 for n, m in ls.masks_of(model).items()}
    ls.learning.use_masks_(model, masks if choice == "masks" else choice)
    other, x = round_trip(model), images()
    assert ls.masks_of(other) == ls.masks_of(model)
    assert torch.equal(other(x), model(x))
    assert torch.equal(other(x), model(x))  # also the second sample
    train(other, 1)  # and it goes on training
    assert [layer.evaluation for layer in layers(other)] == [
        "threshold" if choice == "threshold" else "sample"
    ] * 3


def test_a_state_dict_without_the_choice_loads_and_leaves_it():
    """Those of versions before it was saved."""
    state = {n: v for n, v in learning(seed=1).state_dict().items() if "evaluates_with" not in n}
    for choice in ("threshold", 3):
        model = ls.learning.use_masks_(learning(), choice)
        held = [layer.held_mask for layer in layers(model)]
        assert model.load_state_dict(state, strict=True)
        for layer, mask in zip(layers(model), held, strict=True):
            assert layer.held_mask is mask
            assert layer.evaluation == ("threshold" if choice == "threshold" else "sample")


def test_the_state_dict_of_a_choice_runs_functionally():
    model, x = ls.learning.use_masks_(learning().eval(), 3), images()
    y = torch.func.functional_call(learning().eval(), model.state_dict(), x)
    assert torch.equal(y, model(x))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("4.held_mask", torch.ones(2, 2, dtype=torch.bool), r"has shape \(2, 2\), .*7, 16"),
        ("4.held_mask", torch.full((7, 16), 2), "4.held_mask"),
        ("4.evaluates_with", torch.tensor(9, dtype=torch.uint8), "4.evaluates_with is 9, .*newer"),
        ("4.evaluates_with", torch.ones(3), "4.evaluates_with"),
        ("4.evaluates_with", torch.ones(9999), r"is \[1.0, .*… \(49,795 more characters\), but"),
    ],
)  # fmt: skip
def test_a_choice_that_cannot_be_is_refused_and_changes_nothing(name, value, message):
    model = ls.learning.use_masks_(learning(), 3)
    before = copy.deepcopy(model.state_dict())
    state = ls.learning.use_masks_(learning(seed=1), 4).state_dict()
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state | {name: value})
    for entry, kept in model.state_dict().items():
        if entry.startswith("4."):
            assert torch.equal(kept, before[entry]), entry


def test_to_empty_holds_no_mask():
    model = ls.learning.use_masks_(learning(), 3).to("meta").to_empty(device="cpu")
    assert all(layer.held_mask is None for layer in layers(model))


@pytest.mark.parametrize(
    "change", [{"evaluation": "threshold"}, {"rescale": True}, {"round_mask": True}], ids=str
)
def test_networks_that_differ_in_how_they_use_masks_do_not_go_side_by_side(change):
    with pytest.raises(ValueError, match=f"differ in {next(iter(change))}"):
        ls.ensemble.replicate([learning(), learning(**change)])
