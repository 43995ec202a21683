"""The report: one page that holds everything, says every verdict, and fits a phone."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import study_rows
from study_rows import STUDIES, Study

from experiments.findings.claim import Claim
from experiments.findings.judging import Verdict
from experiments.findings.predicates import near
from experiments.findings.tables import Table
from experiments.show import numbering, overview, page, report
from experiments.study import studies

CHOSEN = [STUDIES[name] for name in ("mask-criteria", "mask-0", "supermasks", "learned")]
VOID = {"meta", "img", "br", "wbr", "link"}


def judge(rows, network, profile, study):
    """One verdict of each kind for mask-0, none for others."""
    if study != "mask-0":
        return []
    return [
        Verdict(
            Claim(study, f"{word} <claim>", (network,), {}, (1,), near("a", 0.5, 0.1),
                  original="about <half>"),
            network, profile or "paper", word, "97.9% against 96.4%, p = 0.0012", "97.9%",
            "+1.5 points",
        )
        for word in overview.STATUSES
    ]  # fmt: skip


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
    "threads": 2,
    "machine": {
        "cpu": "EPYC (family 25)",
        "cpu_flags": ["avx2", "avx512f"],
        "os": "Linux-6",
        "kernels": {"variant": "avx512", "compiler": "gcc 12"},
    },
}


@pytest.fixture(scope="module")
def rows():
    return study_rows.rows(CHOSEN)


@pytest.fixture(scope="module")
def text(rows):
    records = [{**RECORD, "run_id": row["run_id"], "round": row["round"]} for row in rows]
    return report.build(CHOSEN, rows, records, judge, ("paper",), ("fc", "conv4"))


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
    assert links[: len(CHOSEN)] == [study.name for study in CHOSEN]
    assert links[len(CHOSEN) :] == ["claims", "deviations", "costs", "failed"]
    assert set(links) <= set(ids)


def test_the_first_sentence_says_what_came_out(parsed, text):
    assert "Of 10 claims 2 hold, 2 fail, 2 have too few runs, 2 are not run and 2" in parsed.text
    assert text.index('id="outcome"') < text.index("<nav") < text.index("<img")


def test_figures_come_before_costs_and_deviations(text):
    places = [text.index(part) for part in ("<img", 'id="claims"', 'id="deviations"',
                                            'id="costs"', 'id="failed"')]  # fmt: skip
    assert places == sorted(places)


def test_negative_results_are_listed(parsed):
    said = parsed.text[parsed.text.index("What failed fails") :]
    assert "fails <claim> : FC, profile paper; the original: about <half>." in said
    assert "holds <claim>" not in said


def test_sections_are_questions(text):
    heads = re.findall(r"<h2[^>]*>([^<]*)</h2>", text)
    assert heads[: len(CHOSEN)] == [page.escape(study.question) for study in CHOSEN]


def test_every_figure_is_told_in_words(parsed):
    images = parsed.all("img")
    assert len(images) == len(CHOSEN)
    for image in images:
        assert len(image["alt"]) > 60
        assert "FC on MNIST" in image["alt"]


def test_each_verdict_stands_there_as_a_word(parsed):
    for word in overview.STATUSES:
        if word != "not run":  # those are counted
            assert f"{word} <claim>" in parsed.text
    assert "\N{CHECK MARK} holds" in parsed.text
    assert "\N{BALLOT X} fails" in parsed.text
    assert "original ours difference verdict" in parsed.text
    assert "about <half> 97.9% +1.5 points" in parsed.text


def test_a_study_with_one_arm_of_another_is_not_run(rows):
    names = "mask-criteria", "late-rewinding"  # the second begins with the first's `large_final`
    found = report.build([STUDIES[n] for n in names], rows, [], judge, ("paper",), ("fc",))
    assert 'id="late-rewinding-fc-paper"' not in found
    assert "late-rewinding FC python -m experiments run late-rewinding" in Page(found).text


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
        "mask-0 Conv4 python -m experiments run mask-0 --network conv4 --profile paper",
        "avx2 avx512f",
        "gcc 12",
        "Linux-6",
    ):
        assert words in parsed.text


def test_the_paper_profile_says_what_it_chose(text):
    assert "all iterations of the paper" in text[: text.index("<nav")]
    for choice in report.CHOICES:
        assert page.escape(choice) in text


def test_costs_are_the_core_hours_of_each_figure():
    few = [Study("mask-0", STUDIES["mask-0"].changes[:2])]
    rows = study_rows.rows(few, seeds=1, rounds=1)
    done = [{**RECORD, "run_id": row["run_id"], "round": row["round"]} for row in rows]
    done += [{**done[0], "outcome": "failed", "seconds": 9_000}]  # and one of another figure
    done += [{**done[0], "run_id": "other", "seconds": 3_600}]
    assert overview.core_hours(done) == pytest.approx((5 * 3.0 + 3_600) * 2 / 3_600)
    text = Page(report.build(few, rows, done, judge, ("paper",), ("fc",))).text
    assert "All runs of this store took 2.0 core-hours." in text
    assert "python -m experiments run mask-0 --network fc --profile paper 0.01 3" in text


def test_deviations_are_measured_where_both_sides_have_rows():
    study = studies.STUDIES["choices"]
    rows = [
        row | {"test_accuracy": 0.9 + 0.001 * run.seed + (0.002 if run.compounding else 0)}
        for run in study.runs("fc", "paper", range(3))
        for row in study_rows.of_run(run, 3)
    ]
    for row in rows:
        row["test_accuracy"] += 1e-5 * row["seed"] ** 2 * row["compounding"]
    table = overview.deviations(rows)
    effects = dict(table.rows)
    [compounding] = [effect for choice, effect in effects.items() if "compound" in choice]
    assert compounding.startswith("-0.20 points (FC, 3 seeds, mean of rounds 1 to 3, p < 0.0001")
    [coarse] = [effect for choice, effect in effects.items() if "every fourth" in choice]
    assert coarse.startswith("not measured yet (FC)")


def test_power_is_that_of_the_paired_test(parsed):
    table = parsed.text[parsed.text.index("Power: the true difference") :]
    assert "mask-0, FC on MNIST zero 3" in table


def test_figures_are_numbered_as_in_the_paper_and_in_the_article():
    assert numbering.studies_of("7") == ("supermasks",)
    assert numbering.studies_of("article-7") == ("mask-criteria",)
    assert numbering.figures_of("mask-0") == "figure 5 of the paper, figures 2 and 3 of the article"
    with pytest.raises(ValueError, match=r"figure must be one of 1, 2, .*article-10; got '8'"):
        numbering.studies_of("8")
    named = {name for table in (numbering.PAPER, numbering.ARTICLE) for n in table.values()
             for name in n}  # fmt: skip
    assert named <= set(studies.STUDIES)


def test_another_profile_says_so_at_the_top():
    rows = study_rows.rows(CHOSEN[1:2], profile="smoke", seeds=1)
    text = Page(report.build(CHOSEN[1:2], rows, [], judge, ("smoke",), ("fc",))).text
    assert "Profile smoke, not the paper's protocol: a thousandth of the iterations" in text


def test_a_store_without_rows_makes_a_page():
    text = Page(report.build(list(STUDIES.values()), [], [], judge, ("paper",))).text
    assert "Not run" in text
    assert "No claim fails." not in text


def test_the_same_rows_make_the_same_page(rows, text):
    few = [Study("mask-0", STUDIES["mask-0"].changes[:2])]
    pages = {report.build(few, rows, [], judge, ("paper",), ("fc",)) for _ in range(2)}
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
@pytest.mark.parametrize("width", [390, 1400])
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
