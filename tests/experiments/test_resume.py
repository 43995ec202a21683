"""find_ticket cut off and resumed; each round's ticket; tickets in compact models."""

from __future__ import annotations

import pytest
import torch
from test_ticket import Trainer, copy_of, network, same
from tolerances import close
from torch import nn

import lottery_sparse as ls

OPTIONS = {"rounds": 3, "keep": 0.6, "mask1": "reinit", "mask0": "freeze_init", "generator": 7}


def test_on_round_gets_each_ticket():
    train, found = Trainer(), []
    last = ls.find_ticket(network(), train, **OPTIONS, on_round=found.append)
    assert [len(t.history) for t in found] == [1, 2, 3, 4]
    assert [t.masks for t in found] == train.masks
    for ticket, start in zip(found, train.starts, strict=True):
        same(ticket.start, start)
        ticket.verify()
    assert found[-1].masks == last.masks
    assert found[-1].history == last.history


@pytest.mark.parametrize("killed", [0, 1, 2, 3])
@pytest.mark.parametrize("rewind_to", [0, 2])
def test_killed_and_resumed(tmp_path, killed, rewind_to):
    whole = Trainer()
    expected = ls.find_ticket(network(), whole, **OPTIONS, rewind_to=rewind_to)

    def save(ticket):
        ticket.save(tmp_path / "round.safetensors")
        if len(ticket.history) == killed + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ls.find_ticket(network(), Trainer(), **OPTIONS, rewind_to=rewind_to, on_round=save)
    train, model = Trainer(), network()
    ticket = ls.find_ticket(
        model, train, **OPTIONS, rewind_to=rewind_to,
        resume=ls.Ticket.load(tmp_path / "round.safetensors"),
    )  # fmt: skip
    assert len(train.stops) == (rewind_to > 0) + 4 - killed
    assert ticket.masks == expected.masks
    same(ticket.start, expected.start)
    same(ticket.frozen, expected.frozen)
    same(train.finals[-1], whole.finals[-1])
    assert [h["density"] for h in ticket.history] == [h["density"] for h in expected.history]


def tickets(**changes):
    found = []
    ls.find_ticket(network(), Trainer(), **OPTIONS | changes, on_round=found.append)
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 2}, "resume is of round 3, but rounds is 2"),
        ({"compounding": True}, "resume cannot go on with compounding=True"),
        ({"model": nn.Linear(3, 4)}, "resume has masks of .*, but the model's are of"),
        ({"resume": ls.Ticket(ls.Masks({}), {})}, "resume has no history"),
        ({"resume": ls.Ticket(ls.Masks({}), {}, {}, [{"round": "3"}])}, "resume has no history"),
        ({"resume": ls.Ticket(ls.Masks({}), {}, {}, [{"round": -1}])}, "resume has no history"),
    ],
    ids=["rounds", "compounding", "model", "history", "a word", "negative"],
)
def test_what_cannot_be_resumed(changes, message):
    train = Trainer()
    given = {"model": network(), "train_fn": train, **OPTIONS, "resume": tickets()[-1]}
    with pytest.raises(ValueError, match=message):
        ls.find_ticket(**given | changes)
    assert train.stops == []


def test_a_model_that_was_trained_since_is_noticed():
    model, train = network(), Trainer()
    train(ls.sparsify_(model))
    with pytest.raises(ValueError, match=r"resume restarts 0\.bias from other values"):
        ls.find_ticket(model, train, **OPTIONS, resume=tickets()[1])


@pytest.mark.parametrize("mask0", ["zero", "freeze_init"])
def test_a_ticket_goes_into_a_compact_model(mask0):
    ticket = tickets(mask0=mask0)[2]
    plain, compact = ticket.apply_(network()), ls.sparsify_(network())
    half = {n: torch.arange(m.numel()).view(m.shape) % 2 for n, m in ls.masks_of(compact).items()}
    ls.compact_(ls.set_masks_(compact, half))
    assert ticket.apply_(compact) is compact
    assert type(compact[0]) is ls.nn.CompactLinear
    same(copy_of(compact.state_dict()), copy_of(plain.state_dict()))
    x = torch.randn(5, 6)
    close(compact(x), plain(x))
