"""`make test-everywhere`: which settings ran, and what they said."""

from __future__ import annotations

import everywhere
import pytest

from lottery_sparse.ops import dispatch


def rows(capsys) -> dict[str, str]:
    """setting -> result, of the table."""
    table = capsys.readouterr().out.partition("result\n")[2]
    return {line.split()[0]: line.split(maxsplit=2)[2] for line in table.splitlines()}


def test_passed_and_failed(monkeypatch, capsys):
    code = "import os; raise SystemExit(os.environ.get('WRONG'))"
    monkeypatch.setattr(everywhere, "PYTEST", ("-c", code))
    monkeypatch.setattr(everywhere, "SETTINGS", {"right": {}, "wrong": {"WRONG": "here"}})
    assert everywhere.main([]) == 1
    assert rows(capsys) == {"right": "s  passed", "wrong": "s  FAILED"}
    assert everywhere.main(["right"]) == 0
    assert rows(capsys) == {"right": "s  passed"}


@pytest.mark.skipif(not dispatch.built("cpu"), reason="no native kernels")
def test_an_instruction_set_that_is_not_here(monkeypatch, capsys):
    monkeypatch.setattr(everywhere, "SETTINGS", {"avx1024": {"LS_CPU": "avx1024"}})
    assert everywhere.main([]) == 0
    assert "not run: LS_CPU is 'avx1024', but this build" in capsys.readouterr().out


def test_names(capsys):
    assert everywhere.main(["avx3"]) == 2
    assert "there is no setting avx3; settings: avx512, avx2" in capsys.readouterr().err


def test_files_that_hold_marked_tests():
    names = {file.rpartition("/")[2] for file in everywhere.FILES}
    assert {"test_native.py", "test_train_step.py", "test_optim.py"} <= names
    assert "test_data.py" not in names
