"""`make size` counts code and nothing else, and its budget is of the folders that there are."""

from __future__ import annotations

from collections import Counter

import size

PYTHON = '''"""A module.

Two paragraphs."""

import os  # counts

# does not
def f(
    x,
):
    """Nor this."""
    text = """
    but this
    """
    return text, x
'''
CPP = """// no
#include <x>

/* nor
   this */
int f() {  // counts
    return 1;
}
"""


def test_blank_lines_comments_and_docstrings_do_not_count():
    assert size.lines_of_python(PYTHON) == 8
    assert size.lines_of_cpp(CPP) == 4


def test_a_folder_is_a_row_with_its_change():
    now, before = (
        Counter({"csrc/rim": 1200, "tests": 5}),
        Counter({"csrc/rim": 1250, "csrc/old": 7}),
    )
    rows = {row.rpartition("  ")[0].strip() or row: row.split() for row in size.table(now, before)}
    assert ["csrc/rim", "1,200", "-50"] in rows.values()
    assert ["csrc/old", "0", "-7"] in rows.values()
    assert ["all", "of", "csrc", "1,200", "-57"] in rows.values()
    assert ["all", "1,205", "-52"] in rows.values()


def test_a_folder_over_its_budget_is_a_failure(monkeypatch, capsys):
    now = size.measured()
    monkeypatch.setattr(size, "measured", lambda: now)
    monkeypatch.setattr(size, "budget", lambda: now)
    assert size.main([]) == 0
    assert capsys.readouterr().err == ""

    less = now - Counter({"csrc/rim": 7, "tests/nn": now["tests/nn"]})  # and a folder that is new
    more = less + Counter({"csrc/step": 100})  # lines of one folder are not another's
    monkeypatch.setattr(size, "budget", lambda: more)
    assert size.main([]) == 1
    first, second, way_out = capsys.readouterr().err.splitlines()
    assert first == f"csrc/rim has {now['csrc/rim']:,} lines of code, 7 over its budget."
    assert second.startswith("tests/nn has ")
    assert "size.py --write" in way_out


def test_the_budget_names_the_folders_that_there_are():
    folders = set(map(size.folder_of, size.sources()))
    assert size.budget().keys() == folders, "python tests/house/size.py --write"
