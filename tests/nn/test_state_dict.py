"""state_dict of masked layers: dense checkpoints in, masked ones round, and nothing half-loaded."""

from __future__ import annotations

import copy
import io
import json
import warnings

import pytest
import torch
from safetensors.torch import load_model, save_model
from tolerances import close
from torch import nn
from torch.nn.utils import prune as torch_prune

import lottery_sparse as ls

SOURCES = {
    "zero": "zero",
    "tensor": torch.linspace(-1, 1, 42).view(6, 7),
    "constant": ls.frozen.Constant(0.25),
    "constant of the layer": ls.frozen.Constant(),
    "normal": ls.frozen.Seeded("normal", seed=3),
    "sign": ls.frozen.Seeded("sign", seed=2**64 - 1, std=0.1, stream=7),
}


def layer(frozen="zero", seed=0):
    torch.manual_seed(seed)
    new = ls.nn.MaskedLinear(7, 6)
    return ls.set_masks_(new, {"weight": torch.rand(6, 7) < 0.5}, SOURCES[frozen])


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_checkpoint_loads_strictly(assign):
    dense, new = nn.Linear(7, 6), layer("constant")
    with pytest.warns(UserWarning, match="now keeps 100.0%"):
        new.load_state_dict(dense.state_dict(), assign=assign)
    assert new.weight_mask.all()
    assert "weight_frozen" not in new.state_dict()
    assert torch.equal(new.effective_weight, dense.weight)
    close(new(torch.ones(2, 7)), dense(torch.ones(2, 7)))


def test_weight_is_the_effective_weight():
    new = layer("tensor")
    with torch.no_grad():
        new.weight[~new.weight_mask] = float("nan")
    state = new.state_dict()
    assert list(state) == ["weight", "bias", "weight_mask", "weight_frozen"]
    assert torch.equal(state["weight"], new.effective_weight)
    assert state["weight_mask"].dtype == torch.bool
    assert torch.equal(state["weight_frozen"], SOURCES["tensor"])
    assert not any(value.requires_grad for value in state.values())
    assert new.state_dict(keep_vars=True)["weight"].requires_grad


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("frozen", SOURCES)
def test_round_trip(frozen, assign):
    old, new = layer(frozen), layer("normal", seed=1)
    mask, parameter = new.weight_mask, new.weight
    file = io.BytesIO()
    torch.save(old.state_dict(), file)
    file.seek(0)
    new.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    same(new.state_dict(), old.state_dict())
    assert torch.equal(new.effective_weight, old.effective_weight)
    if not assign:
        assert new.weight_mask is mask, "compiled models keep their graph"
        assert new.weight is parameter
    x = torch.randn(3, 7)
    assert torch.equal(new(x), old(x))
    again = layer("tensor", seed=2)
    again.load_state_dict(new.state_dict())
    same(again.state_dict(), old.state_dict())


@pytest.mark.parametrize(
    ("frozen", "descriptor"),
    [
        ("constant", {"source": "sign_constant", "constant": 0.25}),
        ("sign", {"source": "seeded", "law": "sign", "seed": 2**64 - 1, "std": 0.1, "stream": 7}),
    ],
)
def test_descriptors_are_json_bytes(frozen, descriptor):
    entry = layer(frozen).state_dict()["weight_frozen"]
    assert entry.dtype == torch.uint8
    assert entry.dim() == 1
    assert json.loads(bytes(entry.tolist())) == descriptor


def test_other_dtypes_convert_on_load():
    old = layer("tensor")
    new = ls.nn.MaskedLinear(7, 6, dtype=torch.float64)
    new.load_state_dict(old.state_dict())
    assert new.weight_frozen.dtype == torch.float64
    assert torch.equal(new.effective_weight, old.effective_weight.double())
    new.load_state_dict(layer("constant").half().state_dict(), assign=True)
    assert new.weight.dtype == new.weight_frozen.dtype == torch.float16


def test_numeric_masks_load():
    state = layer().state_dict()
    new = ls.nn.MaskedLinear(7, 6)
    new.load_state_dict(state | {"weight_mask": state["weight_mask"].float()}, assign=True)
    assert new.weight_mask.dtype == torch.bool
    assert torch.equal(new.weight_mask, state["weight_mask"])


def test_parts_of_a_checkpoint():
    new, before = layer("constant"), copy_of(layer("constant").state_dict())
    missing, unexpected = new.load_state_dict({}, strict=False)
    assert (set(missing), unexpected) == ({"weight", "bias"}, [])
    same(new.state_dict(), before)
    new.load_state_dict({"bias": torch.zeros(6)}, strict=False)
    assert torch.equal(new.weight_mask, before["weight_mask"])
    mask = torch.arange(42).view(6, 7) % 2
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        new.load_state_dict({"weight_mask": mask})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_signs"'):
        new.load_state_dict(layer().state_dict() | {"weight_signs": torch.zeros(1)})


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("frozen", SOURCES)
def test_a_mask_without_its_weight_is_not_taken(frozen, compact):
    new = nn.Sequential(layer(frozen))
    if compact:
        ls.compact_(new)
    before = copy_of(new.state_dict())
    alone = {"0.weight_mask": ~new[0].weight_mask, "0.bias": torch.zeros(6)}
    for state in alone, alone | {"0.weight_frozen": torch.ones(6, 7)}:
        missing, unexpected = new.load_state_dict(state, strict=False)
        assert missing == ["0.weight"]
        assert set(unexpected) == state.keys() - {"0.bias"}
        same(new.state_dict(), before | {"0.bias": torch.zeros(6)})


def test_a_computed_weight_comes_with_its_source():
    old, new = (nn.utils.parametrizations.weight_norm(layer(s)) for s in ("zero", "constant"))
    new.load_state_dict(old.state_dict())
    assert torch.equal(new.effective_weight, old.effective_weight)
    assert "weight_frozen" not in new.state_dict()


@pytest.mark.parametrize("compact", [False, True])
def test_frozen_values_alone_are_reported_as_unused(compact):
    new = nn.Sequential(layer("tensor"))
    if compact:
        ls.compact_(new)
    before = new[0].effective_weight.detach().clone()
    missing, unexpected = new.load_state_dict({"0.weight_frozen": torch.ones(6, 7)}, strict=False)
    assert (set(missing), unexpected) == ({"0.weight", "0.bias"}, ["0.weight_frozen"])
    assert torch.equal(new[0].effective_weight, before)


def descriptor(**fields):
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": torch.zeros(7, 6)},
            r"size mismatch for 0\.weight: the checkpoint has \(7, 6\)",
        ),
        ({"weight_mask": torch.ones(7, 6)}, r"mask of 0\.weight has shape \(7, 6\).*\(6, 7\)"),
        ({"weight_mask": torch.full((6, 7), 0.5)}, r"mask of 0\.weight must hold only 0 and 1"),
        ({"weight_frozen": torch.zeros(7, 6)}, r"frozen values of 0\.weight must be"),
        ({"weight_frozen": torch.zeros(6, 7).long()}, r"frozen values of 0\.weight must be"),
        ({"weight_frozen": descriptor(source="moon")}, "descriptor this version cannot read"),
        ({"weight_frozen": descriptor(source="seeded", law="x", seed=1)}, "law must be one of"),
        ({"weight_frozen": descriptor(source="seeded", phase=1)}, "cannot read.*phase"),
        ({"weight_frozen": descriptor(source="sign_constant", constant=-1)}, "a magnitude"),
        ({"weight_frozen": torch.tensor([1, 255], dtype=torch.uint8)}, "cannot read"),
        ({"weight_frozen": descriptor()}, "cannot read"),
    ],
    ids=range(11),
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_wrong_checkpoint_leaves_the_layer_untouched(changes, message, assign):
    model = nn.Sequential(layer("constant"))
    before = copy_of(model.state_dict())
    weight = model[0].weight
    state = layer("normal", seed=1).state_dict() | changes
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({f"0.{n}": v for n, v in state.items()}, assign=assign)
    same(model.state_dict(), before)
    assert model[0].weight is weight


def test_nested_names():
    model = nn.ModuleDict({"block": nn.Sequential(layer("constant"), nn.BatchNorm1d(6))})
    state = model.state_dict()
    assert "block.0.weight_frozen" in state
    other = nn.ModuleDict({"block": nn.Sequential(layer(seed=1), nn.BatchNorm1d(6))})
    other.load_state_dict(state)
    same(other.state_dict(), state)


def test_optimizers_load_beside_it():
    model = layer("constant")
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    other = layer("zero", seed=1)
    loaded = torch.optim.Adam(other.parameters())
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((model, optimizer), (other, loaded)):
        opt.zero_grad()
        net(torch.ones(2, 7)).square().sum().backward()
        opt.step()
    same(model.state_dict(), other.state_dict())


# ---- masks that a checkpoint takes away ----------------------------------------------------------


def nested(forms=(), keep=0.25):
    """Three masked layers of 120 weights, two of them pruned, one of those in a block."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    model = ls.sparsify_(nn.Sequential(nn.Linear(4, 5), block, nn.Linear(8, 8)))
    masks = {n: torch.arange(m.numel()).view(m.shape) < keep * m.numel()
             for n, m in ls.masks_of(model).items() if n != "2.weight"}  # fmt: skip
    ls.set_masks_(model, masks)
    return model


def dense_state(model):
    return {name: value + 1 for name, value in ls.dense_state_dict(model).items()}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["plain", "wrapped"])
def test_a_load_that_takes_masks_away_says_so_once(wrap, assign):
    model = wrap(nested())
    with pytest.warns(UserWarning, match="holds no mask") as caught:
        model.load_state_dict(dense_state(model), assign=assign)
    (warning,) = caught
    assert warning.filename == __file__, "the line that loads"
    text = str(warning.message)
    assert "no mask of" in text
    assert "0.weight and 1 more, so" in text
    assert "kept 63.7% of 124 weights and now keeps 100.0%" in text
    assert ls.masks_of(model).density == 1
    model.load_state_dict(dense_state(model))  # nothing to take


def test_a_load_of_a_part_or_of_some_masks_counts_what_it_takes():
    model = nested()
    with pytest.warns(UserWarning, match=r"no mask of weight, so .* 25\.0% of 40 .* keeps 100\.0%"):
        model[1][0].load_state_dict(nn.Linear(5, 8).state_dict())
    model, state = nested(), dense_state(nested())
    state["0.weight_mask"] = torch.ones(5, 4)
    with pytest.warns(UserWarning, match=r"no mask of 1\.0\.weight, so .* 63\.7% of 124 "):
        model.load_state_dict(state)
    model = nested()
    del state["1.0.weight"]  # what a state_dict does not name stays
    model.load_state_dict(state, strict=False)
    assert 0.75 < ls.masks_of(model).density < 0.76


def test_loads_that_keep_masks_or_say_that_all_is_kept_are_silent():
    model = nested()
    model.load_state_dict(copy_of(model.state_dict()))
    w_init = copy_of(ls.sparsify_(nn.Sequential(nn.Linear(4, 5))).state_dict())
    pruned = ls.sparsify_(nn.Sequential(nn.Linear(4, 5)))
    ls.set_masks_(pruned, {"0.weight": torch.eye(5, 4)})
    pruned.load_state_dict(w_init)  # README's rewinding: of a masked model, with its masks
    assert pruned[0].density == 1


def test_a_warning_that_is_an_error_comes_before_the_first_write():
    model = nested()
    before = copy_of(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="holds no mask"):
            model.load_state_dict(dense_state(model))
    same(model.state_dict(), before)


# ---- checkpoints of torch.nn.utils.prune ---------------------------------------------------------


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Sequential(nn.Linear(36, 5))
    ).eval()


def pruned_by_torch(bias=False):
    model = convolutional()
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    torch_prune.random_unstructured(model[3][0], "weight", 0.3)
    torch_prune.random_unstructured(model[3][0], "weight", 0.3)
    if bias:
        torch_prune.l1_unstructured(model[0], "bias", 2)
    return model


IMAGES = torch.linspace(-1, 1, 100).view(2, 2, 5, 5)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("form", [ls.sparsify_, lambda m: ls.compact_(ls.sparsify_(m))])
def test_checkpoints_of_torchs_pruning_load(form, assign):
    theirs, ours = pruned_by_torch(), form(convolutional())
    for value in ours.parameters():
        nn.init.zeros_(value)
    state = theirs.state_dict()
    ours.load_state_dict(state, assign=assign)
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES))
    masks = {"0.weight": theirs[0].weight_mask, "3.0.weight": theirs[3][0].weight_mask}
    assert ls.masks_of(ours) == ls.Masks(masks)
    assert torch.equal(ours.state_dict()["0.weight"], theirs[0].weight)
    assert "0.weight_orig" in state, "the checkpoint is not changed"


def test_what_torchs_pruning_leaves_of_a_bias_is_taken_with_a_word():
    theirs, ours = pruned_by_torch(bias=True), ls.sparsify_(convolutional())
    with pytest.warns(UserWarning, match=r"0\.bias_mask prunes 2 of 4 biases.*train on"):
        ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES))
    # a bias that goes on being pruned takes its mask
    again = ls.sparsify_(pruned_by_torch(bias=True))
    again.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(again(IMAGES), theirs(IMAGES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.weight_mask": torch.ones(4, 2)}, r"mask of 0\.weight has shape \(4, 2\)"),
        ({"0.weight_mask": torch.full((4, 2, 3, 3), 0.5)}, "must hold only 0 and 1"),
        ({"0.weight_orig": torch.ones(4, 2)}, r"size mismatch for 0\.weight"),
        ({"0.weight": torch.ones(4, 2, 3, 3)}, r'Unexpected key.*"0\.weight_orig"'),
    ],
    ids=range(4),
)
def test_wrong_checkpoints_of_torchs_pruning_are_refused(changes, message):
    with pytest.raises(RuntimeError, match=message):
        ls.sparsify_(convolutional()).load_state_dict(pruned_by_torch().state_dict() | changes)


# ---- a weight that layers share ------------------------------------------------------------------


def tied(form=ls.sparsify_, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 6)))
    model[2][0].weight = model[0].weight
    return form(model)


FORMS = {"masked": ls.sparsify_, "compact": lambda model: ls.compact_(ls.sparsify_(model))}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
MASK = torch.arange(36).view(6, 6) % 3 > 0


@forms
@pytest.mark.parametrize(
    "changes",
    [
        {"2.0.weight_mask": ~MASK},
        {"0.weight_mask": MASK, "2.0.weight_mask": MASK.roll(1, 1)},
        {"0.weight_mask": MASK, "2.0.weight_mask": MASK, "2.0.weight_frozen": torch.ones(6, 6)},
    ],
    ids=range(3),
)
def test_two_masks_for_one_weight_are_refused(form, changes):
    model = tied(form)
    before = copy_of(model.state_dict())
    state = tied(seed=1).state_dict() | changes
    with pytest.raises(RuntimeError, match=r"0\.weight and 2\.0\.weight are one weight.*two masks"):
        model.load_state_dict(state)
    same(model.state_dict(), before)
    alone = {n: v for n, v in state.items() if n != "2.0.weight"}  # as safetensors saves it
    with pytest.raises(RuntimeError, match="two masks"):
        model.load_state_dict(alone, strict=False)
    same(model.state_dict(), before)


@forms
@pytest.mark.parametrize("left_out", ["", "2.0.weight", "0.weight", "2.0.", "0."])
def test_the_mask_of_a_weight_comes_under_any_of_its_names(form, left_out):
    """Tools save a shared tensor once: safetensors drops names, transformers whole keys."""
    old, new = tied(seed=1), tied(form)
    ls.set_masks_(old, {"0.weight": MASK}, ls.frozen.Constant(0.5))
    state = {n: v for n, v in old.state_dict().items() if n != left_out}
    if left_out.endswith("."):
        state = {n: v for n, v in state.items() if not n.startswith(f"{left_out}weight")}
    missing, unexpected = new.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing == ([] if not left_out else [f"{left_out.removesuffix('weight')}weight"])
    x = torch.randn(3, 6)
    torch.testing.assert_close(new(x), old(x))
    for layer in new[0], new[2][0]:
        assert torch.equal(layer.weight_mask, MASK)


@forms
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("frozen", SOURCES)
@pytest.mark.parametrize("left_out", ["2.0.", "0."])
@pytest.mark.parametrize("parts", [("weight",), ("weight", "weight_frozen")], ids=len)
def test_a_weight_and_its_frozen_values_that_are_named_once(form, assign, frozen, left_out, parts):
    source = torch.linspace(-1, 1, 36).view(6, 6) if frozen == "tensor" else SOURCES[frozen]
    old, new, x = tied(seed=1), tied(form), torch.randn(3, 6)
    ls.set_masks_(old, {"0.weight": MASK}, source)
    ls.set_masks_(new, {"0.weight": MASK.roll(1, 0)}, torch.ones(6, 6))
    dropped = {left_out + part for part in parts}
    state = {n: v.clone() for n, v in old.state_dict().items() if n not in dropped}
    with pytest.raises(RuntimeError, match=rf"Missing key.*{left_out}weight"):
        copy.deepcopy(new).load_state_dict(state)  # as for the layers of torch
    missing, unexpected = new.load_state_dict(state, strict=False, assign=assign)
    assert unexpected == []
    assert f"{left_out}weight" in missing
    torch.testing.assert_close(new(x), old(x))
    assert new[0].weight is new[2][0].weight
    for layer in new[0], new[2][0]:
        assert torch.equal(layer.weight_mask, MASK)
        torch.testing.assert_close(layer.effective_weight, old[0].effective_weight)


@forms
@pytest.mark.parametrize("frozen", ["zero", "tensor"])
def test_tied_layers_through_safetensors_save_model(form, frozen, tmp_path):
    source = torch.randn(6, 6) if frozen == "tensor" else "zero"
    models = [tied(form, seed) for seed in (1, 2)]
    for model in models:
        ls.set_masks_(model, {"0.weight": MASK}, source)
    save_model(models[0], tmp_path / "model.safetensors")
    load_model(models[1], tmp_path / "model.safetensors")
    x = torch.randn(3, 6)
    torch.testing.assert_close(models[1](x), models[0](x))


def test_one_layer_under_two_names_loads_by_assignment():
    layer = nn.Linear(6, 6)
    old, new = (ls.sparsify_(nn.Sequential(m, nn.Tanh(), m)) for m in (layer, nn.Linear(6, 6)))
    ls.set_masks_(old, {"0.weight": MASK})
    new.load_state_dict(copy_of(old.state_dict()), assign=True)
    assert torch.equal(new[2].weight_mask, MASK)
    state = copy_of(old.state_dict()) | {"2.weight_mask": ~MASK}
    with pytest.raises(RuntimeError, match=r"0\.weight and 2\.weight are one weight"):
        new.load_state_dict(state)
