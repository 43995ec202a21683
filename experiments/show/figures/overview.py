"""The picture of README.md: what a ticket is worth, and what a step of it costs.

Two panels over density, drawn from rows of `mask-criteria` and from the numbers of `speed`. Letters
are large, since a phone shows the picture a third as wide.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.findings.selection import Selection
from experiments.findings.statistics import Level
from experiments.findings.tables import Table
from experiments.show.figures.canvas import Drawing, style

MARGIN = 0.001  # of accuracy: as good as the dense network
TICKS = (1.0, 0.3, 0.1, 0.03, 0.01)
SIZE = (7.0, 4.1)  # inches
COLORS = {"ours": "#00429d", "theirs": "#b85412", "dense": "#000000"}


def overview(selection: Selection, speed: Mapping[str, Any]) -> Drawing:
    """Accuracy over density on the left, milliseconds of a step on the right.

    Args:
        selection: of the study `mask-criteria`, with the arms large_final and random.
        speed: what `python -m experiments speed --json` wrote.

    Raises:
        ValueError: there are no rows of one of the arms.
    """
    found = {name: selection.find(criterion=name) for name in ("large_final", "random")}
    curves = {name: curve.levels() for name, curve in found.items() if curve is not None}
    if missing := [name for name in found if name not in curves]:
        raise ValueError(f"overview needs rows of mask-criteria with {missing[0]}; run them first.")
    ticket, control = curves["large_final"], curves["random"]
    steps = [
        (row["density"], _ms(row, "ours", speed), _ms(row, "eager_fused", speed))
        for row in speed["rounds"]
    ]
    title = _title(ticket, steps)
    with style():
        figure = Figure(figsize=SIZE, layout="constrained")
        figure.suptitle(title, fontsize=13, x=0.01, ha="left")
        left, right = figure.subplots(1, 2)
        _accuracy(left, ticket, control)
        _times(right, steps)
        for axes in (left, right):
            _density_axis(axes)
        return Drawing(figure, _numbers(ticket, control, steps), title.replace("\n", " "))


def _ms(row: Mapping[str, Any], way: str, speed: Mapping[str, Any]) -> float:
    return row[way] / speed["iterations"] * 1e3


def _title(ticket: Sequence[Level], steps: Sequence[tuple[float, float, float]]) -> str:
    """The result, in numbers of the rows: the sparsest ticket that loses nothing."""
    dense = ticket[0].mean
    level = min((t for t in ticket if t.mean >= dense - MARGIN), key=lambda t: t.density)
    _, ours, _ = min(steps, key=lambda step: abs(step[0] - level.density))
    ratio = steps[0][2] / ours
    return (
        f"With {level.density:.1%} of its weights a ticket is as accurate as\n"
        f"the dense network ({level.mean:.1%}), and trains {ratio:.1f} times as fast"
    )


def _accuracy(axes: Axes, ticket: Sequence[Level], control: Sequence[Level]) -> None:
    for levels, name, place, color, line, marker in (
        (ticket, "ticket", (0.05, 0.9865), COLORS["ours"], "-", "o"),
        (control, "random mask", (0.7, 0.956), COLORS["theirs"], "--", "s"),
    ):
        density = [level.density for level in levels]
        means = [level.mean for level in levels]
        axes.plot(density, means, line, marker=marker, color=color, markersize=4)
        axes.fill_between(
            density, [v.low for v in levels], [v.high for v in levels], color=color, alpha=0.15
        )
        axes.text(*place, name, color=color, fontsize=12)
    axes.axhline(ticket[0].mean, color=COLORS["dense"], linewidth=1, linestyle=":")
    axes.text(1.0, 0.9865, "dense network", fontsize=12)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%"))
    axes.set_title("test accuracy", fontsize=12, loc="left")
    axes.set_ylim(0.86, 0.997)


def _times(axes: Axes, steps: Sequence[tuple[float, float, float]]) -> None:
    density = [step[0] for step in steps]
    for at, name, place, color, line, marker in (
        (2, "torch.nn.utils.prune", (0.98, 2.45), COLORS["theirs"], "--", "s"),
        (1, "lottery_sparse", (0.28, 1.12), COLORS["ours"], "-", "o"),
    ):
        times = [step[at] for step in steps]
        axes.plot(density, times, line, marker=marker, color=color, markersize=4)
        axes.text(*place, name, color=color, fontsize=12)
    axes.set_ylim(0, 2.8)
    axes.set_title("milliseconds a step", fontsize=12, loc="left")


def _density_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xlim(1.15, 0.0105)
    axes.set_xticks(TICKS)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
    axes.set_xlabel("weights kept", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.25)


def _numbers(
    ticket: Sequence[Level], control: Sequence[Level], steps: Sequence[tuple[float, float, float]]
) -> Table:
    rows = [
        (name, level.density, level.n, level.mean, level.low, level.high)
        for name, levels in (("ticket", ticket), ("random mask", control))
        for level in levels
    ]
    for at, name in ((1, "lottery_sparse, ms"), (2, "torch.nn.utils.prune, ms")):
        rows += [(name, step[0], 1, step[at], step[at], step[at]) for step in steps]
    columns = ("curve", "density", "n", "mean", "min", "max")
    return Table(columns, tuple(rows), "what overview.png shows")
