"""The cache of ls.plan: a file that cannot be read counts as empty, one that has no place too."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import lottery_sparse as ls

plan = importlib.import_module(
    "lottery_sparse.planning.plan"
)  # as a name of the package, the function


def measure():
    model = ls.sparsify_(nn.Sequential(nn.Linear(8, 8)))
    ls.set_masks_(model, {"0.weight": torch.eye(8)})
    return ls.plan(model, torch.randn(2, 8), apply=False)


@pytest.fixture
def no_home(monkeypatch):
    """A uid without an entry in passwd, and no HOME, as in `docker run --user 54321`."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("HOME", "XDG_CACHE_HOME", "LS_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)


def test_without_a_home_nothing_is_kept(no_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan.cache_path() == Path(os.devnull)
    assert measure().rows
    assert measure().rows
    assert os.listdir(tmp_path) == []
    assert Path(os.devnull).read_bytes() == b""


def test_without_a_home_a_folder_can_be_named(no_home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan.cache_path() == tmp_path / "lottery_sparse" / "plan.json"
    monkeypatch.setenv("LS_CACHE_DIR", str(tmp_path))
    assert plan.cache_path() == tmp_path / "plan.json"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"null",
        b"[1]",
        b'"text"',
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",  # read, but too deep to write with indents
        b'{"a": null, "b": "text", "c": [], "d": {"dense": null}, "e": {"dense": {"ms": "1"}}}',
    ],
    ids=range(10),
)
def test_a_damaged_file_is_measured_anew(content, tmp_path, monkeypatch):
    monkeypatch.setenv("LS_CACHE_DIR", str(tmp_path))
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    assert measure().rows
    assert path.read_bytes() == content or isinstance(json.loads(path.read_bytes()), dict)


NO_NUMBERS = {
    "huge": 10**400, "negative": -1, "infinite": float("inf"), "nan": float("nan"),
    "true": True, "text": "1", "null": None, "list": [1],
}  # fmt: skip


@pytest.mark.parametrize("field", ["time", "ms", "bytes", "spread"])
@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_an_entry_with_a_field_that_is_no_finite_number_is_none(
    field, value, tmp_path, monkeypatch
):
    monkeypatch.setenv("LS_CACHE_DIR", str(tmp_path))
    path, costs = tmp_path / "plan.json", {"dense": plan.Cost(1.5, 8, 0.1)}
    plan._keep("layer", costs)
    assert plan._kept("layer") == costs
    entries = json.loads(path.read_bytes())
    entry = entries["layer"]
    holder = entry if field in entry else entry["paths"]["dense"]
    holder[field] = value
    path.write_text(json.dumps(entries))
    assert plan._kept("layer") is None
    plan._keep("other", costs)
    assert plan._kept("other") == costs


def test_a_folder_in_its_place_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LS_CACHE_DIR", str(tmp_path))
    (tmp_path / "plan.json").mkdir()
    assert measure().rows


def test_a_file_in_place_of_its_folder_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LS_CACHE_DIR", str(tmp_path / "file"))
    assert measure().rows
