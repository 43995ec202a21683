"""What README.md shows: every block of Python runs as it stands, and names and counts are right."""

from __future__ import annotations

import ast
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from test_layers import ROOT
from torch import nn

import lottery_sparse as ls

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
X, LABELS = torch.randn(30, 1, 5, 5), torch.arange(30) % 4


def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 12), nn.ReLU(), nn.Linear(12, 4))


def sparse():
    model = ls.sparsify_(dense())
    masks = {name: torch.rand(mask.shape) < 0.2 for name, mask in ls.masks_of(model).items()}
    return ls.set_masks_(model, masks)


def train(model, optimizer=None, stop_at=None):
    optimizer = optimizer or torch.optim.Adam(model.parameters())
    for _ in range(min(stop_at or 6, 6)):
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
    return {"loss": 0.0}


def accuracy(model):
    return float((model(X).argmax(1) == LABELS).double().mean())


def given():
    """What the blocks take for granted, and some of them replace."""
    return {
        "torch": torch, "ls": ls, "model": dense(), "another_model": dense(), "train": train,
        "accuracy": accuracy, "example_inputs": X, "x": X.flatten(1), "weight": torch.randn(9, 25),
        "mask": torch.rand(9, 25) < 0.5, "frozen": torch.zeros(9, 25), "bias": None,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Whatever a block writes, a plan's times too, is written here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LS_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[-2][:30])
def test_a_block_runs(block):
    names = given() | ({"model": sparse()} if "compact_" in block else {})
    for line in statements(block):
        exec(line, names)


@pytest.mark.parametrize("path", ["masked", "compact", "dense product"])
def test_whatever_a_plan_finds_best_the_optimizer_goes_along(path, monkeypatch):
    def choice(costs, present, training, tied):
        return path if path in costs[0] else "masked"  # where no kernel is built

    monkeypatch.setattr(sys.modules["lottery_sparse.planning.plan"], "_choice", choice)
    [block] = [block for block in BLOCKS if "ls.plan(" in block]
    names = given() | {"model": sparse()}
    for line in statements(block):
        exec(line, names)
        if "optimizer" in names and "pack_" not in line:
            held = [p for group in names["optimizer"].param_groups for p in group["params"]]
            assert {*map(id, held)} == {*map(id, names["model"].parameters())}, line


def statements(block):
    return [ast.unparse(statement) for statement in ast.parse(block).body]


def test_names_are_there():
    names = set(re.findall(r"\bls\.(\w+)", README))
    assert len(names) > 15
    assert not [name for name in sorted(names) if not hasattr(ls, name)]


def test_counts_are_those_of_the_tables():
    said = r"(\d+) mask criteria, (\d+) actions on kept weights, (\d+) on\s+pruned"
    found = re.search(said, README)
    assert found is not None
    tables = ls.pruning.CRITERIA, ls.pruning.MASK1_ACTIONS, ls.pruning.MASK0_ACTIONS
    assert [int(number) for number in found.groups()] == [len(table) for table in tables]
