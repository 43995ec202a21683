"""Files that earlier versions wrote still load, and give what those versions made of them."""

from __future__ import annotations

import gzip
import io
import shutil
from pathlib import Path

import pytest
import torch
from golden import write
from safetensors.torch import load_file

import lottery_sparse as ls
from experiments.store.store import Store
from experiments.study.runs import run_of
from lottery_sparse.__main__ import main

HERE = Path(__file__).parent
VERSIONS = "early", "flat", "folders"
CASES = (
    "supermask",
    "packed",
    *(
        f"{form}-{kind}"
        for form in ("masked", "compact")
        for kind in ("zero", "tensor", "constant", "seeded")
    ),
)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # of sums of 64 products of numbers below 1
versions = pytest.mark.parametrize("version", VERSIONS)


def read(version, what, weights_only):
    data = gzip.decompress((HERE / "models" / f"{version}-{what}.pt.gz").read_bytes())
    return torch.load(io.BytesIO(data), weights_only=weights_only)


def expected(version):
    return load_file(HERE / "models" / f"{version}-expected.safetensors")


def assert_computes(model, case, wanted):
    torch.testing.assert_close(model(wanted[f"{case}.x"]), wanted[f"{case}.y"], **CLOSE)
    if case.startswith(("masked", "compact")):
        for name, tensor in ls.dense_state_dict(model).items():
            torch.testing.assert_close(tensor, wanted[f"{case}.{name}"], rtol=0, atol=0)
        assert ls.masks_of(model) == ls.Masks(write.masks())


@versions
def test_pickled_models_compute_and_train_as_they_did(version):
    wanted, models = expected(version), read(version, "models", weights_only=False)
    assert models.keys() == set(CASES)
    for case, model in models.items():
        assert_computes(model, case, wanted)
        if case.startswith("compact"):
            other = models[case.replace("compact", "masked")]
            for network in (model, other):
                optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
                network(wanted[f"{case}.x"]).square().sum().backward()
                optimizer.step()
            for name, tensor in ls.dense_state_dict(model).items():
                torch.testing.assert_close(tensor, ls.dense_state_dict(other)[name], **CLOSE)


@versions
@pytest.mark.parametrize("case", CASES)
def test_state_dicts_load_strictly_into_models_of_today(version, case):
    wanted, state = expected(version), read(version, "states", weights_only=True)[case]
    make = {"supermask": write.supermask, "packed": write.packed}
    if case in make:
        model = make[case]()
    else:
        model = write.masked("zero")
        with torch.no_grad():
            model[0].weight.mul_(2)
        model = ls.compact_(model, spare=9) if case.startswith("compact") else model
    model.load_state_dict(state)
    assert_computes(model, case, wanted)
    if version != "early":
        assert model.state_dict().keys() == state.keys()


@versions
def test_masks_and_sources_load_without_running_code(version):
    values = read(version, "values", weights_only=True)
    assert values["masks"] == ls.Masks(write.masks())
    assert values["sources"] == [ls.frozen.Seeded("normal", 7, 0.1), ls.frozen.Constant(0.5)]


@pytest.mark.parametrize("kind", ["", "-drawn"])
@pytest.mark.parametrize("name", ["format1-undigested", "format1", "format2"])
def test_tickets_of_each_format(tmp_path, capsys, name, kind):
    path = HERE / "tickets" / f"{name}{kind}.safetensors"
    ticket = ls.Ticket.load(path).verify()
    assert main(["ticket", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("not verified" if name == "format1-undigested" else "verified")
    wanted = load_file(HERE / "tickets" / f"{name}-applied.safetensors")
    ticket.save(tmp_path / "anew")
    for each in (ticket, ls.Ticket.load(tmp_path / "anew").verify()):
        assert each.masks == ls.Masks(write.masks())
        model = each.apply_(write.network())
        for tensor, value in ls.dense_state_dict(model).items():
            assert torch.equal(value, wanted[f"{name}{kind}.{tensor}"]), tensor
    rounds = [{"round": 0, "kept": 256, "metrics": {"accuracy": 0.5}}]
    assert ticket.history == ([] if kind else rounds)
    assert ticket.rescale == bool(kind)


@pytest.mark.parametrize("version", ["early", "flat"])
def test_stores_are_read_and_appended_to(tmp_path, version):
    folder = tmp_path / "store"
    shutil.copytree(HERE / "stores" / version, folder)
    store = Store(folder, create=False)
    rows = store.rows()  # a wrong checksum would warn, and leave the row out
    assert len(rows) == 7  # of one dense run, and of two chains of three rounds
    assert all(run_of(row).id == row["run_id"] for row in rows)
    assert {row["round"] for row in rows} == {0, 1, 2}
    assert len(store.records()) == len((folder / "runs.jsonl").read_bytes().splitlines())
    before = (folder / "rows.jsonl").read_bytes()
    with store.claim([rows[-1]["run_id"]]) as lease:
        store.add(lease, [rows[-1]], [])
        assert (folder / "rows.jsonl").read_bytes() == before, "the same row again"
        with pytest.raises(ValueError, match="stored"):
            store.add(lease, [rows[-1] | {"kept": 1}], [])
        store.add(lease, [rows[-1] | {"round": 3}], [])
    assert store.rows() == [*rows, rows[-1] | {"round": 3}]
