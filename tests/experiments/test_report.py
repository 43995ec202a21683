"""The report: one page that holds everything, says every verdict, and fits a phone."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest
import study_rows
from study_rows import STUDIES, Study

from experiments import page, report
from experiments.tables import Table

CHOSEN = [STUDIES[name] for name in ("mask-criteria", "mask-0", "supermasks", "learned")]
VOID = {"meta", "img", "br", "wbr", "link"}


@dataclass(frozen=True)
class Claim:
    study: str
    text: str


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    status: str
    numbers: str


def judge(rows, network, profile, study):
    """One verdict of each kind for mask-0, none for others."""
    if study != "mask-0":
        return []
    return [
        Verdict(Claim(study, f"{word} <claim>"), word, "97.9% against 96.4%, p = 0.0012")
        for word in report.STATUSES
    ]


class Page(HTMLParser):
    """Elements with their attributes, the text, and whether tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


RECORD = {
    "seconds": 3.0,
    "started": "2026-11-24T10:00:00Z",
    "commit": "0123456789abcdef",
    "dirty": True,
    "versions": {"torch": "2.13.0", "numpy": "2.4"},
    "engine": "process",
    "outcome": "done",
    "machine": {"cpu": "EPYC (family 25)"},
}


@pytest.fixture(scope="module")
def rows():
    return study_rows.rows(CHOSEN)


@pytest.fixture(scope="module")
def text(rows):
    records = [{**RECORD, "run_id": row["run_id"], "round": row["round"]} for row in rows]
    return report.build(CHOSEN, rows, records, judge, "paper", ("fc", "conv4"))


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


def test_the_page_needs_nothing_else(text, parsed):
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "object", "base"}
    for _, attributes in parsed.elements:
        for name in ("src", "href"):
            if name in attributes:
                assert re.match(r"data:|#", attributes[name])
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in text
    assert "url(" not in text


def test_links_of_the_contents_lead_somewhere(parsed):
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"][1:] for a in parsed.all("a") if a["href"].startswith("#")]
    assert links == [study.name for study in CHOSEN]
    assert set(links) <= set(ids)


def test_every_figure_is_told_in_words(parsed):
    images = parsed.all("img")
    assert len(images) == len(CHOSEN)
    for image in images:
        assert len(image["alt"]) > 60
        assert "FC on MNIST" in image["alt"]


def test_each_verdict_stands_there_as_a_word(parsed):
    for word in report.STATUSES:
        assert f"{word} <claim>" in parsed.text
    assert "\N{CHECK MARK} holds" in parsed.text
    assert "\N{BALLOT X} fails" in parsed.text
    assert "1 hold, 1 fail, 1 with too few runs" in parsed.text


def test_a_study_with_rows_of_others_alone_was_run_in_part(rows):
    names = "mask-criteria", "rescaling"  # the second shares rewinding with the first
    found = report.build([STUDIES[n] for n in names], rows, [], judge, "paper", ("fc",))
    words = Page(found).text
    assert "mask-criteria run rescaling run in part" in words


def test_text_of_others_is_escaped(text):
    assert "Why &lt;this&gt; &amp; that?" in text
    assert "<claim>" not in text


def test_it_says_how_it_was_run(parsed):
    for words in (
        "Adam, rate 0.0012, batch 60, 50,380 iterations a round",
        "0.8 of hidden, 0.9 of output",
        "rounds 0 to 7: dense, dense, dense; rounds 8 to 20: sparse, dense, dense",
        "0123456789 with changes",
        "EPYC (family 25)",
        "numpy 2.4, torch 2.13.0",
        "SGD with momentum 0.9, rate 100, batch 250, 440,000 iterations",
        "Not run on Conv4: python -m experiments run mask-0 --network conv4 --profile paper",
    ):
        assert words in parsed.text


def test_the_paper_profile_says_what_it_chose(text):
    top = text[: text.index("<nav")]
    assert "all iterations of the paper" in top
    for choice in report.CHOICES:
        assert page.escape(choice) in top


def test_another_profile_says_so_at_the_top():
    rows = study_rows.rows(CHOSEN[1:2], profile="smoke", seeds=1)
    text = Page(report.build(CHOSEN[1:2], rows, [], judge, "smoke", ("fc",))).text
    assert "Profile smoke, not the paper's protocol: a thousandth of the iterations" in text


def test_a_store_without_rows_makes_a_page():
    text = Page(report.build(list(STUDIES.values()), [], [], judge, "paper")).text
    assert text.count("not run") >= len(STUDIES)


def test_the_same_rows_make_the_same_page(rows, text):
    few = [Study("mask-0", STUDIES["mask-0"].changes[:2])]
    pages = {report.build(few, rows, [], judge, "paper", ("fc",)) for _ in range(2)}
    assert len(pages) == 1


# ---- in a browser -------------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
needs_browser = pytest.mark.skipif(
    not BROWSER, reason="no Chromium here (apt-get install chromium)"
)

# A browser's window has a least width, a frame has none. The frame tells what sticks out of it.
PROBE = """<script>addEventListener("load", () => {
  const width = document.documentElement.clientWidth, out = [];
  for (const e of document.querySelectorAll("body *")) {
    const box = e.getBoundingClientRect();
    if (box.right > width + 1 && !e.closest(".scroll")) out.push(e.outerHTML.slice(0, 80));
  }
  if (document.documentElement.scrollWidth > width) out.push("the page scrolls sideways");
  const size = parseFloat(getComputedStyle(document.body).fontSize);
  const loaded = [...document.images].every(i => i.complete && i.naturalWidth > 0);
  parent.postMessage(JSON.stringify({width, out, size, loaded}), "*");
});</script></body>"""
FRAME = """<!DOCTYPE html><meta charset="utf-8"><body><script>
addEventListener("message", e => { document.body.dataset.told = e.data; });
</script><iframe width="%d" height="4000" style="border:0" src="probe.html"></iframe></body>"""


def chromium(tmp_path, *options):
    return subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-dev-shm-usage", "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}", *options,
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )  # fmt: skip


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_sticks_out_of_the_screen(text, tmp_path, width):
    (tmp_path / "probe.html").write_text(text.replace("</body>", PROBE), "utf-8")
    (tmp_path / "frame.html").write_text(FRAME % width, "utf-8")
    dom = chromium(
        tmp_path, "--virtual-time-budget=20000", "--dump-dom", f"file://{tmp_path / 'frame.html'}"
    ).stdout.decode()
    found = re.search(r'data-told="([^"]*)"', dom)
    assert found, "the page did not load"
    told = json.loads(found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">"))
    assert told == {"width": width, "out": [], "size": 16, "loaded": True}


@needs_browser
@pytest.mark.slow
def test_it_prints(text, tmp_path):
    paper, source = tmp_path / "report.pdf", tmp_path / "report.html"
    source.write_text(text, "utf-8")
    chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={paper}", f"file://{source}")
    pages = len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))
    assert len(CHOSEN) < pages < 6 * len(CHOSEN)  # each study starts a page


def test_tables_scroll_by_themselves():
    text = page.table(Table(("a_b", "c"), (("x_y", "1.00 [0.90, 1.10]"),), "Words & numbers"))
    assert 'class="scroll wide" tabindex="0" role="region" aria-label="Words &amp; numbers"' in text
    assert '<th scope="row">x_<wbr>y</th>' in text
    assert '1.00<span class="range">[0.90, 1.10]</span>' in text
