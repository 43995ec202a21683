"""Pieces of one self-contained HTML page: no script, no request, for screens and for paper."""

import base64
import html
from collections.abc import Iterable, Sequence

from experiments.findings import words
from experiments.findings.judging import Verdict
from experiments.findings.tables import Table, shown

# Images are drawn on white; in the dark they are inverted, hues kept.
CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --soft: #f3f4f6; --line: #d0d4da;
  --link: #00429d; --good: #14632b; --bad: #a11325; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #141518; --soft: #1f2126; --line: #3b3f47; --link: #9dbdf5;
    --good: #7fd396; --bad: #ff9b9b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 50rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.3rem; margin: 3rem 0 0.3rem; padding-top: 0.8rem;
  border-top: 2px solid var(--line); }
h3 { font-size: 1.1rem; margin: 1.8rem 0 0.5rem; }
h4 { font-size: 1rem; margin: 1.4rem 0 0.4rem; }
a { color: var(--link); }
p { margin: 0.5rem 0; }
.lead { font-size: 1.1rem; }
.note { background: var(--soft); border-left: 4px solid var(--line); padding: 0.5rem 0.8rem; }
nav li { margin: 0.35rem 0; }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; max-width: 40rem; height: auto; background: #fff; }
figcaption { font-size: 0.9rem; margin-top: 0.3rem; }
@media (prefers-color-scheme: dark) { figure img { filter: invert(0.92) hue-rotate(180deg); } }
.scroll { overflow-x: auto; margin: 0.4rem 0; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
.caption { font-size: 0.88rem; margin: 1rem 0 0.2rem; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: normal; }
thead th { border-bottom: 2px solid var(--line); background: var(--soft); }
tbody th { font-weight: 600; }
.wide td, .wide th { white-space: nowrap; }
.wide tbody th { white-space: normal; min-width: 7rem; }
.range { display: block; font-size: 0.8rem; opacity: 0.8; }
.claims table, .text table, .counts table { width: 100%; }
.claims td:nth-child(5) { white-space: nowrap; }
.claims th:first-child { min-width: 12rem; }
.claims .why td { font-size: 0.8rem; opacity: 0.8; padding-top: 0; }
.claims tr:has(+ .why) > * { border-bottom: 0; }
.text td:last-child { min-width: 5rem; }
.text code, .text td { overflow-wrap: anywhere; }
.idle { font-size: 0.9rem; opacity: 0.85; }
details { margin: 0.8rem 0; }
summary { cursor: pointer; font-weight: 600; font-size: 0.95rem; }
.holds { color: var(--good); font-weight: 700; }
.fails { color: var(--bad); font-weight: 700; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; font-size: 0.9rem;
  margin: 0.4rem 0; }
dt { font-weight: 600; }
dd { margin: 0; min-width: 0; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
@media (max-width: 34rem) {
  body { padding: 0.8rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.4rem; }
  .claims thead, .text thead { position: absolute; clip-path: inset(50%); width: 1px;
    height: 1px; overflow: hidden; }
  .claims tr, .text tr { display: block; padding: 0.4rem 0; }
  .claims .why, .text tr { border-bottom: 1px solid var(--line); }
  .claims tbody th, .claims td, .text tbody th, .text td { display: block; border: 0;
    padding: 0.1rem 0; }
  .claims td[data-name]::before, .text td[data-name]::before { font-weight: 600;
    content: attr(data-name) ": "; }
  .counts td, .counts th { padding: 0.3rem; font-size: 0.8rem; } }
@page { size: A4; margin: 15mm; }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --soft: #f0f0f0; --line: #999;
    --link: #000; --good: #000; --bad: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-before: page; border: 0; margin-top: 0; }
  details::details-content { content-visibility: visible; block-size: auto; }
  summary { list-style: none; }
  h2, h3, h4, .caption { break-after: avoid; }
  figure, tr, dl { break-inside: avoid; }
  figure img { filter: none; width: auto; max-width: 100%; max-height: 205mm; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  .wide td, .wide th { white-space: normal; padding: 0.15rem 0.3rem; }
  .wide tbody th { white-space: normal; min-width: 7rem; }
.range { font-size: 0.9em; }
  .download { display: none; } }
"""

MARKS = {"holds": "\N{CHECK MARK}", "fails": "\N{BALLOT X}"}


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def tag(name: str, text: str, **attributes: str) -> str:
    """An element around plain text."""
    return f"<{name}{_attributes(attributes)}>{escape(text)}</{name}>"


def box(name: str, parts: Iterable[str], **attributes: str) -> str:
    """An element around elements."""
    return f"<{name}{_attributes(attributes)}>\n" + "\n".join(parts) + f"\n</{name}>"


def section(title: str, id: str, *parts: str) -> str:
    """A part of the page under a heading that links name."""
    return box("section", [tag("h2", title, id=id), *parts])


def _attributes(attributes: dict[str, str]) -> str:
    return "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
    )


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image(svg: bytes, alt: str) -> str:
    return f'<img src="{data_uri("image/svg+xml", svg)}" alt="{escape(alt)}">'


def download(name: str, table: Table) -> str:
    uri = data_uri("text/csv", table.csv())
    return f'<a class="download" download="{escape(name)}" href="{uri}">{escape(name)}</a>'


def status(word: str) -> str:
    """A verdict: a sign and a word, so that colour says nothing alone."""
    kind = word if word in MARKS else "open"
    return f'<span class="{kind}">{MARKS.get(word, "")} {escape(word)}</span>'.replace("> ", ">")


def table(content: Table, kind: str = "wide") -> str:
    """A table that scrolls by itself where it is too wide; the first column heads its row."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in content.columns)
    body = []
    for first, *others in content.rows:
        cells = "".join(
            f'<td data-name="{escape(column)}">{_cell(shown(cell))}</td>'
            for column, cell in zip(content.columns[1:], others, strict=True)
        )
        name = escape(shown(first)).replace("_", "_<wbr>")
        body.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return _scroll(content.caption, head, body, kind)


def claims(verdicts: Sequence[Verdict]) -> str:
    """Claims: the original, ours, the difference, the verdict; the whole numbers below each."""
    names = ("claim", "original", "ours", "difference", "verdict")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = []
    for v in verdicts:
        text, ours, difference, numbers = (
            escape(words.said(some, v.claim.study))
            for some in (v.claim.text, v.ours, v.difference, v.numbers)
        )
        cells = (escape(v.claim.original), ours, difference, status(v.status))
        told = "".join(
            f'<td data-name="{name}">{cell}</td>'
            for name, cell in zip(names[1:], cells, strict=True)
        )
        body.append(f'<tr><th scope="row">{text}</th>{told}</tr>')
        body.append(f'<tr class="why"><td colspan="5">{numbers}</td></tr>')
    return _scroll("", head, body, "claims")


def item(head: str, text: str) -> str:
    return f"<li><strong>{escape(head)}</strong>: {escape(text)}.</li>"


def folded(summary: str, parts: Iterable[str]) -> str:
    """What is there on demand, and on paper."""
    return box("details", [tag("summary", summary), *parts])


def _scroll(caption: str, head: str, body: Sequence[str], kind: str) -> str:
    label = escape(caption or kind)
    return (
        (tag("p", caption, class_="caption") if caption else "")
        + f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """A range stands below its mean."""
    mean, bracket, rest = text.partition(" [")
    if not bracket:
        return escape(text)
    return f'{escape(mean)}<span class="range">[{escape(rest)}</span>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    return box("dl", (tag("dt", name) + tag("dd", text) for name, text in pairs if text))


def page(title: str, parts: Iterable[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
