"""A learned mask as a ticket: mask and seed, on disk and back."""

from __future__ import annotations

import json

import pytest
import torch
from tolerances import close
from torch import nn

import lottery_sparse as ls

LAW = "truncated_normal"


def seeded(seed=3):
    """A network drawn by ls.random, biases 0, and where each weight comes from."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))
    sources = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.zero_()
                continue
            std = sum(p.shape) ** -0.5
            sources[name] = ls.frozen.Seeded(LAW, seed, std)
            stream = ls.random.stream_of(name)
            p.copy_(ls.random.truncated_normal(p.shape, std, seed=seed, stream=stream))
    return model, sources


def learned(weights="init", rescale=False):
    model, sources = seeded()
    ls.supermask_(model, weights, rescale)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                stream = ls.random.stream_of(name)
                p.copy_(ls.random.normal(p.shape, seed=0, stream=stream))
    if weights == "signed_constant":
        constants = {name: float(model.get_parameter(name).abs().max()) for name in sources}
        sources = {name: ls.frozen.SignOf(s, constants[name]) for name, s in sources.items()}
    model.eval()
    return ls.learning.use_masks_(model, "threshold"), sources


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("weights", ["init", "signed_constant"])
@pytest.mark.parametrize("described", [True, False])
def test_it_computes_what_was_evaluated(tmp_path, weights, rescale, described):
    model, sources = learned(weights, rescale)
    x = torch.randn(8, 40)
    expected = model(x)
    ticket = ls.Ticket.of(model, sources if described else None)
    ticket.save(tmp_path / "ticket.safetensors")
    again = ls.Ticket.load(tmp_path / "ticket.safetensors")
    assert again.masks == ticket.masks == ls.masks_of(model)
    assert again.bits == ticket.bits
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))
    close(again.apply_(fresh)(x), expected)
    if described:
        assert ticket.bits == {"masks": 40 * 30 + 304, "seeds": 64, "tensors": 0}
        assert again.start == ticket.start
    else:
        assert ticket.bits == {"masks": 40 * 30 + 304, "seeds": 0, "tensors": 32 * 1500}
    assert all(p.requires_grad for p in fresh.parameters())


def test_any_ticket_comes_back(tmp_path):
    model, _ = seeded()
    ticket = ls.find_ticket(
        model, lambda model, stop_at=None: {"loss": 1.0}, 2, 0.5, mask0="freeze_init"
    )
    ticket.save(tmp_path / "a.safetensors")
    again = ls.Ticket.load(tmp_path / "a.safetensors")
    assert again.masks == ticket.masks
    assert again.history == ticket.history
    assert again.released is ticket.released
    for part in ("start", "frozen"):
        old, new = getattr(ticket, part), getattr(again, part)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_what_cannot_be_stored_is_said(tmp_path):
    model, sources = learned()
    with pytest.raises(ValueError, match=r"source of 1.weight gives other weights .*1200 of 1200"):
        ls.Ticket.of(model, {"1.weight": ls.frozen.Seeded(LAW, 4, 1.0)})
    with pytest.raises(ValueError, match=r"sources names 2.weight, but weights are: 1.weight, 3"):
        ls.Ticket.of(model, {"2.weight": sources["1.weight"]})
    with pytest.raises(ValueError, match="needs a std"):
        ls.Ticket.of(model, {"1.weight": ls.frozen.Seeded(LAW, 3)})
    ticket = ls.Ticket.of(model)
    ticket.start["1.bias"] = object()
    with pytest.raises(TypeError, match=r"start of 1.bias must be a tensor.*got object"):
        ticket.save(tmp_path / "x")
    ticket.start["1.bias"] = "zero"
    ticket.history.append({"metrics": object()})
    with pytest.raises(TypeError, match="history holds what JSON cannot"):
        ticket.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no ticket of this package"):
        ls.Ticket.load(path)
    ticket = ls.Ticket.of(*learned())
    ticket.save(path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert json.loads(header["__metadata__"]["ticket"])["format"] == 2
    content = path.read_bytes().replace(b'\\"format\\": 2', b'\\"format\\": 3')
    path.write_bytes(content)
    with pytest.raises(ValueError, match="format 3, this version reads formats up to 2"):
        ls.Ticket.load(path)
