"""Ticket.verify: what a ticket says of itself is computed again, and changed files are named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import safetensors
import safetensors.torch
import torch
from test_supermask_ticket import LAW, learned, seeded

import lottery_sparse as ls
from lottery_sparse.__main__ import main


def of_a_seed():
    return ls.Ticket.of(*learned("signed_constant", rescale=True))


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
    key = content.index(b"digests")  # a file without them may not pass for an old one
    for at in places | {*range(key - 1, key + len(b"digests") + 1)}:
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


def written_raw(path, ticket, **others):
    """A file with these header entries and no tensors, or those of the file that is there."""
    tensors = {}
    if path.exists():
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, {"ticket": ticket, **others})
    return path


def first_format(path, digests: bool):
    """The file as the first versions wrote it, with digests or, before that, without."""
    with safetensors.safe_open(path, framework="pt") as file:
        ticket, stored = (json.loads(file.metadata()[name]) for name in ("ticket", "digests"))
    ticket["format"] = 1
    for source in ticket["sources"].values():
        source["sign_of"]["std"] = 1  # which Seeded holds as 1.0 now
    text = json.dumps(ticket, sort_keys=True)
    stored["header"] = hashlib.sha256(text.encode()).hexdigest()
    return written_raw(path, text, **({"digests": json.dumps(stored)} if digests else {}))


@pytest.mark.parametrize("digests", [True, False])
def test_a_ticket_of_the_first_format_still_loads(digests, tmp_path):
    path = tmp_path / "t.safetensors"
    sources = {"1.weight": ls.frozen.SignOf(ls.frozen.Seeded("sign", 3, 1), 0.5)}
    ls.Ticket(ls.Masks({"1.weight": torch.ones(30, 40)}), sources).save(path)
    ticket = ls.Ticket.load(first_format(path, digests)).verify()
    assert (ticket.saved is not None) == digests
    assert ticket.start == sources
    ticket.save(path)
    assert ls.Ticket.load(path).verify().saved is not None


def test_a_ticket_without_its_digests_is_no_old_one(tmp_path):
    path = tmp_path / "t.safetensors"
    of_a_seed().save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        ticket = file.metadata()["ticket"]
    with pytest.raises(ValueError, match=rf"^{path} holds no whole ticket \(it has no digests\)"):
        ls.Ticket.load(written_raw(path, ticket))


TICKET = {"format": 2, "shapes": {}, "sources": {}, "history": [], "released": False}
TICKET["rescale"] = False
SEEDED = {"law": "normal", "seed": 1, "std": 1.0, "stream": None}


def no_std(**changes):
    return {"sources": {"a": {k: v for k, v in {**SEEDED, **changes}.items() if k != "std"}}}


@pytest.mark.parametrize(
    ("ticket", "message"),
    [
        ([1], "is no ticket of this package: ticket must be an object, got a list."),
        (None, "is no ticket of this package: ticket must be an object, got null."),
        ("{", "is no ticket of this package: ticket is no JSON: Expecting"),
        ("[" * 100_000, "is no ticket of this package: ticket is nested too deep."),
        ({}, "is no ticket of this package: its format must be a whole number, got null."),
        ({"format": True}, "is no ticket of .*: its format must be a whole number, got true or"),
        ({"format": "2"}, "is no ticket of .*: its format must be a whole number, got a string."),
        ({"format": 0}, "is no ticket of this package: its format must be 1 to 2, got 0."),
        ({"format": 3, "new": 1}, "is a ticket of format 3, this version reads formats up to 2; u"),
        ({**TICKET, "new": 1}, r"holds no whole ticket \(it has 'new', which no ticket of its"),
        ({"format": 2}, r"holds no whole ticket \(it has no shapes\)"),
        ({**TICKET, "shapes": [1]}, r"holds .* \(shapes must be an object, got a list\)"),
        ({**TICKET, "shapes": {"a": 3}}, r"holds .* \(shape of a must be a list, got a whole nu"),
        ({**TICKET, "shapes": {"a": [2.0]}}, r"holds .* \(a size of a must be a whole .* a number"),
        ({**TICKET, "shapes": {"a": [-2]}}, r"holds .* \(a size of a must be at least 0, got -2"),
        ({**TICKET, "shapes": {"a": [2]}}, r"holds .* \(it has no mask of a\)"),
        ({**TICKET, "history": {}}, r"holds .* \(history must be a list, got an object\)"),
        ({**TICKET, "history": [3]}, r"holds .* \(record 0 of history must be an object, got a"),
        ({**TICKET, "released": 0}, r"holds .* \(released must be true or false, got a whole num"),
        ({**TICKET, "sources": {"a": 3}}, r"holds .* \(the source of a must be an object, got a"),
        ({**TICKET, "sources": {"a": "one"}}, r"holds .* \(the start of a in words is \"zero\""),
        ({**TICKET, **no_std()}, r"holds .* \(the source of a must have .*'std'.*, got"),
        ({**TICKET, "sources": {"a": {**SEEDED, "seed": 1.5}}}, r"holds .* \(seed must be a whole"),
        ({**TICKET, "sources": {"a": {**SEEDED, "std": [1]}}}, r"holds .* \(std is a standard d"),
        (
            {**TICKET, "sources": {"a": {"sign_of": SEEDED}}},
            r"holds .* \(the source of a must have sign_of and constant, got \['sign_of'\]\)",
        ),
        (
            {**TICKET, "sources": {"a": {"sign_of": 1, "constant": 1}}},
            r"holds .* \(the source of a must be an object, got a whole number\)",
        ),
    ],
    ids=str,
)
def test_a_header_of_other_kinds_is_one_sentence(ticket, message, tmp_path):
    text = ticket if isinstance(ticket, str) else json.dumps(ticket)
    path = written_raw(tmp_path / "t.safetensors", text, digests="{}")
    with pytest.raises(ValueError, match=f"^{path} {message}") as caught:
        ls.Ticket.load(path)
    assert caught.value.__cause__ is None  # and no traceback of what went wrong inside
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "entries", "message"),
    [
        ("other.weight", {}, "it has 'other', which no ticket of its format has"),
        ("start.weight", {"new": "1"}, "it has 'new', which no ticket of its format has"),
        ("start.weight", {"digests": "[]"}, "digests must be an object, got a list"),
        ("start.weight", {"digests": "{"}, "digests is no JSON: Expecting"),
        ("start.zero", {"digests": "{}"}, "it has two starts of zero"),
    ],
)
def test_a_file_that_holds_something_else_says_so(tensor, entries, message, tmp_path):
    path = tmp_path / "t.safetensors"
    safetensors.torch.save_file({tensor: torch.ones(2)}, path)
    written_raw(path, json.dumps({**TICKET, "sources": {"zero": "zero"}}), **entries)
    with pytest.raises(ValueError, match=rf"^{path} holds no whole ticket \({message}"):
        ls.Ticket.load(path)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    ticket = replace(of_a_seed(), history=["round 1"])
    with pytest.raises(TypeError, match="saved: record 0 of history must be an object, got a str"):
        ticket.save(tmp_path / "t.safetensors")
    assert not [*tmp_path.iterdir()]


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
    ticket.start["1.weight"] = ls.frozen.Seeded(LAW, 3)
    with pytest.raises(ValueError, match=r"seeded start of 1\.weight needs a std"):
        ticket.verify()


# ---- python -m lottery_sparse ticket FILE --------------------------------------------------------


def test_the_command_shows_what_a_file_holds(tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    found().save(path)
    assert main(["ticket", str(path)]) == 0
    said = capsys.readouterr().out
    ticket = ls.Ticket.load(path)
    assert ticket.masks.table() in said
    for name in ticket.masks:
        assert f"{name} starts from a tensor, pruned ones hold a tensor" in said
    assert "bytes: masks " in said
    assert "round 2, density " in said
    assert '"loss": 1.0' in said
    assert said.splitlines()[-1].startswith("verified:")


def test_the_command_shows_what_seeds_draw(tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    of_a_seed().save(path)
    assert main(["ticket", str(path)]) == 0
    said = capsys.readouterr().out
    assert "starts from SignOf(source=Seeded(" in said
    assert "weights / kept" in said
    assert "seeds 8, tensors " in said


def test_the_command_says_what_is_wrong_with_a_file(tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    assert main(["ticket", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"No such file or directory: {path}")
    found().save(path)
    rewritten(path, flip_a_mask)
    assert main(["ticket", str(path)]) == 1
    told = capsys.readouterr()
    assert f"{path} was changed since it was saved" in told.err
    assert "verified" not in told.out


@pytest.mark.parametrize("digests", [True, False])
def test_the_command_says_whether_an_old_file_has_digests(digests, tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    starts = {"1.weight": ls.frozen.SignOf(ls.frozen.Seeded("sign", 3, 1), 0.5)}
    ls.Ticket(ls.Masks({"1.weight": torch.ones(30, 40)}), starts).save(path)
    first_format(path, digests)
    assert main(["ticket", str(path)]) == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("verified" if digests else "not verified")
    )
