"""Exact selection on the GPU: the masks of the reference."""

from __future__ import annotations

import importlib

import pytest
import torch

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops.selection import reference

module = importlib.import_module("lottery_sparse.ops.selection.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def same(scores, masks, count, seed=3, streams=None):
    streams = list(range(len(scores))) if streams is None else streams
    expected = reference.keep_top(scores, masks, count, seed, streams)
    moved = [t.to(DEVICE) for t in scores], [t.to(DEVICE) for t in masks]
    with ls.use_backend("triton"):
        got = ops.keep_top(*moved, count, seed, streams)
    assert sum(int(m.sum()) for m in got) == count
    assert all(torch.equal(g.cpu(), e) for g, e in zip(got, expected, strict=True))


def scored(kind, shape):
    if kind == "all alike":
        return torch.zeros(shape)
    if kind == "signs of zero":
        return torch.randint(-1, 2, shape) * 0.0
    if kind == "few":
        return torch.randint(-2, 3, shape).float()
    if kind == "infinite":
        return torch.randn(shape).mul(3).round() / 0.0
    return torch.randn(shape)


@pytest.mark.parametrize("kind", ["drawn", "all alike", "signs of zero", "few", "infinite"])
def test_masks_of_the_reference(kind):
    shapes = [(4, 20), (0,), (2100,), (1,)]
    scores = [scored(kind, shape).nan_to_num(0.0, torch.inf, -torch.inf) for shape in shapes]
    masks = [torch.rand(shape) < 0.7 for shape in shapes]
    kept = sum(int(m.sum()) for m in masks)
    for count in (0, kept // 3, kept):
        same(scores, masks, count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes_and_views(dtype):
    score, mask = torch.randn(30, 50).to(dtype), torch.rand(30, 50) < 0.5
    same([score.t()], [mask.t()], 200)


def test_equal_words_go_by_position(monkeypatch):
    """Tensors with one stream share their words: everything is tied twice over."""
    score, mask = torch.zeros(50), torch.ones(50, dtype=torch.bool)
    same([score] * 3, [mask] * 3, 149, streams=[9, 9, 9])
    monkeypatch.setattr(module, "CHUNK", 32)
    for count in (1, 74):
        same([score] * 2, [mask] * 2, count, streams=[9, 9])


def test_errors_are_those_of_the_reference():
    score, mask = torch.randn(20), torch.ones(20, dtype=torch.bool)
    bad = score.clone()
    bad[3] = torch.nan
    masked = mask.clone()
    masked[3] = False
    same([score, bad], [mask, masked], 25)
    for scores, count, match in (
        ([score, bad], 5, r"scores\[1\] holds NaN at 1 kept"),
        ([score, score], 41, "count is 41, but only 40"),
    ):
        moved = [s.to(DEVICE) for s in scores], [mask.to(DEVICE)] * 2
        with ls.use_backend("triton"), pytest.raises(ValueError, match=match):
            ops.keep_top(*moved, count)
    with ls.use_backend("triton"), pytest.raises(RuntimeError, match="cannot run"):
        ops.keep_top([score.double().to(DEVICE)], [mask.to(DEVICE)], 5)
