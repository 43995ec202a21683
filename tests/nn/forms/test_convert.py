"""sparsify_ on whole models; the way back is in test_densify.py."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from tolerances import close
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


def effective(model):
    return {name: value.clone() for name, value in ls.dense_state_dict(model).items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# ---- sparsify_ ---------------------------------------------------------------------------------


def test_sparsify_changes_the_class_and_nothing_else():
    model = network().double().eval()
    model[0].requires_grad_(False)
    model[4].note = "mine"
    seen = []
    model[4].register_forward_hook(lambda *_: seen.append("forward"))
    model[4].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[4].register_full_backward_hook(lambda *_: seen.append("backward"))
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    state, x = effective(model), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    y = model(x).detach()
    seen.clear()

    assert ls.sparsify_(model) is model
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert (type(model[0]), type(model[4])) == (ls.nn.MaskedConv2d, ls.nn.MaskedLinear)
    assert not any(module.training for module in model.modules())
    assert not model[0].weight.requires_grad
    assert model[4].note == "mine"
    same(ls.dense_state_dict(model), state)
    close(model(x), y)
    model(x).sum().backward()
    assert seen[-3:] == ["before", "forward", "backward"]
    assert ls.masks_of(model).density == 1
    assert model[4].weight_mask.device == model[4].weight.device


def test_an_optimizer_built_before_stays_valid():
    def train(sparsify_at):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for step in range(6):
            if step == sparsify_at:
                ls.sparsify_(model)
            optimizer.zero_grad()
            model(torch.randn(4, 1, 4, 4)).square().sum().backward()
            optimizer.step()
        return effective(model)

    dense, masked = train(None), train(3)
    for name in dense:
        close(masked[name], dense[name])


def test_biases_and_normalisation_are_never_masked():
    model = ls.sparsify_(network())
    assert list(ls.masks_of(model)) == ["0.weight", "4.weight"]
    assert type(model[1]) is nn.BatchNorm2d


def test_filter_fn():
    asked = []

    def only_linear(module, name):
        asked.append((type(module), name))
        return name == "4"

    model = ls.sparsify_(network(), only_linear)
    assert asked == [(nn.Conv2d, "0"), (nn.Linear, "4")]
    assert type(model[0]) is nn.Conv2d
    assert list(ls.masks_of(model)) == ["4.weight"]


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv2d(2, 3, 3)])
def test_the_model_may_be_one_layer(layer):
    assert list(ls.masks_of(ls.sparsify_(layer))) == ["weight"]


def test_sparsify_twice_keeps_masks():
    model = ls.sparsify_(network())
    ls.set_masks_(model, half(model), ls.frozen.Constant())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ls.sparsify_(model)
    same(model.state_dict(), before)


# ---- tied weights --------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, embedding=False):
        super().__init__()
        self.a = nn.Embedding(6, 6) if embedding else nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).tanh())


def test_tied_linears_share_one_mask():
    model = ls.sparsify_(Tied())
    masks = half(model)
    assert list(masks) == ["a.weight"]
    ls.set_masks_(model, masks, ls.frozen.Constant(0.5))
    assert model.a.weight is model.b.weight
    for layer in (model.a, model.b):
        assert torch.equal(layer.weight_mask, masks["a.weight"])
    assert torch.equal(model.a.effective_weight, model.b.effective_weight)
    model(torch.randn(3, 6)).sum().backward()
    assert (model.a.weight.grad[~masks["a.weight"]] == 0).all()
    state = model.state_dict()
    again = ls.sparsify_(Tied())
    again.load_state_dict(state)
    same(again.state_dict(), state)
    Tied().load_state_dict(ls.dense_state_dict(model))
    dense = ls.densify_(model)
    assert dense.a.weight is dense.b.weight


@pytest.mark.parametrize("masked_first", ["a", "b"])
def test_a_mask_that_is_set_reaches_a_layer_tied_later(masked_first):
    model = ls.sparsify_(Tied())
    masks = half(model)
    ls.set_masks_(model, masks, ls.frozen.Constant(0.5))
    other = {"a": "b", "b": "a"}[masked_first]
    setattr(model, other, nn.Linear(6, 6))
    getattr(model, other).weight = getattr(model, masked_first).weight
    ls.sparsify_(model)
    for layer in (model.a, model.b):
        assert torch.equal(layer.weight_mask, masks["a.weight"])
    assert torch.equal(model.a.effective_weight, model.b.effective_weight)
    assert (model.a.effective_weight[~masks["a.weight"]].abs() == 0.5).all()


def test_a_weight_tied_with_an_embedding_is_skipped():
    model = Tied(embedding=True)
    with pytest.warns(UserWarning, match=r"skipped b: its weight is shared with a \(Embedding\)"):
        ls.sparsify_(model)
    assert type(model.b) is nn.Linear


def test_a_weight_tied_with_a_layer_left_out_is_skipped():
    with pytest.warns(UserWarning, match=r"skipped b: its weight is shared with a \(Linear\)"):
        ls.sparsify_(Tied(), lambda module, name: name == "b")


def test_one_module_under_two_names():
    layer = nn.Linear(4, 4)
    model = ls.sparsify_(nn.Sequential(layer, nn.Tanh(), layer))
    masks = half(model)
    assert list(masks) == ["0.weight"]
    ls.set_masks_(model, masks)
    other = nn.Linear(4, 4)
    nn.Sequential(other, nn.Tanh(), other).load_state_dict(ls.dense_state_dict(model))
    assert torch.equal(other.weight, model[0].effective_weight)
    model.load_state_dict(model.state_dict())
    assert torch.equal(model[0].weight_mask, masks["0.weight"])


@pytest.mark.parametrize(
    "verb", [ls.compact_, ls.densify_, ls.pack_, ls.dense_state_dict], ids=lambda v: v.__name__
)
@pytest.mark.parametrize("buffer", ["weight_mask", "weight_frozen"])
def test_two_masks_for_one_weight_are_refused(verb, buffer):
    model = ls.sparsify_(Tied())
    masks = half(model)
    ls.set_masks_(model, masks, torch.ones(6, 6))
    setattr(model.b, buffer, torch.zeros_like(getattr(model.b, buffer)))  # nothing of ours does
    with pytest.raises(ValueError, match=r"a\.weight and b\.weight are one weight under two masks"):
        verb(model)
    assert type(model.a) is ls.nn.MaskedLinear
    verb(ls.set_masks_(model, masks))


# ---- weights that are read without their layer being called (design D16) ------------------------


def names_skipped(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ls.sparsify_(model)
    return [str(w.message).removeprefix("sparsify_ skipped ").split(":")[0] for w in caught]


def zero_everything(model):
    masks = {name: torch.zeros_like(mask) for name, mask in ls.masks_of(model).items()}
    with pytest.warns(UserWarning, match="layer collapse"):
        ls.set_masks_(model, masks)


class Block(nn.Module):
    """An attention, an encoder layer (its fast path in eval) and plain layers around them."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2
        )
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.after = nn.Linear(8, 3)

    def forward(self, x):
        h = self.before(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = self.decoder(self.encoder(h), h)
        return self.after(h)


def test_transformers_name_what_they_skip():
    model = Block()
    assert set(names_skipped(model)) == {
        "attention.out_proj",
        *(f"encoder.layers.{i}.{n}" for i in (0, 1) for n in ("linear1", "linear2")),
        *(f"encoder.layers.{i}.self_attn.out_proj" for i in (0, 1)),
        "decoder.self_attn.out_proj",
        "decoder.multihead_attn.out_proj",
    }
    assert list(ls.masks_of(model)) == [
        "before.weight", "decoder.linear1.weight", "decoder.linear2.weight", "after.weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "way_out"),
    [
        (nn.MultiheadAttention(4, 2), "an attention module that calls nn.Linear layers"),
        (nn.TransformerEncoderLayer(4, 2, 8), "an encoder layer that calls them"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_warning_says_why_and_what_to_do(layer, way_out):
    kind = type(layer).__name__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ls.sparsify_(layer)
    said = [str(w.message) for w in caught if f"nn.{kind} reads its weight" in str(w.message)]
    assert len(said) == {"MultiheadAttention": 1, "TransformerEncoderLayer": 2}[kind]
    for text in said:
        assert "without calling it, so a mask would not hold; to mask it, use " in text
        assert way_out in text
        assert text.endswith("or leave it out with filter_fn.")


def test_no_raw_weight_escapes_in_training_or_on_the_fast_path():
    model, x = Block(), torch.randn(2, 5, 4)
    names_skipped(model)
    ls.set_masks_(model, half(model))
    with torch.no_grad():  # whatever pruned entries hold
        for module in model.modules():
            if hasattr(module, "weight_mask"):
                module.weight[~module.weight_mask] = 1e6
        fast, slow = model.eval()(x), model.train()(x)
    close(fast, slow)
    zero_everything(model)
    for training in (True, False):
        with torch.no_grad():
            y = model.train(training)(x)
        assert torch.equal(y, model.after.bias.expand_as(y)), "the bias path"


@pytest.mark.parametrize("nested", [False, True])
def test_masking_an_encoder_layer_leaves_the_bias_path(nested):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 3)) if nested else layer
    assert len(names_skipped(model)) == 3
    assert list(ls.masks_of(model)) == (["1.weight"] if nested else [])
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        close(model.eval()(x), model.train()(x))
    if nested:
        zero_everything(model)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), model[1].bias.expand(2, 5, 3))


def test_a_layer_of_a_transformer_registered_under_another_name_too():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.alias, self.encoder = encoder.linear1, encoder

    assert names_skipped(Alias()) == ["alias", "encoder.self_attn.out_proj", "encoder.linear2"]


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch < 2.13")
def test_linear_cross_entropy_reads_its_weight():
    loss = nn.LinearCrossEntropyLoss(5, 10)
    assert names_skipped(loss) == ["linear"]


# ---- what is refused ----------------------------------------------------------------------------


class Custom(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.abs())


def replaced_forward():
    layer = nn.Linear(3, 4)
    original = layer.forward
    layer.forward = lambda x: original(x) + 1
    return layer


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "Parametrized"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 4)), "Parametrized"),
        (
            lambda: torch_prune.custom_from_mask(
                nn.Linear(3, 4), "weight", torch.full((4, 3), 0.5)
            ),
            "must hold only 0 and 1",
        ),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(2, 3, 3)), "weight is computed"),
        (lambda: nn.LazyLinear(4), "no shape yet; run one forward first"),
        (lambda: nn.LazyConv2d(4, 3), "no shape yet; run one forward first"),
        (lambda: Custom(3, 4), "Custom is a subclass with behaviour of its own"),
        (replaced_forward, "its forward was replaced on the instance"),
    ],
    ids=["weight_norm", "orthogonal", "prune", "spectral", "lazy", "lazy2d", "subclass", "forward"],
)
def test_layers_that_cannot_be_masked_are_skipped_with_a_sentence(layer, why):
    model = nn.Sequential(layer(), nn.Linear(4, 2))
    kind = type(model[0])
    with pytest.warns(UserWarning, match=rf"sparsify_ skipped 0: .*{why}.*\.") as caught:
        ls.sparsify_(model)
    assert len(caught) == 1
    assert type(model[0]) is kind
    assert list(ls.masks_of(model)) == ["1.weight"]
    ls.sparsify_(model, lambda module, name: name != "0")  # a filter that says so: no warning


def test_a_lazy_layer_can_be_masked_once_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(4))
    model(torch.randn(2, 3))
    assert ls.masks_of(ls.sparsify_(model)).total == 12
