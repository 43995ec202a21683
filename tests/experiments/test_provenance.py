"""Records say which commit, processor, libraries and kernels computed; what is unknown is null."""

import json
import subprocess

import pytest

from experiments.store import machine, provenance
from lottery_sparse.ops import dispatch


def test_a_record_says_what_computed():
    found = provenance.provenance()
    json.dumps(found)
    assert found["versions"].keys() == {"torch", "numpy", "python", "lottery_sparse"}
    here = found["machine"]
    assert here["cpu"]
    assert here["os"]
    assert here["kernels"]["numerics"] == dispatch.numerics()
    if dispatch.built("cpu"):
        assert here["kernels"]["variant"] in ("portable", "avx2", "avx512")
        assert here["kernels"]["compiler"]
    assert here["blas"]["library"]
    assert here["blas"]["isa"]


def test_two_processors_of_one_name_are_two(monkeypatch):
    fields = {"model name": "EPYC", "cpu family": "25", "model": "17", "stepping": "1"}
    monkeypatch.setattr(machine, "_cpu_fields", lambda: fields)
    first = machine.cpu_model()
    fields["model"] = "1"
    assert machine.cpu_model() != first == "EPYC (family 25, model 17, stepping 1)"
    del fields["stepping"]
    assert machine.cpu_model().endswith("stepping unknown)")
    fields.clear()
    assert machine.cpu_model()


def git(folder, *arguments: str) -> None:
    names = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository whose folder `experiments` is taken for ours."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "file").write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    monkeypatch.setattr(provenance, "HERE", folder.resolve())
    return folder


def test_a_checkout_is_clean_or_dirty(checkout):
    commit, dirty = provenance._revision()
    assert len(commit) == 40
    assert dirty is False
    (checkout / "file").write_text("2")
    assert provenance._revision() == (commit, True)


@pytest.mark.parametrize("why", ["no git", "another owner", "status fails"])
def test_where_git_fails_nothing_is_called_clean(checkout, why, monkeypatch):
    if why == "no git":
        monkeypatch.setenv("PATH", f"{checkout}")
    elif why == "another owner":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    else:
        ask = provenance._git
        monkeypatch.setattr(
            provenance, "_git", lambda *words: None if words[0] == "status" else ask(*words)
        )
    commit, dirty = provenance._revision()
    assert dirty is None
    assert (commit is None) == (why != "status fails")


def test_somebody_elses_repository_is_not_ours(checkout, monkeypatch):
    deeper = checkout / "experiments"
    deeper.mkdir()
    monkeypatch.setattr(provenance, "HERE", deeper.resolve())
    assert provenance._revision() == (None, None)
