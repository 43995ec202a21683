"""The Markdown pages of the repository: their text, links, headings and blocks of Python."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from test_layers import ROOT

SKIPPED = {".venv", "build", "out", "node_modules", ".git", ".pytest_cache"}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\[]*(?:\[[^\]]*\][^\]\[]*)*\]\(([^)\s]+)\)")


def pages() -> list[Path]:
    found = [p for p in ROOT.rglob("*.md") if not SKIPPED & set(p.relative_to(ROOT).parts)]
    return sorted(found)


def prose(path: Path) -> str:
    """The page without its blocks of code, in which brackets are no links."""
    return re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """(file, anchor) of each link that stays in the repository."""
    for target in LINK.findall(prose(path)):
        if not target.startswith(("http:", "https:", "mailto:")):
            file, _, anchor = target.partition("#")
            yield (path.parent / file).resolve() if file else path, anchor


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def blocks(text: str) -> list[str]:
    return BLOCK.findall(text)


def sections(text: str) -> dict[str, list[str]]:
    """Heading of the second level -> its blocks, those above the first heading under ""."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    named = zip(["", *parts[1::2]], parts[0::2], strict=True)
    return {heading: found for heading, part in named if (found := blocks(part))}
