"""state_dict of masked layers: dense checkpoints in, masked ones round, and nothing half-loaded."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from tolerances import close
from torch import nn

import lottery_sparse as ls

SOURCES = {
    "zero": "zero",
    "tensor": torch.linspace(-1, 1, 42).view(6, 7),
    "constant": ls.Constant(0.25),
    "constant of the layer": ls.Constant(),
    "normal": ls.Seeded("normal", seed=3),
    "sign": ls.Seeded("sign", seed=2**64 - 1, std=0.1, stream=7),
}


def layer(frozen="zero", seed=0):
    torch.manual_seed(seed)
    new = ls.MaskedLinear(7, 6)
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
    new = ls.MaskedLinear(7, 6, dtype=torch.float64)
    new.load_state_dict(old.state_dict())
    assert new.weight_frozen.dtype == torch.float64
    assert torch.equal(new.effective_weight, old.effective_weight.double())
    new.load_state_dict(layer("constant").half().state_dict(), assign=True)
    assert new.weight.dtype == new.weight_frozen.dtype == torch.float16


def test_numeric_masks_load():
    state = layer().state_dict()
    new = ls.MaskedLinear(7, 6)
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
    # a mask alone is a new mask for the weight that is here
    mask = torch.arange(42).view(6, 7) % 2
    missing, unexpected = new.load_state_dict({"weight_mask": mask}, strict=False)
    assert (set(missing), unexpected) == ({"weight", "bias"}, [])
    assert torch.equal(new.weight_mask, mask.bool())
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        new.load_state_dict({"weight_mask": mask})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_signs"'):
        new.load_state_dict(layer().state_dict() | {"weight_signs": torch.zeros(1)})


@pytest.mark.filterwarnings("ignore:.*a layer collapse")
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("frozen", SOURCES)
def test_a_mask_alone_leaves_what_pruned_weights_hold(frozen, compact):
    new = nn.Sequential(layer(frozen))
    mask = new[0].weight_mask & (torch.arange(42).view(6, 7) % 3 > 0)
    held = ls.set_masks_(copy.deepcopy(new), {"0.weight": torch.zeros(6, 7)}, SOURCES[frozen])[0]
    expected = torch.where(mask, new[0].weight, held.effective_weight)
    if compact:
        ls.compact_(new)
    source = new.state_dict().get("0.weight_frozen")
    missing, unexpected = new.load_state_dict({"0.weight_mask": mask}, strict=False)
    assert (set(missing), unexpected) == ({"0.weight", "0.bias"}, [])
    if frozen not in ("constant of the layer", "normal"):  # whose std is that of the earlier weight
        assert torch.equal(new[0].effective_weight, expected)
    if source is not None:
        assert torch.equal(new.state_dict()["0.weight_frozen"], source)


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
