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


def test_the_budget_names_the_folders_that_there_are():
    folders = set(map(size.folder_of, size.sources()))
    assert size.budget().keys() == folders, "python tests/house/size.py --write"
