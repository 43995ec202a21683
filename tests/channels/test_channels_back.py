"""drop_channels: the way back, compact layers, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import tolerances
import torch
from channel_problems import batch, close, linear_only, masked, set_masks_, small_conv, train
from torch import nn

import lottery_sparse as ls


def test_without_masks_nothing_goes_and_nothing_is_shared():
    model, x = small_conv().double(), batch()
    before = copy.deepcopy(model.state_dict())
    narrow, channels = ls.channels.drop_channels(model, x)
    assert channels.flop_ratio == 1
    assert torch.equal(narrow(x), model(x))
    train(narrow, "sgd", x)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    ls.densify_(channels.restore_(ls.sparsify_(model), ls.sparsify_(narrow)))
    close(model(x), narrow(x))


def test_masks_and_rounds_go_back():
    model, x = masked("conv", 0.02), batch()
    narrow, channels = ls.channels.drop_channels(model, x)
    kept = {name: mask.clone() for name, mask in ls.masks_of(narrow).items()}
    for mask in kept.values():
        mask[mask.nonzero()[::2].unbind(1)] = False
    ls.set_masks_(narrow, kept)
    names = [id(p) for p in model.parameters()]
    channels.restore_(model, narrow)
    close(model(x), narrow(x))
    assert names == [id(p) for p in model.parameters()]
    at = channels.outputs["2"][:, None], channels.inputs["2"]
    assert torch.equal(ls.masks_of(model)["2.weight"][at], kept["2.weight"])


def test_narrow_twice_and_back_from_another_dtype():
    model, x = masked("conv", 0.05), batch()
    narrow, channels = ls.channels.drop_channels(model, x)
    kept = {
        name: mask & (torch.rand(mask.shape) < 0.3) for name, mask in ls.masks_of(narrow).items()
    }
    narrower, more = ls.channels.drop_channels(set_masks_(narrow, kept), x)
    assert more.flop_before == channels.flop > more.flop
    train(narrower, "adam", x)
    more.restore_(narrow, narrower)
    channels.restore_(model, narrow)
    close(model(x), narrower(x))
    other = copy.deepcopy(model).float()
    channels.restore_(other, narrow)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    tolerances.close(other(x.float()), narrower(x).float())


def test_all_of_it_in_inference_mode_and_channels_last():
    with torch.inference_mode():
        model = masked("conv", 0.02).to(memory_format=torch.channels_last)
        narrow, _ = ls.channels.drop_channels(model, batch())
    assert narrow[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert not narrow[2].weight.is_contiguous()
    assert all(not t.is_inference() for t in [*narrow.parameters(), *narrow.buffers()])
    x = batch()
    assert len(train(narrow, "momentum", x)) == 3


def test_compact_layers_stay_compact():
    model = masked("conv", 0.02).float()
    compact, x = ls.compact_(copy.deepcopy(model)), batch().float()
    compact[8].products = "dense"  # as ls.plan may set for a layer of that size
    narrow, channels = ls.channels.drop_channels(compact, x)
    assert {type(m) for m in narrow if hasattr(m, "weight")} == {
        ls.nn.CompactConv2d,
        ls.nn.CompactLinear,
    }
    plain, other = ls.channels.drop_channels(model, x)
    assert channels.flop == other.flop
    assert all(
        torch.equal(a, b)
        for a, b in zip(narrow.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    assert narrow[8].products == "auto"
    before = copy.deepcopy(compact)
    for (y, _), (expected, _) in zip(
        train(narrow, "ls.optim", x), train(compact, "ls.optim", x), strict=True
    ):
        tolerances.close(y, expected, 3 * tolerances.USUAL)
    channels.restore_(before, narrow)
    tolerances.close(before(x), compact(x), 3 * tolerances.USUAL)


def test_a_single_layer_and_one_activation_used_twice():
    layer = ls.sparsify_(nn.Linear(3, 2))
    assert torch.equal(ls.channels.drop_channels(layer, torch.ones(1, 3))[0].weight, layer.weight)
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
    narrow, _ = ls.channels.drop_channels(model, torch.ones(1, 3))
    assert torch.equal(narrow(torch.ones(1, 3)), model(torch.ones(1, 3)))


class Residual(nn.Module):
    def forward(self, input):
        return input + 1


class OwnForward(nn.Sequential):
    def forward(self, input):
        return super().forward(input).flip(1)


def shared():
    one = nn.Linear(3, 3)
    return nn.Sequential(one, nn.ReLU(), one)


def shared_statistics():
    one = nn.BatchNorm2d(4, affine=False)
    return nn.Sequential(one, nn.Conv2d(4, 4, 1), one)


HOOKS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


def hooked(kind):
    model = nn.Sequential(nn.Linear(3, 3))
    getattr(model[0], f"register_{kind}_hook")(lambda *_: None)
    return model


def hooked_parameter(kind):
    model = nn.Sequential(nn.Linear(3, 3))
    getattr(model[0].weight, f"register_{kind}")(lambda gradient: None)
    return model


def computed():
    model = nn.Sequential(nn.Linear(3, 3))
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].weight = weight
    return model


def patched():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].forward = lambda input: input
    return model


def frozen():
    model = ls.sparsify_(nn.Sequential(nn.Linear(3, 3)))
    masks = {"0.weight": torch.eye(3, dtype=torch.bool)}
    return ls.set_masks_(model, masks, ls.frozen.Constant(0.1))


IMAGE, ROW = torch.ones(1, 4, 5, 5), torch.ones(1, 3)


@pytest.mark.parametrize(
    ("make", "x", "error", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), Residual()), ROW, TypeError, "1 is a Residual"),
        (lambda: OwnForward(nn.Linear(3, 3)), ROW, TypeError, "the model is a OwnForward"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), ROW, TypeError, "1 is a Layer"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), IMAGE, ValueError, "0 has groups=2"),
        (lambda: nn.Sequential(nn.Flatten(2)), IMAGE, TypeError, "dimensions 1 to -1"),
        (lambda: nn.MaxPool2d(2, return_indices=True), IMAGE, TypeError, "indices"),
        (shared, ROW, TypeError, "2 shares its weight with 0"),
        *((lambda h=h: hooked(h), ROW, TypeError, "0 has a hook") for h in HOOKS),
        *(
            (lambda h=h: hooked_parameter(h), ROW, TypeError, "0 has a hook on its weight")
            for h in ("hook", "post_accumulate_grad_hook")
        ),
        (computed, ROW, TypeError, "0 computes its weight"),
        (patched, ROW, TypeError, "0 has a hook or a forward"),
        (lambda: nn.Sequential(nn.MaxPool2d(2)), ROW, ValueError, r"gets \[B, 3\]"),
        (shared_statistics, IMAGE, TypeError, "2 shares its running_mean with 0"),
        (
            lambda: ls.ensemble.replicate(linear_only(), 2),
            torch.ones(1, 3, 12, 12),
            ValueError,
            "ls.ensemble.select",
        ),
        (
            lambda: ls.ensemble.replicate(ls.sparsify_(linear_only()), 2),
            IMAGE,
            ValueError,
            "ls.ensemble.select",
        ),
        (frozen, ROW, ValueError, "0 holds frozen values"),
        (lambda: nn.Linear(3, 3), torch.ones(1, 4), ValueError, r"\[B, 3\].*gets \[B, 4\]"),
        (lambda: nn.Linear(5, 3), IMAGE, ValueError, "needs"),
        (lambda: nn.Conv2d(3, 3, 3), IMAGE, ValueError, "H, W"),
        (lambda: nn.Linear(3, 3), torch.ones(3), ValueError, "input must be"),
        (lambda: nn.Linear(3, 3, device="meta"), ROW, ValueError, "meta"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            ROW,
            TypeError,
            "is a Para",
        ),
    ],
)
def test_refusals(make, x, error, words):
    with pytest.raises(error, match=words):
        ls.channels.drop_channels(make(), x)


def test_the_way_back_refuses_other_models():
    model, x = masked("conv", 0.02), batch()
    narrow, channels = ls.channels.drop_channels(model, x)
    with pytest.raises(ValueError, match="shape"):
        channels.restore_(model, model)
    with pytest.raises(ValueError, match=r"only one has 0\.weight_mask"):
        channels.restore_(model, ls.densify_(copy.deepcopy(narrow)))
    before = copy.deepcopy(model.state_dict())
    train(narrow, "sgd", x)
    channels.state_dict(model, narrow)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"same entries.*0\.0\.bias"):
        channels.restore_(model, nn.Sequential(narrow))
