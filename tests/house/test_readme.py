"""What README.md shows: every block of Python runs, and the names in pages are there."""

from __future__ import annotations

import ast
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from pages import blocks
from test_layers import ROOT
from torch import nn

import lottery_sparse as ls

README = (ROOT / "README.md").read_text("utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text("utf-8")
X, LABELS = torch.randn(30, 1, 5, 5), torch.arange(30) % 4


def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 12), nn.ReLU(), nn.Linear(12, 4))


def sparse():
    model = ls.sparsify_(dense())
    masks = {name: torch.rand(mask.shape) < 0.2 for name, mask in ls.masks_of(model).items()}
    return ls.set_masks_(model, masks)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Whatever a block writes, a plan's times too, is written here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LS_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("block", blocks(README), ids=lambda block: block.split("\n")[-2][:30])
def test_a_block_runs(block):
    names = {"torch": torch, "ls": ls, "model": dense(), "another_model": dense()}
    for line in statements(block):
        exec(line, names)


def test_verbs_of_the_table_lead_from_each_form_to_each_other():
    verbs = re.findall(r"`(ls\.\w+_\(model\))` \|$", README, re.MULTILINE)
    assert len(verbs) == 5
    for first in verbs:
        for second in (verb for verb in verbs if verb != first):
            names = {"ls": ls, "model": sparse()}
            exec(first, names)
            exec(second, names)
            assert names["model"](X).shape == (30, 4), (first, second)


TRAINING = """
optimizer = ls.optim.Adam(model.parameters())
F.cross_entropy(model(X), LABELS).backward()
optimizer.step()
ls.plan(model, X, optimizer=optimizer)
"""


@pytest.mark.parametrize("path", ["masked", "compact", "dense product"])
def test_whatever_a_plan_finds_best_the_optimizer_goes_along(path, monkeypatch):
    def choice(costs, present, training, tied):
        return path if path in costs[0] else "masked"  # where no kernel is built

    monkeypatch.setattr(sys.modules["lottery_sparse.planning.plan"], "_choice", choice)
    names = {"ls": ls, "F": F, "X": X, "LABELS": LABELS, "model": sparse()}
    for line in statements(TRAINING):
        exec(line, names)
        held = [p for group in names["optimizer"].param_groups for p in group["params"]]
        assert {*map(id, held)} == {*map(id, names["model"].parameters())}, line


def statements(block):
    return [ast.unparse(statement) for statement in ast.parse(block).body]


def test_names_are_there():
    for page in (README, GUIDE):
        names = set(re.findall(r"\bls((?:\.\w+)+)", page))
        assert len(names) > 15
        for name in sorted(names):
            value = ls
            for part in name[1:].split("."):
                value = getattr(value, part)
