"""ls.plan: every path is measured, the table says what it found, the choice is applied."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from tolerances import close
from torch import nn

import lottery_sparse as ls
from lottery_sparse.__main__ import main
from lottery_sparse.compact_base import Compact
from lottery_sparse.ops.compact import has_node

plan = importlib.import_module("lottery_sparse.plan")  # as a name of the package, the function


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LS_CACHE_DIR", str(tmp_path))
    return tmp_path / "plan.json"


def model_of(density=0.1):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 20))
    ls.sparsify_(model)
    masks = ls.masks_of(model)  # the same density each time: the cache goes by it
    spread = {name: torch.arange(m.numel()) * 7919 % 1000 for name, m in masks.items()}
    return ls.set_masks_(
        model, {n: (spread[n] < 1000 * density).view(m.shape) for n, m in masks.items()}
    )


X = torch.randn(5, 1, 8, 8)


@pytest.mark.parametrize("training", [True, False])
def test_every_layer_is_measured_printed_and_made_what_won(training, capsys):
    model = model_of()
    expected = model(X)
    found = ls.plan(model, X, training=training)
    assert [row.name for row in found.rows] == ["0", "3"]
    assert [row.shape for row in found.rows] == [(5, 1, 8, 8), (5, 144)]
    for row in found.rows:
        assert {"dense", "masked", "compact"} <= set(row.paths)
        assert ("dense product" in row.paths) == (has_node() and row.name == "3")
        assert ("packed" in row.paths) == (row.name == "3" and not training)
        least = min((c.ms, n) for n, c in row.paths.items() if n != "dense")
        assert row.choice == least[1]
        assert row.ratio == row.paths["dense"].ms / least[0]
        layer = model.get_submodule(row.name)
        assert isinstance(layer, Compact) == (row.choice in ("compact", "dense product"))
        assert isinstance(layer, ls.PackedLinear) == (row.choice == "packed")
    assert str(found) == capsys.readouterr().out.rstrip("\n")
    with torch.no_grad():
        close(model(X), expected.detach())


def test_where_dense_wins_the_table_says_by_how_much_sparse_would_lose():
    costs = {"dense": 1.0, "masked": 3.0, "compact": 1.7, "dense product": 1.0}
    cost = type(ls.plan(model_of(), X).rows[0].paths["dense"])
    row = ls.plan(model_of(), X).rows[0]
    row = type(row)(
        "0", "Linear", (1, 1), 0.9, {n: cost(ms, 0) for n, ms in costs.items()}, "dense product"
    )
    assert row.verdict == "stays dense: compact would be 1.70x slower"


def test_what_was_measured_is_read_back_and_a_broken_file_is_measured_anew(cache):
    first = ls.plan(model_of(), X, apply=False)
    assert len(json.loads(cache.read_text())) == 2
    assert ls.plan(model_of(), X, apply=False).rows[1].paths == first.rows[1].paths
    ls.plan(model_of(0.9), X, apply=False)
    assert len(json.loads(cache.read_text())) == 4  # another density
    cache.write_text("{")
    assert ls.plan(model_of(), X, apply=False).rows
    assert len(json.loads(cache.read_text())) == 2


def test_nothing_changes_unless_asked():
    model = model_of()
    types = [type(m) for m in model]
    ls.plan(model, (X,), apply=False, cache=False)
    assert [type(m) for m in model] == types
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("choice", ["masked", "compact"])
def test_tied_layers_get_one_choice_and_stay_tied(choice, monkeypatch):
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    model[2].weight = model[0].weight
    ls.sparsify_(model)
    ls.set_masks_(model, {"0.weight": torch.rand(12, 12) < 0.3})
    x = torch.randn(3, 12)
    expected = model(x).detach()
    # packed would be best, alone; each layer has a favourite of its own
    times = {id(model[0]): {"masked": 1.0, "compact": 2.0}, id(model[2]): {"masked": 2.0}}
    times[id(model[2])]["compact"] = 0.5 if choice == "compact" else 1.5

    def measured(layer, *rest):
        found = {"dense": 9.0, "packed": 0.1, **times[id(layer)]}
        return {name: plan.Cost(ms, 0) for name, ms in found.items()}

    monkeypatch.setattr(plan, "_measured", measured)
    found = ls.plan(model, x, training=False)
    assert [row.choice for row in found.rows] == [choice, choice]
    assert model[0].weight is model[2].weight
    assert isinstance(model[0], Compact) == isinstance(model[2], Compact) == (choice == "compact")
    close(model(x).detach(), expected)


@pytest.mark.parametrize("apply", [True, False])
def test_each_module_keeps_its_training_flag(apply):
    model = model_of()
    model.insert(1, nn.BatchNorm2d(4).eval())
    ls.plan(model, X, apply=apply)
    assert model.training
    assert not model[1].training
    assert all(m.training for i, m in enumerate(model) if i != 1)


def test_a_layer_may_be_called_by_keyword():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ls.MaskedLinear(6, 4)

        def forward(self, x):
            return self.layer(input=x)

    assert ls.plan(Model(), torch.randn(3, 6)).rows[0].shape == (3, 6)


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


def test_an_optimizer_follows():
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters())
    ls.plan(model, X, optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }


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


def test_the_command_line_measures_a_layer(capsys):
    assert main(["plan", "12x8", "--batch", "3", "--density", "0.5", "1", "--inference"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("inference of each layer")
    assert said.count("Linear 12 -> 8") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["12"], "is not inputs x outputs"), (["3x4", "--density", "50"], "a fraction in")],
)
def test_the_command_line_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert message in capsys.readouterr().err


def test_a_compact_layer_costs_its_lists_and_its_dense_weight_too():
    layer = ls.compact_(ls.sparsify_(nn.Linear(30, 20)))
    kept, dense, starts = 600, 600, 21 + 31
    lists = kept * (2 + 2 + 4) + starts * 8
    assert plan._bytes(layer) == kept * 4 + 20 * 4 + dense * 4 + dense + lists
