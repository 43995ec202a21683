"""ls.plan: every form is measured, the table says what becomes of a layer, and that is done."""

from __future__ import annotations

import importlib
import itertools
import json
from collections import UserDict

import pytest
import torch
from tolerances import close
from torch import nn

import lottery_sparse as ls
from lottery_sparse.__main__ import main
from lottery_sparse.nn.compact.base import Compact
from lottery_sparse.ops.common.eager import has_node
from lottery_sparse.planning import measuring
from lottery_sparse.planning.measuring import Cost
from lottery_sparse.planning.table import Plan, Row

plan = importlib.import_module(
    "lottery_sparse.planning.plan"
)  # as a name of the package, the function


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measuring, "_SECONDS", 0.001)  # what comes out is of no interest here
    return tmp_path / "plan.json"


def times_are(monkeypatch, seconds, default=1.0):
    """Every round of a form takes what `seconds` has for it; a list is one after another."""
    endless = {
        name: itertools.cycle(value if isinstance(value, list) else [value])
        for name, value in seconds.items()
    }

    def rounds(steps):
        made = {name: endless.get(name, itertools.repeat(default)) for name in steps}
        return {name: [next(values) for _ in range(5)] for name, values in made.items()}

    monkeypatch.setattr(measuring, "_rounds", rounds)


def model_of(density=0.1):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 20))
    ls.sparsify_(model)
    masks = ls.masks_of(model)  # the same density each time: the cache goes by it
    spread = {name: torch.arange(m.numel()) * 7919 % 1000 for name, m in masks.items()}
    return ls.set_masks_(
        model, {n: (spread[n] < 1000 * density).view(m.shape) for n, m in masks.items()}
    )


def linear_of(density=0.7, size=64):
    layer = ls.sparsify_(nn.Linear(size, size))
    mask = (torch.arange(size * size) * 7919 % 1000 < 1000 * density).view(size, size)
    return ls.set_masks_(layer, {"weight": mask})


X = torch.randn(5, 1, 8, 8)
FORMS_OF_LINEAR = {"dense", "masked", "compact"} | (
    {"sparse product", "dense product"} if has_node() else set()
)


def form_now(layer):
    kinds = ls.MaskedLinear, ls.MaskedConv2d, ls.CompactLinear, ls.CompactConv2d
    if isinstance(layer, kinds):
        return measuring.form_of(layer)
    return "packed" if isinstance(layer, ls.PackedLinear) else "dense"


# ---- what is measured, said and done -------------------------------------------------------------


@pytest.mark.parametrize("before", [lambda m: m, ls.compact_], ids=["masked", "compact"])
@pytest.mark.parametrize("training", [True, False])
def test_every_layer_is_measured_and_becomes_what_the_table_says(training, before, capsys):
    model = before(model_of())
    expected = model(X).detach()
    found = ls.plan(model, X, training=training)
    assert str(found) == capsys.readouterr().out.rstrip("\n")
    assert [row.name for row in found.rows] == ["0", "3"]
    assert [row.shape for row in found.rows] == [(5, 1, 8, 8), (5, 144)]
    assert set(found.rows[0].paths) == {"dense", "masked", "compact"}
    assert set(found.rows[1].paths) == FORMS_OF_LINEAR  # too small for a packed format
    for row in found.rows:
        layer = model.get_submodule(row.name)
        assert row.present == ("masked" if before is not ls.compact_ else "compact")
        assert form_now(layer) == row.choice
        now, then = row.paths[row.present], row.paths[row.choice]
        assert then.ms <= now.ms
        assert then.bytes <= now.bytes or then.ms <= 0.95 * now.ms
        if row.choice == row.present:
            assert f"stays {row.present}" in row.verdict
        else:
            assert row.verdict.startswith(f"{row.present} -> {row.choice}: ")
        if training or row.choice != "dense":
            assert measuring.bytes_of(layer) == then.bytes
    with torch.no_grad():
        close(model(X), expected)


# what forms take, as (times, form at first) -> form afterwards
DECISIONS = {
    "dense is faster, and has no mask": ({"masked": 3, "compact": 4}, "masked", "masked"),
    "a gain": ({"masked": 3, "compact": 2}, "masked", "compact"),
    "a gain too small for the memory": ({"masked": 3, "compact": 2.9}, "masked", "masked"),
    "the same time": ({"masked": 3, "compact": 3}, "masked", "masked"),
    "slower, with less memory": ({"masked": 3.1, "compact": 3}, "compact", "compact"),
    "as fast, with less memory": ({"masked": 3, "compact": 3}, "compact", "masked"),
    "the present form is the slower": ({"masked": 2, "compact": 3}, "compact", "masked"),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_a_form_is_taken_for_time_and_then_for_memory(case, monkeypatch):
    seconds, before, after = DECISIONS[case]
    times_are(monkeypatch, seconds | {"sparse product": 9, "dense product": 9})
    layer = linear_of()
    assert measuring.bytes_of(ls.compact_(linear_of())) > measuring.bytes_of(layer)
    if before == "compact":
        ls.compact_(layer)
    row = ls.plan(layer, torch.randn(2, 64)).rows[0]
    assert (row.present, row.choice, form_now(layer)) == (before, after, after)


@pytest.mark.skipif(not has_node(), reason="a layer that chooses its products needs _eager")
@pytest.mark.parametrize("taken", ["sparse product", "dense product"])
def test_products_are_pinned_where_that_gains(taken, monkeypatch):
    times_are(monkeypatch, {"masked": 3, "compact": 2, taken: 1.5}, default=9)
    layer = linear_of()
    assert ls.plan(layer, torch.randn(2, 64), cache=False).rows[0].choice == taken
    assert layer.products == taken.split()[0]
    times_are(monkeypatch, {taken: 2, "compact": 1.95}, default=9)
    assert ls.plan(layer, torch.randn(2, 64), cache=False).rows[0].choice == taken, "no gain"
    times_are(monkeypatch, {taken: 2, "compact": 1.5}, default=9)
    assert ls.plan(layer, torch.randn(2, 64), cache=False).rows[0].choice == "compact"
    assert layer.products == "auto"


def test_dense_is_applied_where_nothing_trains(monkeypatch):
    times_are(monkeypatch, {"dense": 1}, default=3)
    model = nn.Sequential(linear_of(), nn.ReLU(), ls.compact_(linear_of()))
    x = torch.randn(2, 64)
    y = model(x).detach()
    kept = ls.plan(model, x, cache=False)
    assert {form_now(model[0]), form_now(model[2])} <= {"masked", "compact"}
    assert all("0.33x as fast as dense" in row.verdict for row in kept.rows)
    found = ls.plan(model, x, training=False, cache=False)
    assert [row.choice for row in found.rows] == ["dense", "dense"]
    assert [type(model[0]), type(model[2])] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x).detach(), y)


def test_nothing_changes_unless_asked(capsys):
    model = model_of()
    types = [type(m) for m in model]
    found = ls.plan(model, (X,), apply=False, cache=False)
    assert [type(m) for m in model] == types
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert "as planned; nothing is changed" in str(found)
    assert capsys.readouterr().out
    said = []
    assert str(ls.plan(model, X, report=said.append)) == said[0]
    assert ls.plan(model, X, report=None).applied
    assert not capsys.readouterr().out


def test_an_optimizer_whose_state_cannot_move_is_refused_before_the_first_change(monkeypatch):
    times_are(monkeypatch, {"compact": 1}, default=3)
    model = nn.Sequential(linear_of(), linear_of(0.6))
    x = torch.randn(2, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[1].weight]["history"] = [torch.zeros(3)]
    with pytest.raises(ValueError, match=r"SGD keeps state for 1\.weight in a form that cannot"):
        ls.plan(model, x, optimizer=optimizer)
    assert [type(layer) for layer in model] == [ls.MaskedLinear, ls.MaskedLinear]


class Louder(ls.MaskedLinear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_layer_without_other_forms_stays_as_it_is():
    model = nn.Sequential(Louder(6, 6), ls.MaskedLinear(6, 6))
    nn.utils.parametrizations.weight_norm(model[1])
    found = ls.plan(model, torch.randn(2, 6), training=False)
    assert [list(row.paths) for row in found.rows] == [["masked"], ["masked"]]
    assert [row.verdict for row in found.rows] == ["stays masked: it has no other form"] * 2
    assert type(model[0]) is Louder


@pytest.mark.parametrize("x", [torch.randn(4, 6), torch.randn(2, 4, 6)], ids=["shared", "own"])
@pytest.mark.parametrize("training", [True, False])
def test_networks_side_by_side_have_forms_without_a_dense_one(training, x):
    model = ls.replicate(ls.sparsify_(nn.Sequential(nn.Linear(6, 5), nn.ReLU())), 2)
    y = model(x).detach()
    [row] = ls.plan(model, x, training=training).rows
    assert set(row.paths) == FORMS_OF_LINEAR - {"dense"}
    assert "as fast as dense" not in row.verdict
    torch.testing.assert_close(model(x).detach(), y)


def test_a_compact_layer_costs_its_lists_and_its_dense_weight_too():
    layer = ls.compact_(ls.sparsify_(nn.Linear(30, 20)))
    kept, dense, starts = 600, 600, 21 + 31
    lists = kept * (2 + 2 + 4) + starts * 8
    assert measuring.bytes_of(layer) == kept * 4 + 20 * 4 + dense * 4 + dense + lists


def test_a_table_says_what_is_gained_and_lost():
    costs = {
        "dense": Cost(1.0, 400),
        "masked": Cost(2.0, 500),
        "compact": Cost(0.5, 600),
        "sparse product": Cost(0.1, 600, 0.4),
    }
    rows = [Row("0", "Linear", (1, 1), 1.0, 0.1, costs, "masked", "compact")]
    text = str(Plan(rows, True, 1, True)).splitlines()
    assert "1 (0.1 not zero)" in text[2]
    assert "~0.100 / 1" in text[2]
    assert text[2].endswith(
        "masked -> compact: 4.00x as fast, 1.20x the memory (2.00x as fast as dense)"
    )
    assert text[3] == (
        "together 2.000 ms and 0 kB as they were, 0.500 ms and 1 kB as planned; "
        "1 of 1 layers get another form"
    )
    assert "such a form is not taken" in text[4]
    assert text[5].startswith("0: 0.9 of the weights that its mask keeps are zero; ls.set_masks_(")
    stays = Row("0", "Linear", (1, 1), 0.5, 0.5, costs, "compact", "compact")
    assert stays.verdict == (
        "stays compact (2.00x as fast as dense): masked takes 4.00x the time and 0.83x the memory"
    )


# ---- zeros ---------------------------------------------------------------------------------------


def with_zeros(size=300):
    """A network whose weights hold zeros, and whose masks keep them all."""
    model = nn.Sequential(nn.Linear(size, size))
    with torch.no_grad():
        model[0].weight.mul_(torch.arange(size * size).view(size, size) % 10 == 0)
    return ls.sparsify_(model)


def test_zeros_that_a_mask_keeps_are_seen_and_stay_trainable():
    model, x = with_zeros(), torch.randn(2, 300)
    found = ls.plan(model, x)
    assert (found.rows[0].density, found.rows[0].nonzero) == (1, 0.1)
    assert "0: 0.9 of the weights that its mask keeps are zero; ls.set_masks_(mod" in str(found)
    assert ls.masks_of(model).density == 1
    ls.set_masks_(ls.expand_(model), ls.Masks.of_nonzero(model))  # as it says
    pruned = ls.plan(model, x)
    assert (pruned.rows[0].density, pruned.rows[0].nonzero) == (0.1, 0.1)
    assert "not zero" not in str(pruned)


def test_inference_sees_zeros_as_pack_does(cache, monkeypatch):
    times_are(monkeypatch, {"packed": 1, "dense": 1}, default=3)
    dense = ls.sparsify_(nn.Sequential(nn.Linear(300, 300)))
    assert "packed" not in ls.plan(dense, torch.randn(2, 300), training=False).rows[0].paths
    model, x = with_zeros(), torch.randn(2, 300)
    y = model(x).detach()
    row = ls.plan(model, x, training=False).rows[0]
    assert len(json.loads(cache.read_text())) == 2, "another entry, though the masks are the same"
    assert row.choice == "packed"
    assert model[0].format == "csr"
    assert model[0].bytes < 0.2 * model[0].dense_bytes
    torch.testing.assert_close(model(x), y)


def test_frozen_values_are_no_zeros():
    layer = linear_of()
    ls.set_masks_(layer, {"weight": layer.weight_mask.clone()}, torch.ones(64, 64))
    row = ls.plan(layer, torch.randn(2, 64)).rows[0]
    assert row.nonzero == row.density


# ---- repetitions that disagree -------------------------------------------------------------------

RESTLESS = [1.0, 1.2, 1.3, 1.4, 1.5, *[1.2] * 10]  # the best of 15 rounds is 0.2 better than others


def test_a_layer_that_cannot_be_measured_keeps_its_form(cache, monkeypatch):
    times_are(monkeypatch, {"masked": RESTLESS, "compact": 0.1}, default=9)
    layer, x = linear_of(), torch.randn(2, 64)
    row = ls.plan(layer, x).rows[0]
    assert form_now(layer) == row.choice == "masked"
    assert row.verdict.endswith("not measured reliably, repetitions differ 1.20x")
    assert not cache.exists(), "nor is it stored"


def test_a_form_that_cannot_be_measured_is_not_taken(cache, monkeypatch):
    times_are(monkeypatch, {"masked": 9, "compact": RESTLESS}, default=9)
    layer, x = linear_of(), torch.randn(2, 64)
    row = ls.plan(layer, x, training=False).rows[0]
    assert row.choice != "compact"
    assert not row.paths["compact"].reliable
    assert not cache.exists()


def test_a_form_is_measured_again_until_repetitions_agree(cache, monkeypatch):
    tries = [[1.0, 2, 2, 2, 2], [1.05, 2, 2, 2, 2], [1.07, 2, 2, 2, 2], [1.0] * 5]
    left = iter(tries)

    def rounds(steps):
        return dict.fromkeys(steps, next(left))

    monkeypatch.setattr(measuring, "_rounds", rounds)
    row = ls.plan(linear_of(), torch.randn(2, 64)).rows[0]
    assert list(left) == tries[3:]
    assert {(cost.ms, round(cost.spread, 6)) for cost in row.paths.values()} == {(1000, 0.07)}
    assert cache.exists()


def test_rounds_go_through_the_forms_in_turn():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = measuring._rounds(steps)
    assert {name: len(times) for name, times in found.items()} == {"a": 5, "b": 5}
    assert "".join(k for k, _ in itertools.groupby(calls)) == "ab" * 5


# ---- what was measured before --------------------------------------------------------------------


@pytest.fixture
def steady(monkeypatch):
    """Counts how often something is measured; each time it takes another second."""
    counts = itertools.count(1)

    def rounds(steps):
        second = float(next(counts))
        return {name: [second] * 5 for name in steps}

    monkeypatch.setattr(measuring, "_rounds", rounds)


def seconds_of(*args, **kwargs):
    return [row.paths["masked"].ms / 1000 for row in ls.plan(*args, apply=False, **kwargs).rows]


def test_what_was_measured_is_read_back_and_a_broken_file_is_measured_anew(cache, steady):
    assert seconds_of(model_of(), X) == [1, 2]
    assert len(json.loads(cache.read_text())) == 2
    assert seconds_of(model_of(), X) == [1, 2]
    assert seconds_of(ls.compact_(model_of()), X) == [1, 2], "forms are those of the masked layer"
    assert seconds_of(model_of(0.9), X) == [3, 4]  # another density
    cache.write_text("{")
    assert seconds_of(model_of(), X) == [5, 6]
    assert len(json.loads(cache.read_text())) == 2
    assert seconds_of(model_of(), X, cache=False) == [7, 8]
    with torch.autocast("cpu"):
        assert seconds_of(model_of(), X) == [9, 10]
    with ls.use_backend("reference"):
        assert seconds_of(model_of(), X) == [11, 12]


def test_an_entry_says_when_and_where_it_was_measured(cache, steady):
    ls.plan(linear_of(), torch.randn(2, 64), apply=False)
    [entry] = json.loads(cache.read_text()).values()
    assert entry["torch"] == torch.__version__
    assert entry["lottery_sparse"] == ls.__version__
    assert entry["threads"] == torch.get_num_threads()
    assert {"cpu", "kernels", "time"} < entry.keys()
    assert set(entry["paths"]) == FORMS_OF_LINEAR


@pytest.mark.parametrize(
    "change",
    [
        {"torch": "2.11.0"},
        {"lottery_sparse": "0.0.9"},
        {"kernels": "others"},
        {"time": 0},
        {"time": 1e12},  # of a clock that was wrong
        {"time": None},
        {"paths": {}},
        {"paths": {"masked": None}},
        {"paths": [1]},
        *({"ms": ms} for ms in ("fast", 0, -1, float("nan"), float("inf"))),
    ],
    ids=str,
)
def test_an_entry_of_another_version_or_too_old_is_measured_anew(change, cache, steady):
    layer, x = linear_of(), torch.randn(2, 64)
    assert seconds_of(layer, x) == [1]
    [(key, entry)] = json.loads(cache.read_text()).items()
    if "ms" in change:
        entry["paths"]["masked"] |= change
    else:
        entry |= change
    cache.write_text(json.dumps({key: entry, "old": {"time": 0}, "odd": 3}))
    assert seconds_of(layer, x) == [2]
    assert list(json.loads(cache.read_text())) == [key], "and what is too old goes"
    assert seconds_of(layer, x) == [2]


def test_memory_is_that_of_the_layer_also_where_times_were_measured_before(steady):
    x = torch.randn(2, 64)
    sizes = []
    for density in (0.40, 0.41):  # which share an entry
        [row] = ls.plan(linear_of(density), x, apply=False).rows
        assert row.paths["compact"].ms == 1000
        sizes.append(row.paths["compact"].bytes)
        assert sizes[-1] == measuring.bytes_of(ls.compact_(linear_of(density)))
    assert sizes[0] < sizes[1]


# ---- tied layers, flags, hooks, optimizers -------------------------------------------------------


@pytest.mark.parametrize("choice", ["masked", "compact", "dense"])
def test_tied_layers_get_one_form_and_stay_tied(choice, monkeypatch):
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    model[2].weight = model[0].weight
    ls.sparsify_(model)
    ls.set_masks_(model, {"0.weight": torch.rand(12, 12) < 0.3})
    x = torch.randn(3, 12)
    expected = model(x).detach()
    # packed would be best, alone; each layer has a favourite of its own
    first = {"masked": 1.0, "compact": 2.0, "dense": 9.0, "packed": 0.1}
    second = {"masked": 2.0, "compact": 1.5, "dense": 9.0, "packed": 0.1}
    if choice != "masked":
        second[choice] = -0.5
    times = {id(model[0]): first, id(model[2]): second}
    if choice == "dense":
        first["dense"] = 2.0

    def measured(layer, *rest):
        return {name: Cost(ms, 0) for name, ms in times[id(layer)].items()}

    monkeypatch.setattr(plan, "_measured", measured)
    found = ls.plan(model, x, training=False)
    assert [row.choice for row in found.rows] == [choice, choice]
    assert model[0].weight is model[2].weight
    assert form_now(model[0]) == form_now(model[2]) == choice
    close(model(x).detach(), expected)


@pytest.mark.parametrize("apply", [True, False])
def test_each_module_keeps_its_training_flag(apply):
    model = model_of()
    model.insert(1, nn.BatchNorm2d(4).eval())
    ls.plan(model, X, apply=apply)
    assert model.training
    assert not model[1].training
    assert all(m.training for i, m in enumerate(model) if i != 1)


def test_hooks_stay_and_measuring_does_not_run_them():
    model, seen = model_of(), []
    layer = model[3]
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_, **__: seen.append("after"), with_kwargs=True)
    layer.register_full_backward_pre_hook(lambda *_: seen.append("backward"))
    ls.plan(model, X, cache=False)
    assert seen == ["before", "after"]  # of the one run that finds shapes
    model(X).sum().backward()
    assert seen[2:] == ["before", "after", "backward"]


def test_an_optimizer_follows(monkeypatch):
    times_are(monkeypatch, {"compact": 1}, default=3)
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters())
    ls.plan(model, X, optimizer=optimizer)
    assert isinstance(model[0], Compact)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }


# ---- what the model is called with ---------------------------------------------------------------


class Two(nn.Module):
    """x and y of different sizes, one of them by keyword if one likes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = ls.MaskedLinear(6, 4), ls.MaskedLinear(5, 4)

    def forward(self, x, y=None, *, scale=1.0, training=False):
        self.called = {"scale": scale, "training": training}
        both = self.first(input=x)  # a layer may be called by keyword
        return both if y is None else both + scale * self.second(y)


class TakesOneDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = ls.MaskedLinear(6, 4)

    def forward(self, batch):
        return self.layer(batch["x"])


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


A, B = torch.randn(3, 6), torch.randn(3, 5)
CALLS = {
    "one": (lambda m: ls.plan(m, A), {"first"}),
    "two": (lambda m: ls.plan(m, A, B), {"first", "second"}),
    "a tuple": (lambda m: ls.plan(m, (A, B)), {"first", "second"}),
    "keywords": (lambda m: ls.plan(m, x=A, y=B, scale=2.0), {"first", "second"}),
    "both": (lambda m: ls.plan(m, A, y=B, apply=False), {"first", "second"}),
    "a dict": (lambda m: ls.plan(m, {"x": A, "y": B}), {"first", "second"}),
    "a mapping": (lambda m: ls.plan(m, UserDict(x=A)), {"first"}),
    "a name of ours": (lambda m: ls.plan(m, {"x": A, "training": True}), {"first"}),
}


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper], ids=["plain", "wrapped"])
@pytest.mark.parametrize("call", CALLS)
def test_the_model_is_called_as_it_is_called_elsewhere(call, wrap):
    function, reached = CALLS[call]
    model = Two()
    found = function(wrap(model))
    assert {row.name.removeprefix("module.") for row in found.rows} == reached
    assert {row.shape for row in found.rows} <= {(3, 6), (3, 5)}
    assert model.called["scale"] == (2.0 if call == "keywords" else 1.0)
    assert model.called["training"] == (call == "a name of ours")


@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, Wrapper, lambda m: torch.compile(m, backend="eager")],
    ids=["plain", "wrapped", "compiled"],
)
def test_a_dict_may_be_an_argument(wrap):
    for call in (
        lambda m: ls.plan(m, {"x": A}),
        lambda m: ls.plan(m, {"batch": {"x": A}}),
        lambda m: ls.plan(m, batch={"x": A}),
    ):
        assert call(wrap(TakesOneDict())).rows[0].shape == (3, 6)


def test_a_dict_that_does_not_fit_is_refused_by_name():
    with pytest.raises(
        ValueError,
        match=r"keyword arguments x, z, which do not fit the forward of Two: .*'z'; give those",
    ):
        ls.plan(Two(), {"x": A, "z": B})


def test_the_old_name_goes_on_for_now():
    with pytest.warns(FutureWarning, match=r"example_inputs= goes; .*ls\.plan\(model, x\)") as seen:
        assert ls.plan(Two(), example_inputs=(A, B)).rows
    assert seen[0].filename == __file__


def test_a_model_without_masks_is_refused():
    with pytest.raises(ValueError, match="no masked layer"):
        ls.plan(nn.Linear(2, 3), torch.randn(1, 2))


def test_a_layer_that_is_not_reached_is_refused():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ls.MaskedLinear(2, 3)

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="reach no masked layer"):
        ls.plan(Unused(), torch.randn(1, 2))


# ---- the command line ----------------------------------------------------------------------------


def test_the_command_line_measures_a_layer(capsys):
    assert main(["plan", "12x8", "--batch", "3", "--density", "0.5", "1", "--inference"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("inference of each layer")
    assert said.count("Linear 12 -> 8") == 2
    assert "nothing is changed" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["12"], "is not inputs x outputs"), (["3x4", "--density", "50"], "a fraction in")],
)
def test_the_command_line_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert message in capsys.readouterr().err
