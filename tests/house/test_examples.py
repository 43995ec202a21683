"""Every public function and class shows an example in its docstring, and all examples run.

An example begins in the names of `given`, whatever its docstring does not define itself. A line
whose result the docstring does not show may have any.
"""

from __future__ import annotations

import doctest
import inspect

import api_index
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lottery_sparse as ls

PUBLIC = api_index.public()


def stands_alone(name):
    """Whether it is a function or a class, and no method, table or entry of a table."""
    owner = PUBLIC.get(name.rpartition(".")[0])
    return callable(PUBLIC[name]) and '["' not in name and not isinstance(owner, type)


OBJECTS = {name: value for name, value in PUBLIC.items() if stands_alone(name)}
# Removed with the formats that nobody can choose.
GOING = {
    "ops.Drawn", "ops.binary_linear", "ops.delta_linear", "ops.seeded_linear",
    "ops.supermask_linear_sgd",
}  # fmt: skip


def dense():
    return nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2))


def fifth(shape):
    """A mask that keeps every fifth weight."""
    return (torch.arange(shape.numel()) % 5 == 0).view(shape)


def given():
    torch.manual_seed(0)
    model = ls.sparsify_(dense())
    w_init = {name: value.clone() for name, value in model.state_dict().items()}
    masks = {name: fifth(mask.shape) for name, mask in ls.masks_of(model).items()}
    ls.set_masks_(model, masks)
    x, y = torch.randn(8, 20), torch.arange(8) % 2

    def train(model, optimizer=None, stop_at=None):
        optimizer = optimizer or torch.optim.Adam(model.parameters())
        for _ in range(stop_at or 2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return {"loss": 0.5}

    def accuracy(model):
        return float((model(x).argmax(1) == y).double().mean())

    return {
        "torch": torch, "nn": nn, "F": F, "ls": ls, "dense": dense, "model": model, "x": x, "y": y,
        "train": train, "accuracy": accuracy, "w_init": w_init, "masks": ls.Masks(masks),
        "weight": torch.randn(10, 20), "mask": fifth(torch.Size([10, 20])),
        "images": torch.randn(4, 3, 8, 8),
    }  # fmt: skip


class Checker(doctest.OutputChecker):
    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


def examples_of(name, value):
    value = getattr(value, "__func__", value)
    value = value.fget if isinstance(value, property) else value
    return doctest.DocTestParser().get_doctest(
        inspect.getdoc(value) or "", given(), name, name, None
    )


@pytest.mark.parametrize("name", sorted(OBJECTS.keys() - GOING))
def test_it_shows_an_example(name):
    own = OBJECTS[name].__doc__ or ""
    assert ">>> " in own, f"ls.{name} shows no example in its docstring"


SHOWN = [name for name, value in PUBLIC.items() if ">>> " in (inspect.getdoc(value) or "")]


@pytest.mark.parametrize("name", SHOWN)
def test_its_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LS_CACHE_DIR", str(tmp_path))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    said = []
    runner = doctest.DocTestRunner(Checker(), optionflags=flags)
    runner.run(examples_of(name, PUBLIC[name]), out=said.append)
    assert runner.failures == 0, "".join(said)
