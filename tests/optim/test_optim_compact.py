"""ls.optim on compact layers: kept values, spare slots and effective weights."""

from __future__ import annotations

import copy

import pytest
import torch
from optim_problems import CASES, PAIRS, by_kernel, needs_kernel, train
from tolerances import close
from torch import nn

import lottery_sparse as ls
from lottery_sparse.nn.compact import following, registry
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.optim import calls

pytestmark = pytest.mark.numeric


def compact_model(frozen="zero", networks=None, shared=False):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, 17), nn.ReLU(), nn.Linear(17, 17), nn.Linear(17, 17), nn.Linear(17, 4)
    )
    if shared:
        model[3].weight = model[2].weight
    ls.sparsify_(model)
    names = [n for n, p in model.named_parameters() if p.dim() == 2]
    masks = {n: torch.rand(dict(model.named_parameters())[n].shape) < 0.3 for n in names}
    masks["0.weight"][5] = False  # an empty row
    held = ls.frozen.Constant(0.25) if frozen == "constant" else "zero"
    ls.set_masks_(model, ls.Masks(masks), frozen=held)
    return ls.compact_(model, spare=3)


def compact_layers(model):
    return [m for m in model.modules() if isinstance(m, ls.nn.CompactLinear)]


def assert_fresh(model):
    """Effective weights hold the kept values and else what they froze; spare slots hold 0."""
    for layer in compact_layers(model):
        if not layer.refreshes_lazily:
            assert layer._derived.weight_version == layer.weight._version
        got = layer.weight_effective.clone()
        following.fill(layer)
        assert torch.equal(got, layer.weight_effective)
        kept = int(layer.kept.kept)
        assert kept < layer.capacity
        assert (layer.weight[kept:] == 0).all()


def train_model(model, optimizer, steps):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 30, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("frozen", ["zero", "constant"])
def test_compact_layers(name, options, frozen):
    mine, theirs = compact_model(frozen), compact_model(frozen)
    options = options | {"lr": 1e-3}
    train_model(mine, PAIRS[name][0](mine.parameters(), **options), 4)
    train_model(theirs, PAIRS[name][1](theirs.parameters(), **options), 4)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        close(p, q)
    assert_fresh(mine)


@needs_kernel
@pytest.mark.parametrize("name", PAIRS)
def test_the_step_itself_writes_the_effective_weights(name, monkeypatch):
    """Without a gradient that flows, a hook or a refresh: also for a weight two layers share."""
    by_kernel(monkeypatch)
    for cls in (ls.nn.CompactLinear,):
        monkeypatch.setattr(cls, "refresh_", lambda self: pytest.fail("refreshed"))
    model = compact_model("constant", shared=True)
    assert len(registry.holders_of(model[2].weight)) == 2
    params = list(model.parameters())
    optimizer = PAIRS[name][0](params, lr=0.1)
    before = [layer.weight_effective._version for layer in compact_layers(model)]
    train(optimizer, params, 2)
    after = [layer.weight_effective._version for layer in compact_layers(model)]
    assert all(a > b for a, b in zip(after, before, strict=True))
    monkeypatch.undo()
    for layer in compact_layers(model):
        kept = int(layer.kept.kept)
        got = layer.weight_effective.clone()
        assert (layer.weight[kept:] == 0).all()  # whose gradient was not 0
        following.fill(layer)
        assert torch.equal(got, layer.weight_effective)


@needs_kernel
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [ls.optim.Adam, torch.optim.Adam])
def test_what_no_kernel_reads_waits_for_readers(kind, fused):
    model = compact_model(shared=True)
    layers = compact_layers(model)
    assert all(layer.refreshes_lazily for layer in layers)
    held = [layer._derived.dense for layer in layers]
    before = [(t.clone(), t._version) for t in held]
    train_model(model, kind(model.parameters(), lr=0.1, fused=fused), 2)
    for t, (old, version) in zip(held, before, strict=True):
        assert torch.equal(t, old), "nobody asked"
        assert t._version == version
    for layer in layers:
        expected = layer.effective_weight
        assert torch.equal(layer.weight_effective, expected), "now somebody did"
    train_model(model, kind(model.parameters(), lr=0.1, fused=fused), 1)
    x = torch.randn(8, 30)
    y = model(x)
    for backend in ("dense", "reference"):
        with ls.use_backend(backend):
            close(model(x), y)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        close(model(x).float(), y, dtype=torch.bfloat16)
    layers[0].products = "dense"
    close(model(x), y)
    layers[0].products = "auto"
    train_model(model, kind(model.parameters(), lr=0.1, fused=fused), 1)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    ls.set_masks_(model, ls.masks_of(model))
    assert torch.equal(model(x), y)
    for layer in compact_layers(model.double()):
        assert not layer.refreshes_lazily
        assert torch.equal(layer._derived.dense, layer.effective_weight)


@needs_kernel
def test_spare_slots_stay_zero_with_eps_zero(monkeypatch):
    by_kernel(monkeypatch)
    model = compact_model()
    train_model(model, ls.optim.Adam(model.parameters(), lr=0.01, eps=0.0, weight_decay=0.1), 3)
    assert_fresh(model)


@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_networks_side_by_side(name, networks, wide, monkeypatch):
    """A compact Parameter [E, C] of ragged networks, one of them empty, in more than one chunk."""
    rows, columns = 5, 2**16 + 3 if wide else 4000
    mask = torch.rand(networks, rows, columns) < 0.2
    mask[-1] &= torch.rand(rows, columns) < (0.5 if networks == 1 else 0.0)
    kept = KeptLists.of(mask, int(mask.flatten(1).sum(1).max()) + 2)
    layer = Holder(kept, torch.full(mask.shape, 7.0))
    params = [layer.weight]
    train(PAIRS[name][0](params, lr=0.1), params, 3)
    used = torch.arange(kept.columns.shape[1]) < kept.kept.unsqueeze(1)
    assert (layer.weight[~used] == 0).all() or not dispatch.built("cpu")
    expected = torch.full(mask.shape, 7.0).masked_scatter(mask, layer.weight.detach()[used])
    assert torch.equal(layer.weight_effective, expected)
    assert layer.weight[used].abs().sum() > 0 or not mask.any()


class Holder(nn.Module):
    """A compact layer, as far as an optimizer sees one."""

    def __init__(self, kept, effective):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kept.columns.shape))
        self.weight_effective = self._dense = effective
        self.kept, self.fresh_version, self.target = kept, 0, effective
        registry.register(self)

    def weight_changed(self):
        kept = self.kept
        ls.ops.compact.reference.scatter_kept_(
            self._dense, self.weight.detach(), kept.starts, kept.columns
        )
        self.stepped()

    def fit_state(self, optimizer):
        pass

    def stepped(self):
        self.fresh_version = self.weight._version


@needs_kernel
def test_compact_and_expand_under_a_running_optimizer(monkeypatch):
    by_kernel(monkeypatch)
    model = ls.sparsify_(compact_model())
    optimizer = ls.optim.Adam(model.parameters(), lr=0.01)
    train_model(model, optimizer, 2)
    ls.compact_(model, optimizer, spare=2)
    train_model(model, optimizer, 2)
    assert_fresh(model)
    masks = ls.masks_of(model)
    smaller = {n: m & (torch.rand(m.shape) < 0.7) for n, m in masks.items()}
    ls.set_masks_(model, ls.Masks(smaller), optimizer=optimizer)
    train_model(model, optimizer, 2)
    assert_fresh(model)
    other = torch.rand(17, 30) < 0.2
    with pytest.raises(ValueError, match="pass it: set_masks_"):
        ls.set_masks_(model, ls.Masks(smaller | {"0.weight": other}))
    ls.sparsify_(model, optimizer=optimizer)
    train_model(model, optimizer, 2)


def test_state_that_was_loaded_moves_where_its_optimizer_is_given():
    model = compact_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train_model(model, optimizer, 2)
    other = copy.deepcopy(model)
    resumed = torch.optim.Adam(other.parameters(), lr=0.01)
    resumed.load_state_dict(optimizer.state_dict())  # it has not stepped here
    smaller = {n: m & (torch.rand(m.shape) < 0.7) for n, m in ls.masks_of(model).items()}
    ls.set_masks_(model, smaller, optimizer=optimizer)
    ls.set_masks_(other, smaller, optimizer=resumed)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], resumed.state[q]["exp_avg"])


def test_fallback_keeps_effective_weights_fresh():
    model = compact_model()
    optimizer = ls.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)
    train_model(model, optimizer, 2)
    assert_fresh(model)
    with ls.use_backend("reference"):
        train_model(model, ls.optim.SGD(model.parameters(), lr=0.01), 2)
    assert_fresh(model)
    with ls.use_backend("reference"):
        train_model(model, ls.optim.Adam(model.parameters(), lr=0.01, fused=True), 2)
    assert_fresh(model)


def test_an_optimizer_does_not_keep_layers_alive():
    model = compact_model()
    layer = model[0]
    params = list(model.parameters())
    optimizer = ls.optim.SGD(params, lr=0.1)
    train(optimizer, params, 1)
    effective = layer.weight_effective
    before = effective.clone()
    del model, layer
    train(optimizer, params, 1, first=1)
    assert torch.equal(effective, before)


@needs_kernel
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_stable_ops_give_the_same_bits(name, options, monkeypatch):
    """Those of _C, which _eager repeats for the torch that it was built with."""
    mine, theirs = compact_model(), compact_model()
    train_model(mine, PAIRS[name][0](mine.parameters(), **options), 3)
    monkeypatch.setattr(calls, "op_of", dispatch.function)
    train_model(theirs, PAIRS[name][0](theirs.parameters(), **options), 3)
    assert all(
        torch.equal(*pair) for pair in zip(mine.parameters(), theirs.parameters(), strict=True)
    )
    assert_fresh(theirs)
