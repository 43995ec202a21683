"""ls.optim against torch.optim, in float32 and in float64."""

from __future__ import annotations

import copy
import io
import os

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import lottery_sparse as ls
from lottery_sparse import backends, compact

PAIRS = {
    "SGD": (ls.optim.SGD, torch.optim.SGD),
    "Adam": (ls.optim.Adam, torch.optim.Adam),
    "AdamW": (ls.optim.AdamW, torch.optim.AdamW),
}
CASES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.03, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.03}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.03, "maximize": True}),
    ("Adam", {"lr": 0.02}),
    ("Adam", {"lr": 0.02, "betas": (0.3, 0.4), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.02, "maximize": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.02}),
    ("AdamW", {"lr": 0.02, "weight_decay": 0.2, "maximize": True, "betas": (0.0, 0.9)}),
]
# none, one, around the widths of vectors, more than one chunk
SIZES = [(0,), (1,), (3, 5), (16,), (31,), (33,), (2, 8193)]
STEPS = 20
ULP = 2.0**-23
# torch fuses multiply-adds, and so do we where the instruction set has them
TO_TORCH = 10 if os.environ.get("LS_CPU") == "portable" else 2
needs_kernel = pytest.mark.skipif(not backends.built("cpu"), reason="no native kernels")


def parameters(sizes=SIZES, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in sizes]


def set_grads(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer, params, steps=STEPS, first=0):
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()
    return params


def states(optimizer):
    return optimizer.state_dict()["state"]


def assert_close(params, expected, ulps):
    """Within so many units in the last place of the largest number that an element has seen."""
    for p, e in zip(params, expected, strict=True):
        scale = e.detach().abs().double() + 1
        error = (p.detach().double() - e.detach().double()).abs()
        assert (error <= ulps * ULP * scale).all(), float((error / ULP / scale).max())


def by_kernel(monkeypatch):
    """Fails if anything goes through torch's own step."""
    for ours, _ in PAIRS.values():
        monkeypatch.setattr(ours, "_torch_step", lambda self: pytest.fail("by torch"))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_steps_are_those_of_torch(name, options):
    ours, torchs = PAIRS[name]
    params, same, exact = parameters(), parameters(), parameters(dtype=torch.float64)
    mine, theirs = ours(params, **options), torchs(same, **options)
    train(mine, params)
    train(theirs, same)
    train(torchs(exact, **options), exact)
    assert_close(params, same, TO_TORCH)
    assert_close(params, exact, 16)
    for a, b in zip(states(mine).values(), states(theirs).values(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert (a[key].shape, a[key].dtype) == (b[key].shape, b[key].dtype)
            assert_close([a[key]], [b[key]], TO_TORCH)


@needs_kernel
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_one_element_does_not_depend_on_place_or_threads(name, options, monkeypatch):
    by_kernel(monkeypatch)
    whole = parameters([(40000,)])
    parts = [nn.Parameter(p.clone()) for p in whole[0].detach().split([3, 17, 13000, 26980])]
    mine, split = PAIRS[name][0](whole, **options), PAIRS[name][0](parts, **options)
    for step in range(3):
        set_grads(whole, step)
        for p, g in zip(parts, whole[0].grad.split([len(p) for p in parts]), strict=True):
            p.grad = g
        torch.set_num_threads(2)
        mine.step()
        torch.set_num_threads(1)
        split.step()
    assert torch.equal(whole[0], torch.cat([p.detach() for p in parts]))


@needs_kernel
@pytest.mark.parametrize("name", PAIRS)
def test_groups_schedulers_and_missing_gradients(name, monkeypatch):
    by_kernel(monkeypatch)
    results = []
    for cls in PAIRS[name]:
        params = parameters()
        groups = [
            {"params": params[:3], "lr": 0.2, "weight_decay": 0.1},
            {"params": params[3:]},
        ]
        optimizer = cls(groups, lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        for step in range(6):
            set_grads(params, step)
            params[4].grad = None if step % 2 else params[4].grad
            params[5].grad = None
            version = params[1]._version, params[5]._version
            optimizer.step()
            scheduler.step()
            if cls is PAIRS[name][0]:
                assert params[1]._version > version[0]
                assert params[5]._version == version[1]
        optimizer.add_param_group({"params": parameters([(4,)], seed=9), "lr": 0.5})
        params += optimizer.param_groups[2]["params"]
        train(optimizer, params, 2)
        results.append(params)
    assert_close(*results, TO_TORCH)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_go_both_ways(name, ours_first):
    options = {"lr": 0.03, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
    classes = PAIRS[name] if ours_first else PAIRS[name][::-1]
    params = parameters()
    first = classes[0](params, **options)
    train(first, params, 4)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second = classes[1](params, lr=1.0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    train(second, params, 4, first=4)
    expected = parameters()
    train(PAIRS[name][1](expected, **options), expected, 8)
    assert_close(params, expected, TO_TORCH)


@pytest.mark.parametrize("name", PAIRS)
def test_copies_go_on(name):
    params = parameters()
    optimizer = PAIRS[name][0](params, lr=0.1)
    train(optimizer, params, 2)
    twin = copy.deepcopy(optimizer)
    copies = [p for group in twin.param_groups for p in group["params"]]
    train(optimizer, params, 2, first=2)
    train(twin, copies, 2, first=2)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_closures_hooks_and_types():
    params = parameters([(5,)])
    optimizer = ls.optim.Adam(params, lr=0.1)
    assert isinstance(optimizer, torch.optim.Adam)
    assert isinstance(ls.optim.AdamW(params), torch.optim.AdamW)
    assert isinstance(ls.optim.SGD(params), torch.optim.SGD)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert loss > 0
    assert calls == [True]
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("post")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append("global")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == [True, "pre", "post", "global"]
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#Adam.step" in {event.name for event in profile.events()}


def test_hooks_of_a_subclass_run_once():
    class Halved(ls.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    params, calls = parameters([(5,)]), []
    optimizer = Halved(params, lr=0.1)
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(1))
    train(optimizer, params, 1)
    assert calls == [1]


def odd_parameters():
    """What the kernel takes, between what it does not."""
    params = parameters([(4, 6), (7,), (5,), (3, 4), (6,), (2, 2)])
    params[0] = nn.Parameter(params[0].detach().t())
    params[2] = nn.Parameter(params[2].detach().double())
    params[4] = nn.Parameter(params[4].detach().to(torch.complex64))
    return params


@pytest.mark.parametrize("name", PAIRS)
def test_what_the_kernel_does_not_take_goes_through_torch(name):
    results = []
    for cls in PAIRS[name]:
        params = odd_parameters()
        optimizer = cls(params, lr=0.1)
        for step in range(3):
            set_grads(params, step)
            params[3].grad = params[3].grad.t().contiguous().t()  # not contiguous
            optimizer.step()
        results.append(params)
        assert len(states(optimizer)) == (0 if name == "SGD" else len(params))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adam", {"amsgrad": True}),
        ("AdamW", {"lr": torch.tensor(0.1)}),
        ("SGD", {"lr": torch.tensor(0.1), "momentum": 0.5}),
        ("Adam", {"fused": True}),
        ("SGD", {"foreach": True, "momentum": 0.5}),
    ],
    ids=str,
)
def test_options_of_torch(name, options):
    results = []
    for cls in PAIRS[name]:
        params = parameters()
        optimizer = cls(params, **options)
        train(optimizer, params, 4)
        results.append(params)
        if "amsgrad" in options:
            assert "max_exp_avg_sq" in states(optimizer)[1]
    assert_close(*results, TO_TORCH)


def test_sparse_gradients_go_through_torch():
    results = []
    for cls in PAIRS["SGD"]:
        torch.manual_seed(0)
        table = nn.Embedding(9, 4, sparse=True)
        optimizer = cls(table.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            table(torch.tensor([1, 3, 3])).square().sum().backward()
            optimizer.step()
        results.append([table.weight])
    assert_close(*results, TO_TORCH)


@needs_kernel
def test_backends_can_be_forced():
    params, complex_one = parameters(), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = ls.optim.SGD(params, lr=0.1)
    expected = train(torch.optim.SGD(parameters(), lr=0.1), same := parameters(), 1)
    assert expected is same
    with ls.use_backend("reference"):
        train(optimizer, params, 1)
    with ls.use_backend("cpu"):
        train(optimizer, params, 1)
        other = ls.optim.SGD([complex_one], lr=0.1)
        with pytest.raises(RuntimeError, match="forced backend cpu"):
            train(other, [complex_one], 1)


# ---- compact layers ------------------------------------------------------------------------------


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
    held = ls.Constant(0.25) if frozen == "constant" else "zero"
    ls.set_masks_(model, ls.Masks(masks), frozen=held)
    return ls.compact_(model, spare=3)


def compact_layers(model):
    return [m for m in model.modules() if isinstance(m, ls.CompactLinear)]


def assert_fresh(model):
    """Effective weights hold the kept values and else what they froze; spare slots hold 0."""
    for layer in compact_layers(model):
        got = layer.weight_effective.clone()
        assert layer.fresh_version == layer.weight._version
        layer._refill()
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
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert_fresh(mine)


@needs_kernel
@pytest.mark.parametrize("name", PAIRS)
def test_the_step_itself_writes_the_effective_weights(name, monkeypatch):
    """Without a gradient that flows, a hook or a refresh: also for a weight two layers share."""
    by_kernel(monkeypatch)
    for cls in (ls.CompactLinear,):
        monkeypatch.setattr(cls, "refresh_", lambda self: pytest.fail("refreshed"))
    model = compact_model(shared=True)
    assert len(compact.holders_of(model[2].weight)) == 2
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
        layer._refill()
        assert torch.equal(got, layer.weight_effective)


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
    kept = compact.KeptLists.of(mask, int(mask.flatten(1).sum(1).max()) + 2)
    layer = Holder(kept, torch.full(mask.shape, 7.0))
    params = [layer.weight]
    train(PAIRS[name][0](params, lr=0.1), params, 3)
    used = torch.arange(kept.columns.shape[1]) < kept.kept.unsqueeze(1)
    assert (layer.weight[~used] == 0).all() or not backends.built("cpu")
    expected = torch.full(mask.shape, 7.0).masked_scatter(mask, layer.weight.detach()[used])
    assert torch.equal(layer.weight_effective, expected)
    assert layer.weight[used].abs().sum() > 0 or not mask.any()


class Holder(nn.Module):
    """A compact layer, as far as an optimizer sees one."""

    def __init__(self, kept, effective):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kept.columns.shape))
        self.register_buffer("weight_effective", effective)
        self.register_buffer("kept_starts", kept.starts)
        self.register_buffer("kept_columns", kept.columns)
        self.kept, self.fresh_version = kept, 0
        compact.register(self)

    def refresh_(self):
        arguments = self.weight_effective, self.weight.detach(), self.kept_starts, self.kept_columns
        ls.reference.scatter_kept_(*arguments)
        self.fresh_version = self.weight._version


@needs_kernel
def test_compact_and_expand_under_a_running_optimizer(monkeypatch):
    by_kernel(monkeypatch)
    model = ls.expand_(compact_model())
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
    ls.expand_(model, optimizer)
    train_model(model, optimizer, 2)


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


def test_compiled_step():
    params, same = parameters([(5,), (3, 4)]), parameters([(5,), (3, 4)])
    optimizer, theirs = ls.optim.SGD(params, lr=0.1), torch.optim.SGD(same, lr=0.1)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for step in range(3):
        set_grads(params, step)
        set_grads(same, step)
        compiled()
        theirs.step()
    assert_close(params, same, TO_TORCH)
