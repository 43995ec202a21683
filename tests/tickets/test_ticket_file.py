"""Ticket files as others may write, cut or forge them: memory, names, numbers."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import safetensors.torch
import torch
from test_ticket_verify import SEEDED, TICKET, found, of_a_seed, rewritten, written_raw

import lottery_sparse as ls
from lottery_sparse.__main__ import main
from lottery_sparse.pruning.masks import Masks
from lottery_sparse.tickets import file as ticket_file

EVIL = "\x1b[31m1.weight\r\nverified: all of it\u202e"


def bytes_of(tensors):
    return {name: value.numpy().tobytes() for name, value in tensors.items()}


@pytest.mark.parametrize("make", [found, of_a_seed])
def test_a_loaded_ticket_does_not_follow_its_file(make, tmp_path):
    path = tmp_path / "t.safetensors"
    make().save(path)
    ticket = ls.Ticket.load(path)
    tensors = {n: v for n, v in ticket.start.items() if isinstance(v, torch.Tensor)}
    before = bytes_of({**tensors, **{f"{n} mask": m for n, m in ticket.masks.items()}})
    frozen = bytes_of(ticket.frozen)
    with open(path, "r+b") as file:
        file.write(b"\x5a" * path.stat().st_size)
    os.truncate(path, 0)
    after = bytes_of({**tensors, **{f"{n} mask": m for n, m in ticket.masks.items()}})
    assert (after, bytes_of(ticket.frozen)) == (before, frozen)
    ticket.verify()


def test_a_folder_is_named(tmp_path, capsys):
    with pytest.raises(IsADirectoryError, match=rf"this is a folder, but .*{tmp_path}"):
        ls.Ticket.load(tmp_path)
    assert main(["ticket", str(tmp_path)]) == 1
    assert f"this is a folder, but a file is needed: {tmp_path}" in capsys.readouterr().err


# ---- words of a file -----------------------------------------------------------------------------


def is_plain(text):
    return all(line.isprintable() for line in text.splitlines()) and "\r" not in text


def test_the_command_prints_no_escapes_and_no_faked_lines(tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    masks = Masks({EVIL: torch.ones(2, 3), "w" * 5000: torch.ones(2)})
    starts = {EVIL: torch.zeros(2, 3), "w" * 5000: ls.frozen.Seeded("normal", 1, 1.0)}
    history = [{"round": 0, EVIL: EVIL, "density": 1.0, "metrics": ["x" * 5000]}]
    ls.Ticket(masks, starts, history=history).save(path)
    assert main(["ticket", str(path)]) == 0
    said = capsys.readouterr().out
    assert is_plain(said)
    assert said.count("\nverified") == 1  # its own line, not that of a name
    assert r"\x1b[31m1.weight\r\nverified: all of it\u202e starts from" in said
    assert max(map(len, said.splitlines())) < 1000
    assert is_plain(masks.table())


def renamed(part, name):
    def change(tensors, ticket, digests):
        tensors[f"{part}.{name}"] = tensors.pop(f"{part}.1.weight")

    return change


def with_shape(name, shape):
    def change(tensors, ticket, digests):
        ticket["shapes"][name] = shape

    return change


def with_source(name, source):
    def change(tensors, ticket, digests):
        ticket["sources"][name] = source

    return change


def with_density(density):
    def change(tensors, ticket, digests):
        ticket["history"][-1]["density"] = density

    return change


@pytest.mark.parametrize(
    "change",
    [
        renamed("start", EVIL),
        renamed("start", "w" * 50_000),
        renamed("frozen", EVIL),
        renamed("masks", EVIL),
        renamed("frozen", "\n" * 50_000),
        with_shape(EVIL, [1]),
        with_shape("1.weight", [10**4000, 1]),
        with_shape("1.weight", [10**2400, 10**2400]),
        with_shape("1.weight", [-(10**4000)]),
        with_source(EVIL, 1),
        with_source("w" * 50_000, 1),
        with_source("1.weight", {"law": EVIL, "seed": 1, "std": 1, "stream": 1}),
        with_source("1.weight", {"law": "normal", "seed": 10**4000, "std": 1, "stream": 1}),
        with_source("1.weight", {"law": "normal", "seed": 1, "std": 10**4000, "stream": 1}),
        with_source("1.weight", {"law": "normal", "seed": 1, "std": 1, "stream": -(10**4000)}),
        with_source("1.weight", {EVIL: 1}),
        with_source("1.weight", EVIL * 10_000),
        with_density(EVIL),
        with_density([10**4000]),
    ],
    ids=range(19),
)
@pytest.mark.parametrize("forged", [False, True])
def test_errors_are_one_short_printable_line(change, forged, tmp_path, monkeypatch, capsys):
    path = tmp_path / "t.safetensors"
    found().save(path)
    rewritten(path, change)
    if forged:  # who writes a file can write its digests too
        monkeypatch.setattr(ticket_file, "differing", lambda *args: None)
    with pytest.raises(ValueError) as caught:
        ls.Ticket.load(path).verify()
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < len(str(path)) + 800
    assert main(["ticket", str(path)]) == 1
    told = capsys.readouterr()
    assert is_plain(told.out)
    assert is_plain(told.err)


@pytest.mark.parametrize("format", [10**4000, 3])
def test_a_newer_format_is_said_shortly(format, tmp_path):
    path = written_raw(tmp_path / "t.safetensors", json.dumps({"format": format}))
    with pytest.raises(ValueError, match="is a ticket of format") as caught:
        ls.Ticket.load(path)
    assert len(str(caught.value)) < len(str(path)) + 400


@pytest.mark.parametrize("depth", [200, *range(900, 1000, 7), 5_000, 200_000])
def test_nesting_is_no_error_of_python(depth, tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    history = '{"round": 0, "metrics": ' + "[" * depth + "]" * depth + "}"
    text = json.dumps({**TICKET, "format": 1})
    written_raw(path, text.replace('"history": []', f'"history": [{history}]'))
    with contextlib.suppress(ValueError):
        ls.Ticket.load(path).verify()
    assert main(["ticket", str(path)]) in (0, 1)
    assert is_plain("".join(capsys.readouterr()))


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_frozen_values_are_floating_when_saved_loaded_and_verified(dtype, tmp_path):
    path = tmp_path / "t.safetensors"
    ticket = found()
    ticket.save(path)
    ticket.frozen["1.weight"] = torch.ones(30, 40, dtype=dtype)
    message = rf"frozen values of 1\.weight must be a floating tensor, got {dtype}"
    with pytest.raises(ValueError, match=message):
        ticket.verify()
    content = path.read_bytes()
    with pytest.raises(TypeError, match=f"the ticket cannot be saved: {message}"):
        ticket.save(path)
    assert path.read_bytes() == content

    def change(tensors, ticket, digests):
        tensors["frozen.1.weight"] = torch.ones(30, 40, dtype=dtype)

    with pytest.raises(ValueError, match=rf"^{path} holds no whole ticket \({message}\)"):
        ls.Ticket.load(rewritten(path, change))


def test_frozen_values_that_are_no_tensor_are_not_saved(tmp_path):
    ticket = ls.Ticket(
        Masks({"w": torch.ones(2)}), {"w": torch.ones(2)}, {"w": ls.frozen.Constant(1.0)}
    )
    with pytest.raises(TypeError, match="frozen values of w must be a floating tensor, got Const"):
        ticket.save(tmp_path / "t.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("field", ["std", "constant"])
def test_a_source_beyond_float32_is_refused(field, tmp_path):
    source = {**SEEDED, "std": 1e39} if field == "std" else {"sign_of": SEEDED, "constant": 1e39}
    path = tmp_path / "t.safetensors"
    written_raw(path, json.dumps({**TICKET, "sources": {"a": source}}), digests="{}")
    with pytest.raises(ValueError, match=r"at most 3\.403e\+38, as float32 holds no more, got 1e"):
        ls.Ticket.load(path)


def test_a_std_whose_draws_leave_float32_is_refused_with_the_name():
    ticket = ls.Ticket(Masks({"w": torch.ones(300)}), {"w": ls.frozen.Seeded("normal", 1, 3e38)})
    with pytest.raises(ValueError, match=r"the start of w is Seeded.* torch.float32 cannot hold"):
        ticket.verify()


def test_a_file_of_other_numbers_is_no_ticket(tmp_path):
    path = tmp_path / "t.safetensors"
    entry = {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}
    text = json.dumps({"start.w": entry, "__metadata__": {"ticket": "{}"}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"1")
    with pytest.raises(ValueError, match=f"^{path} is no ticket of this package: "):
        ls.Ticket.load(path)


def test_a_file_of_safetensors_that_is_no_ticket(tmp_path):
    path = tmp_path / "t.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=f"^{path} is no ticket of this package: it has no ticket"):
        ls.Ticket.load(path)
