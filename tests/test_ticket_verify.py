"""Ticket.verify: what a ticket says of itself is computed again, and changed files are named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import safetensors
import safetensors.torch
import torch
from test_supermask_ticket import LAW, learned, seeded

import lottery_sparse as ls


def of_a_seed():
    return ls.supermask_ticket(*learned("signed_constant", rescale=True))


def found():
    def train(model, stop_at=None):
        return {"loss": 1.0, "by layer": {2: 0.5, 10: 0.25}}  # JSON makes strings of these keys

    return ls.find_ticket(seeded()[0], train, 2, 0.5, mask0="freeze_init")


KINDS = pytest.mark.parametrize("make", [of_a_seed, found])


@KINDS
def test_what_was_made_and_what_was_loaded_verifies(make, tmp_path):
    path = tmp_path / "t.safetensors"
    ticket = make()
    assert ticket.verify() is ticket
    ticket.save(path)
    loaded = ls.Ticket.load(path)
    assert loaded.verify() is loaded
    loaded.save(path)  # and again what was loaded
    ls.Ticket.load(path).verify()


@KINDS
def test_any_changed_byte_is_found_when_the_file_is_loaded(make, tmp_path):
    path = tmp_path / "t.safetensors"
    make().save(path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert b"digests" in content[: 8 + size]
    places = {*range(0, len(content), len(content) // 60), 8, 7 + size, 8 + size, len(content) - 1}
    key = content.index(b"digests")  # a file without them counts as an old one
    for at in places - {*range(key, key + len(b"digests"))}:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match=rf"^{path}(:| is| was| holds) ") as caught:
            ls.Ticket.load(path).verify()
        assert "\n" not in str(caught.value)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is no ticket of this package"):
        ls.Ticket.load(path)


def rewritten(path, change):
    """The file with `change(tensors, ticket, digests)` made to what it holds."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ticket, digests = (json.loads(metadata[name]) for name in ("ticket", "digests"))
    change(tensors, ticket, digests)
    header = {"ticket": json.dumps(ticket), "digests": json.dumps(digests)}
    safetensors.torch.save_file(tensors, path, header)
    return path


def flip_a_mask(tensors, ticket, digests):
    tensors["masks.1.weight"][3] ^= 4


def move_a_weight(tensors, ticket, digests):
    tensors["start.3.bias"][0] = 1e-30


def unfreeze(tensors, ticket, digests):
    del tensors["frozen.1.weight"]


def other_accuracy(tensors, ticket, digests):
    ticket["history"][-1]["metrics"]["loss"] = 0.1


def other_seed(tensors, ticket, digests):
    ticket["sources"]["1.weight"]["sign_of"]["seed"] = 4


def no_shapes(tensors, ticket, digests):
    del ticket["shapes"]


def other_law(tensors, ticket, digests):
    ticket["sources"]["3.weight"]["sign_of"]["law"] = "cauchy"


def other_shape(tensors, ticket, digests):
    ticket["shapes"]["1.weight"] = [30, 39]


def no_digests(tensors, ticket, digests):
    digests.clear()


CHANGES = [
    (found, flip_a_mask, "was changed since .*: the mask of 1.weight is not what its digest says"),
    (found, move_a_weight, "was changed since .*: the start of 3.bias is not"),
    (found, unfreeze, "was changed since .*: what pruned weights of 1.weight hold is not"),
    (found, other_accuracy, "was changed since .*: its header is not what its digest says"),
    (found, no_digests, "was changed since it was saved"),
    (of_a_seed, flip_a_mask, "was changed since .*: the mask of 1.weight"),
    (of_a_seed, other_seed, "was changed since .*: its header is not"),
    (of_a_seed, no_shapes, r"holds no whole ticket \(it has no shapes\): it was changed"),
    (of_a_seed, other_law, r"holds no whole ticket \(law must be one of .*'cauchy'\)"),
    (of_a_seed, other_shape, r"holds no whole ticket \(bits of 1.weight must be uint8"),
]


@pytest.mark.parametrize(
    ("make", "change", "message"),
    CHANGES,
    ids=[f"{m.__name__}-{c.__name__}" for m, c, _ in CHANGES],
)
def test_a_changed_file_is_named_with_what_was_changed(make, change, message, tmp_path):
    path = tmp_path / "t.safetensors"
    make().save(path)
    with pytest.raises(ValueError, match=f"^{path} {message}"):
        ls.Ticket.load(rewritten(path, change))


def test_a_generator_that_draws_other_weights_is_found(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    of_a_seed().save(path)
    ticket = ls.Ticket.load(path)
    draw = ls.random.LAWS[LAW]
    monkeypatch.setitem(ls.random.LAWS, LAW, lambda *args, **kwargs: -draw(*args, **kwargs))
    with pytest.raises(
        ValueError, match=rf"^{path}: the start of 1.weight drawn by SignOf\(.*seed=3"
    ):
        ticket.verify()


def test_what_was_changed_after_loading_is_named_until_it_is_saved(tmp_path):
    path = tmp_path / "t.safetensors"
    found().save(path)
    ticket = ls.Ticket.load(path)
    ticket.start["3.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=rf"^{path}: the start of 3.weight is not what was saved"):
        ticket.verify()
    ticket.save(path)
    ls.Ticket.load(path).verify()


def test_a_ticket_saved_without_digests_still_loads(tmp_path):
    path = tmp_path / "t.safetensors"
    of_a_seed().save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = {"ticket": file.metadata()["ticket"]}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, header)
    assert ls.Ticket.load(path).verify().saved is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": {}}, "^the ticket has a mask of 1.weight, but no start for it"),
        (
            {"frozen": {"1.weight": torch.zeros(30, 39)}},
            r"frozen of 1.weight must have the shape of its mask, \(30, 40\), got \(30, 39\)",
        ),
        ({"frozen": {"1.bias": torch.zeros(30)}}, "has frozen values of 1.bias, but no mask"),
        ({"masks": ls.Masks({"1.weight": torch.ones(30, 40)})}, "says density 0.25.*keep 1200 of"),
    ],
)
def test_what_does_not_go_together_is_named(change, message):
    ticket = found()
    with pytest.raises(ValueError, match=message):
        replace(ticket, **{"frozen": {}, **change}).verify()


def test_a_source_without_a_std_is_named():
    ticket = of_a_seed()
    ticket.start["1.weight"] = ls.Seeded(LAW, 3)
    with pytest.raises(ValueError, match=r"seeded start of 1\.weight needs a std"):
        ticket.verify()
