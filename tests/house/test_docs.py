"""The pages: their blocks run, their links lead somewhere, and a reader finds what there is."""

from __future__ import annotations

import json
import re

import api_index
import pytest
import torch
from pages import anchors, blocks, links, pages, sections
from test_layers import ROOT

GUIDE = (ROOT / "docs" / "guide.md").read_text("utf-8")
SECTIONS = sections(GUIDE)
README = ROOT / "README.md"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Whatever a block writes, a plan's times too, is written here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LS_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("heading", [name for name in SECTIONS if name])
def test_a_section_of_the_guide_runs(heading):
    torch.manual_seed(0)
    names = {}
    for block in SECTIONS[""] + SECTIONS[heading]:
        exec(compile(block, f"docs/guide.md, {heading}", "exec"), names)


def test_the_first_block_of_the_readme_runs_as_it_stands():
    exec(blocks(README.read_text("utf-8"))[0], {})


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    lost = []
    for file, anchor in links(page):
        if not file.exists():
            lost.append(str(file))
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            lost.append(f"{file}#{anchor}")
    assert not lost


MOST_LINES = {"README.md": 150} | {
    f"{folder}/README.md": 60 for folder in ("lottery_sparse", "csrc", "tests")
}


@pytest.mark.parametrize("page", MOST_LINES)
def test_first_pages_are_short(page):
    assert len((ROOT / page).read_text("utf-8").splitlines()) <= MOST_LINES[page]


# What a fresh reader looks for -> the file that holds it, and words that are in it.
QUESTIONS = {
    "the CUDA kernel of compact dW": ("csrc/linear/compact_dvalues_cuda.cu", "dvalues_kernel"),
    "what decides dense or sparse on a CPU": ("lottery_sparse/ops/masked/cpu.py", "def is_faster"),
    "the test that masks hold": ("tests/nn/test_invariant.py", "Masks hold"),
    "the claim about Variant 1": ("experiments/results/claims.md", "Variant 1"),
    "what a ticket file looks like": ("docs/guide.md", "What a ticket file looks like"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_fresh_reader_finds_it_in_two_clicks(question):
    file, words = QUESTIONS[question]
    assert words in (ROOT / file).read_text("utf-8")
    first = {target for target, _ in links(README)}
    second = {t for page in first if page.suffix == ".md" for t, _ in links(page)}
    assert ROOT / file in first | second


# ---- the numbers of the first page -------------------------------------------------------------

# row of the table -> bench, fields, and for each column (contenders, density)
STEPS = {
    "a linear layer, 784 x 300": ("compact_linear", {"layer": "lenet fc1", "batch": 64}),
    "a linear layer, 4096 x 4096": ("compact_linear", {"layer": "4096 x 4096", "batch": 256}),
    "a convolution, 64 channels": ("compact_conv2d", {"layer": "64 ch, 32 x 32", "batch": 64}),
    "LeNet-300-100 with Adam": ("lenet_step", {"network": "LeNet"}),
    "inference, 4096 x 4096": ("packed_linear", {"layer": "4096 x 4096", "batch": 1}),
}
DENSE = ("F.linear", "F.conv2d", "F.conv2d channels_last", "torch fused", "F.linear fp32")
OURS = ("ls compact", "ls compact channels_last", "ls.train_step", "ls csr", "ls bitmap")


@pytest.mark.parametrize("row", STEPS)
def test_milliseconds_are_those_of_the_committed_rows(row):
    bench, fields = STEPS[row]
    rows = json.loads((ROOT / "benchmarks/results/cpu.json").read_text("utf-8"))["rows"]
    rows = [r for r in rows if r["bench"] == bench and fields.items() <= r.items()]

    def best(names, density=None):
        times = [
            r["min_us"] / 1e3
            for r in rows
            if r["contender"] in names and density in (None, r["density"]) and r.get("threads") != 2
        ]
        return min(times)

    [line] = [li for li in README.read_text("utf-8").splitlines() if li.startswith(f"| {row}")]
    shown = [cell.strip() for cell in line.strip("|").split("|")][1:]
    columns = [(DENSE, None), (OURS, 0.5), (OURS, 0.1), (OURS, 0.05)]
    for cell, (names, density) in zip(shown, columns, strict=True):
        if cell != "dense":
            decimals = len(cell.partition(".")[2])
            assert f"{best(names, density):.{decimals}f}" == cell, (row, density)


def test_verdicts_are_those_of_the_committed_claims():
    """Each row of the table of claims is a line of claims.md, with these numbers and verdict."""
    claims = (ROOT / "experiments/results/claims.md").read_text("utf-8").splitlines()
    text = README.read_text("utf-8")
    table = text[text.index("| claim, ") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 5
    for line in table:
        _, here, verdict = (cell.strip() for cell in line.strip("|").split("|"))
        numbers = re.findall(r"\d+\.\d+%|\d seeds", here)
        fits = [c for c in claims if "| fc |" in c and all(number in c for number in numbers)]
        assert any(f"| {verdict} |" in c for c in fits), line


def test_pages_name_no_machine_and_no_registry():
    for page in pages():
        text = page.read_text("utf-8")
        found = re.search(r"/home/|/work/|/Users/|pypi|index-url|whl/", text)
        assert found is None, f"{page}: {found and found[0]}"


def test_what_pages_import_needs_no_checkout():
    """The guide is for who has the package alone."""
    modules = set(re.findall(r"^(?:from|import) (\w+)", GUIDE, re.MULTILINE))
    assert modules <= {"torch", "lottery_sparse"}


def test_the_api_index_is_complete():
    assert not api_index.missing(), "GROUPS of api_index.py and ls.__all__ differ"
    assert api_index.PAGE.read_text("utf-8").splitlines() == api_index.page().splitlines(), (
        "docs/api.md is not that of the docstrings: python tests/house/api_index.py"
    )


def test_every_public_name_says_what_it_is():
    silent = [name for name, value in api_index.public().items() if not api_index.sentence(value)]
    assert not [name for name in silent if not isinstance(api_index.public()[name], dict)]
