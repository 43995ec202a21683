"""What the benchmarks do besides timing: peers are checked, rows survive, tables have ratios."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cpu import peers, steps
from benchmarks.report import collect, tables


class Right:
    def __init__(self, weight, mask):
        self.mask, self.values = mask, (weight * mask).requires_grad_()

    def __call__(self, x):
        return F.linear(x, self.values)

    def kept_gradient(self):
        return self.values.grad[self.mask]


class WrongGradient(Right):
    def kept_gradient(self):
        return super().kept_gradient() * 1.01


class Raises(Right):
    def __call__(self, x):
        raise IndexError("index 9 is out of bounds")


def check(kind):
    p = steps.linear_problem((20, 7), 5, 0.5)
    return peers.checked(kind, p.weight.detach(), p.mask, p.x, p.dy, F.linear)


def test_a_peer_that_is_right_is_used():
    assert check(Right).values.grad is None


def test_a_peer_that_is_wrong_or_raises_is_not():
    with pytest.raises(peers.Unusable, match=r"wrong: relative error of dw is 0\.01"):
        check(WrongGradient)
    with pytest.raises(peers.Unusable, match="raises IndexError: index 9"):
        check(Raises)
    with pytest.raises(peers.Unusable, match="no_such_peer cannot be imported"):
        peers.module("no_such_peer.modules")


def rows(**times: float) -> list[dict]:
    run = {"commit": "abc", "date": "2026-01-01", "load_before": 0.0}
    place = {"bench": "compact_linear", "layer": "a", "batch": 60, "density": 0.1}
    names = {name.replace("_", " "): time for name, time in times.items()}
    return [place | {"contender": c, "min_us": t} | run for c, t in names.items()]


def test_the_summary_names_the_best_peer_and_the_share_of_the_ideal():
    timed = rows(sparseprop=300.0, sparselab=250.0, ls_compact=100.0)
    timed += [row | {"contender": "F.linear"} for row in rows(dense=600.0)]
    text = tables.compact_linear(timed)
    assert "| a, 60 | 0.1 | 6.00 | 0.60 | sparselab | 2.40 | 2.50 |" in text


@pytest.mark.parametrize("bench", tables.TABLES)
def test_every_table_takes_a_single_row(bench):
    row = rows(anything=1.0)[0] | {"bench": bench, "threads": 1, "network": "LeNet"}
    row |= {"scores": "all equal", "keep": 0.5, "size": 10}
    assert "anything" in tables.TABLES[bench]([row])


def test_stored_rows_stay(tmp_path):
    path = tmp_path / "cpu.json"
    stored = rows(F=1.0) + [rows(F=1.0)[0] | {"contender": "gone", "skipped": "no reason"}]
    path.write_text(json.dumps({"machine": {}, "rows": stored}))
    found = collect.Rows(path, resume=False)
    found.save()
    assert json.loads(path.read_text())["rows"] == stored
    assert "- gone: not measured at a, 60: no reason" in path.with_suffix(".md").read_text()
    # a complete run of the suite drops rows whose benchmark is gone, and no other suite's
    found._seen = {collect._key(stored[0])}
    found.finish()
    assert json.loads(path.read_text())["rows"] == stored[:1]


def test_a_problem_has_a_mask_of_its_density():
    torch.manual_seed(0)
    p = steps.linear_problem((100, 200), 3, 0.1)
    assert p.mask.float().mean() == pytest.approx(0.1, abs=0.01)
