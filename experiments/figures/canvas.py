"""What all figures share: sizes, the density axis, legends, and files that are the same each time.

Figures are narrow with legends below, so that one drawing reads on a phone, on a desk and on paper.
"""

import contextlib
import io
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.files import write_whole
from experiments.selection import Selection
from experiments.tables import TICKS, Table

WIDTH = 5.4  # inches
DPI = 160
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
        """Lay it out once: each run of the layout engine moves things by a little."""
        with style():
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
    layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.05, rect=(0, 0, 1, 1 - rows / height))
    figure.set_layout_engine(layout)
    figure.text(0.012, 1 - 0.06 / height, title, fontsize=11, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.27 / height, "\n".join(lines), fontsize=8, va="top", linespacing=1.25)
    return figure


def density_axis(axes: Axes, lowest: float) -> None:
    """Weights kept, log scale, from 100% on the left; ticks where the paper has them."""
    axes.set_xscale("log")
    ticks = [tick for tick in (*TICKS, 0.005) if tick >= lowest * 0.95]
    if lowest < 0.85 * ticks[-1]:  # a curve that ends between two of them
        ticks.append(lowest)
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: "100" if x >= 1 else f"{100 * x:.1f}")
    )
    axes.set_xlim(1.08, min(lowest, ticks[-1]) * 0.93)
    axes.set_xlabel("weights kept, % (log scale)")
    axes.grid(alpha=0.25)


def accuracy_axis(axes: Axes, label: str) -> None:
    """Fractions as percentages, with the digits that tell the ticks apart."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{round(100 * y, 3):g}%"))
    axes.set_ylabel(label)


def legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower left", ncols=columns)
