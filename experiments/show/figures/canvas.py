"""What all figures share: sizes, the density axis, legends, and files that are the same each time.

Figures are narrow with legends below, so that one drawing reads on a phone, on a desk and on paper.
"""

import contextlib
import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.files import write_whole
from experiments.findings.selection import Selection
from experiments.findings.tables import Table

WIDTH = 5.4  # inches
DPI = 160
KEPT = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # ticks of the density axis
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 3.4,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "svg.hashsalt": "lottery_sparse",
    "svg.fonttype": "path",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE):
        yield


@dataclass(frozen=True)
class Drawing:
    """A figure, the numbers behind it, and the words for who does not see it."""

    figure: Figure
    numbers: Table
    alt: str

    def __post_init__(self) -> None:
        """Lay it out here: each run of the layout engine moves things by a little.

        Twice, since texts beside the axes are measured where the first run put them.
        """
        with style():
            self.figure.draw_without_rendering()
            self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")

    def svg(self) -> bytes:
        return self._bytes("svg", {"Date": None, "Creator": None})

    def png(self) -> bytes:
        return self._bytes("png", {"Software": None})

    def _bytes(self, kind: str, metadata: dict[str, None]) -> bytes:
        file = io.BytesIO()
        with style():
            self.figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
        return file.getvalue()

    def save(self, folder: Path, stem: str) -> list[Path]:
        """Write stem.png, stem.svg, stem.csv."""
        contents = {"png": self.png(), "svg": self.svg(), "csv": self.numbers.csv()}
        paths = [folder / f"{stem}.{kind}" for kind in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            write_whole(path, content)
        return paths


def sheet(
    height: float, title: str, selection: Selection, note: str = "", seeds: str = ""
) -> Figure:
    """An empty figure; its head says the network, the seeds and what is not as in the paper.

    seeds: instead of their number per curve.
    """
    known = (selection.place, seeds or selection.seeds, note)
    facts = ", ".join(fact for fact in known if fact)
    lines = textwrap.wrap(facts, 74) + textwrap.wrap(selection.caveat, 74)
    figure = Figure(figsize=(WIDTH, height))
    rows = 0.27 + 0.155 * len(lines)  # inches of the head
    layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.05, rect=(0, 0, 0.99, 1 - rows / height))
    figure.set_layout_engine(layout)
    figure.text(0.012, 1 - 0.06 / height, title, fontsize=11, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.27 / height, "\n".join(lines), fontsize=8, va="top", linespacing=1.25)
    return figure


def density_axis(axes: Axes, lowest: float) -> None:
    """Weights kept, log scale, from 100% on the left; round ticks, and room for whole markers."""
    axes.set_xscale("log")
    axes.set_xticks([tick for tick in KEPT if tick >= lowest * 0.9])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}"))
    axes.set_xlim(1.09, lowest * 0.91)
    axes.set_xlabel("weights kept, % (log scale)")
    axes.grid(alpha=0.25)


def accuracy_axis(axes: Axes, label: str) -> None:
    """Fractions as percentages, with the digits that tell the ticks apart."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{round(100 * y, 3):g}%"))
    axes.set_ylabel(label)


def end_labels(axes: Axes, ends: Sequence[tuple[str, float, float, str, bool]]) -> None:
    """Names beside the last points of curves, moved apart where they would overlap.

    ends: name, x, y, colour, and whether the curve ends there: then its name stands right of the
        axes, otherwise, where the curve leaves the panel, in it.
    """
    low, high = axes.get_ylim()
    least = 0.052 * (high - low)
    above = high
    for name, _, y, color, at_end in sorted(ends, key=lambda end: -end[2]):
        if not at_end:
            continue
        y = min(y, above - least)
        above = y
        axes.text(1.012, y, name, color=color, fontsize=7.5, va="center",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    for name, x, y, color, at_end in ends:
        if not at_end:
            axes.annotate(name, (x, y), (7, 2), textcoords="offset points", color=color,
                          fontsize=7.5, annotation_clip=False)  # fmt: skip


def legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        once = dict(zip(labels, handles, strict=True))  # a name that several have is said once
        figure.legend(list(once.values()), list(once), loc="outside lower left", ncols=columns)
