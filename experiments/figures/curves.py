"""Accuracy, or the iteration of the early stop, over density: figures 3, 4, 5, 7 and S5."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from experiments.figures.canvas import (
    Drawing,
    accuracy_axis,
    density_axis,
    legend,
    sheet,
    style,
)
from experiments.figures.styles import CRITERION, CYCLE, MASK0, MASK1, Style
from experiments.selection import ACCURACY, Curve, Selection
from experiments.statistics import ALPHA, Level, mean
from experiments.tables import ITERATION, LEARNED, all_levels, nearest, percent, rows_of

CHANCE = 0.1  # ten classes
TESTED = {"criterion": "large_final"}, {"criterion": "magnitude_increase"}
STYLES = (("mask1", MASK1, "rewind"), ("mask0", MASK0, "zero"), ("criterion", CRITERION, ""))


def mask_criteria(selection: Selection) -> Drawing:
    """Figure 3: tickets by each criterion; starred where two of them differ."""
    a, b = (selection.find(**fields) for fields in TESTED)
    pair = (a, b) if a and b else None
    return trained(selection, "Which weights to keep: accuracy after training", pair)


def mask1_actions(selection: Selection) -> Drawing:
    """Figure 4: what kept weights restart from, dotted without their signs, solid with them."""
    return trained(selection, "What kept weights restart from")


def mask0_actions(selection: Selection) -> Drawing:
    """Figure 5: what pruned weights hold."""
    return trained(selection, "What pruned weights hold")


def same_sign(selection: Selection) -> Drawing:
    """Figure S5: tickets with and without the weights whose sign changed."""
    return trained(selection, "Tickets by sign: accuracy after training")


def late_rewinding(selection: Selection) -> Drawing:
    """Tickets that restart from the dense run's weights at a later iteration."""
    renamed = tuple(
        replace(curve, label=f"from iteration {curve.fields['rewind_to']:,}")
        for curve in selection.curves
    )
    return trained(replace(selection, curves=renamed), "Rewinding to a later iteration")


def rescaling(selection: Selection) -> Drawing:
    return trained(selection, "Restarting weights, as they are and divided by density")


def trained(selection: Selection, title: str, pair: tuple[Curve, Curve] | None = None) -> Drawing:
    """Curves of trained networks, the dense network as a line, bands from lowest to highest seed.

    Where some curves fall far below the others, a second panel shows the upper part enlarged.
    pair: two curves that are tested at each level.
    """
    curves = [(curve, curve.levels()) for curve in selection.curves]
    zoom = _zoom([levels for _, levels in curves])
    with style():
        figure = sheet(_height(len(curves) + 1, 2 if zoom else 1), title, selection)
        panels = figure.subplots(2 if zoom else 1, 1, sharex=True, squeeze=False)[:, 0].tolist()
        for axes in panels:
            _dense_line(axes, selection)
            _draw(axes, curves)
            accuracy_axis(axes, "test accuracy")
        if zoom:
            panels[0].set_ylim(zoom)
            accuracy_axis(panels[0], "test accuracy, enlarged")
            panels[0].tick_params(labelbottom=True)
            panels[0].set_xlabel("")
        if pair:
            _stars(panels[0], selection, *pair)
        _density(panels, curves)
        legend(figure, panels[0])
        return Drawing(figure, all_levels(selection), _alt(title, selection, curves))


def early_stop(selection: Selection) -> Drawing:
    """The iteration of the lowest validation loss over density: earlier is faster."""
    title = "How fast: iteration of the lowest validation loss"
    curves = [(curve, curve.levels(ITERATION)) for curve in selection.curves]
    with style():
        figure = sheet(_height(len(curves) + 1, 1), title, selection)
        axes = figure.subplots()
        _dense_line(axes, selection, ITERATION)
        _draw(axes, curves)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        axes.set_ylabel("iteration")
        _density([axes], curves)
        legend(figure, axes)
        numbers = all_levels(selection, ITERATION)
        return Drawing(figure, numbers, _alt(title, selection, curves, ITERATION))


def supermasks(selection: Selection) -> Drawing:
    """Figure 7: masked, never trained; initial weights first, signed constants second.

    Learned masks stand where their density is, dashed lines are trained dense networks and chance.
    """
    title = "Masked, but never trained"
    parts = {"init": "initial weights", "signed_constant": "signed constants"}
    shown = {
        weights: [(c, c.levels()) for c in selection.curves if c.fields["weights"] == weights]
        for weights in parts
    }
    shown = {weights: curves for weights, curves in shown.items() if curves}
    count = max((len(curves) for curves in shown.values()), default=0)
    with style():
        figure = sheet(_height(count + 3, len(shown)), title, selection)
        panels = figure.subplots(max(1, len(shown)), 1, sharex=True, squeeze=False)[:, 0].tolist()
        for axes, (weights, curves) in zip(panels, shown.items(), strict=False):
            _dense_line(axes, selection)
            axes.axhline(CHANCE, color="black", linewidth=1, linestyle=":", label="chance")
            _draw(axes, curves, by_criterion=True)
            _learned(axes, selection, weights)
            accuracy_axis(axes, "test accuracy, untrained")
            axes.set_ylim(0, 1.02)
            axes.set_title(parts[weights], loc="left")
            axes.tick_params(labelbottom=True)
        every = [curve for curves in shown.values() for curve in curves]
        _density(panels, every)
        legend(figure, panels[0])
        return Drawing(figure, all_levels(selection), _alt(title, selection, every))


def _draw(
    axes: Axes, curves: Sequence[tuple[Curve, Sequence[Level]]], by_criterion: bool = False
) -> None:
    counts = {level.n for _, levels in curves for level in levels}
    for i, (curve, levels) in enumerate(curves):
        look = _style(curve, i, [other for other, _ in curves], by_criterion)
        label = look.label or (curve.fields["criterion"] if by_criterion else curve.label)
        if len(counts) > 1:
            label += f" (n = {_range([level.n for level in levels])})"
        density = [level.density for level in levels]
        axes.plot(density, [level.mean for level in levels], label=label, **look.plot)
        if any(level.n > 1 for level in levels):
            low, high = [level.low for level in levels], [level.high for level in levels]
            axes.fill_between(density, low, high, color=look.color, alpha=0.13, linewidth=0)


def _style(curve: Curve, i: int, curves: Sequence[Curve], by_criterion: bool) -> Style:
    """By the field in which the curves differ; by position where none has styles of its own."""
    for field, styles, _ in STYLES if not by_criterion else STYLES[2:]:
        values = {other.fields[field] for other in curves}
        if len(values) > 1 and field != "criterion":
            if curve.fields["criterion"] == "random":
                return CRITERION["random"]
            return styles.get(curve.fields[field], CYCLE[i % len(CYCLE)])
        if field == "criterion" and (by_criterion or len(values) == len(curves)):
            return styles.get(curve.fields[field], CYCLE[i % len(CYCLE)])
    return CYCLE[i % len(CYCLE)]


def _dense_line(axes: Axes, selection: Selection, value: str = ACCURACY) -> None:
    """Over the seeds that all curves have: seeds differ by as much as some arms do."""
    seeds = set.intersection(*({row["seed"] for row in curve.rows} for curve in selection.curves))
    values = [
        row[value]
        for row in selection.dense
        if row.get(value) is not None and (row["seed"] in seeds or not seeds)
    ]
    if values:
        label = f"dense, trained (mean, n = {len(values)})"
        axes.axhline(mean(values), color="black", linewidth=1.1, linestyle="--", label=label)


def _learned(axes: Axes, selection: Selection, weights: str) -> None:
    """Learned masks without and with rescaling: mean over seeds, at their density."""
    for rescale, marker in ((False, "*"), (True, "X")):
        rows = rows_of(selection.rows, {**LEARNED, "weights": weights, "rescale": rescale})
        rows = [row for row in rows if row["round"] == 1]
        if not rows:
            continue
        axes.plot(
            mean([row["density"] for row in rows]),
            mean([row[ACCURACY] for row in rows]),
            marker=marker,
            markersize=11,
            color="black",
            markerfacecolor="white" if rescale else "black",
            linestyle="none",
            label="learned mask" + (", rescaled" if rescale else ""),
        )


def _stars(axes: Axes, selection: Selection, a: Curve, b: Curve) -> None:
    """Two rows above the panel: p < 0.05 as in the paper, and the same by Holm's p."""
    tests = selection.compare(a, b)
    place = axes.get_xaxis_transform()
    names = f"{a.label} and {b.label}"
    if all(test.p is None for test in tests):
        counts = _range([test.n for test in tests] or [0])
        text = f"{names}: too few runs for a test (n = {counts})"
        axes.text(0, 1.02, text, transform=axes.transAxes, fontsize=7.5)
        return
    if not any(test.p is not None and test.p < ALPHA for test in tests):
        text = f"{names} differ at no level (by seed, p < {ALPHA})"
        axes.text(0, 1.02, text, transform=axes.transAxes, fontsize=7.5)
        return
    axes.text(
        0,
        1.12,
        f"* {names}: p < {ALPHA} (by seed); lower row: Holm's p",
        transform=axes.transAxes,
        fontsize=7.5,
    )
    for test in tests:
        for p, height in ((test.p, 1.045), (test.p_holm, 0.995)):
            if p is not None and p < ALPHA:
                axes.text(test.density, height, "*", transform=place, ha="center", fontsize=10)


def _density(panels: Sequence[Axes], curves: Sequence[tuple[Curve, Sequence[Level]]]) -> None:
    lowest = min((level.density for _, levels in curves for level in levels), default=0.012)
    for axes in panels:
        density_axis(axes, lowest)
    for axes in panels[:-1]:
        axes.set_xlabel("")


def _zoom(curves: Sequence[Sequence[Level]]) -> tuple[float, float] | None:
    """The range of the upper three quarters of all points, if the rest would squash them."""
    means = sorted(level.mean for levels in curves for level in levels)
    highs = [level.high for levels in curves for level in levels]
    if len(means) < 8:
        return None
    lower, top = means[len(means) // 4], max(highs)
    if top - means[0] < 3 * (top - lower):
        return None
    pad = 0.06 * (top - lower)
    return lower - pad, top + pad


def _height(entries: int, panels: int) -> float:
    """Inches: panels, and a legend of two columns below."""
    return 0.75 + 2.75 * max(1, panels) + 0.4 + 0.19 * ((entries + 1) // 2)


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _alt(
    title: str,
    selection: Selection,
    curves: Sequence[tuple[Curve, Sequence[Level]]],
    value: str = ACCURACY,
) -> str:
    """The figure in words: each curve at one level in the middle of the axis."""
    parts = [f"{title}: {selection.place}, {selection.seeds}, over the share of weights kept."]
    for tick in (0.168, 0.41, 0.069):
        found = {curve.label: nearest(levels, tick) for curve, levels in curves}
        if any(found.values()):
            words: Mapping[str, str] = {
                label: f"{level.mean:,.0f}" if value == ITERATION else f"{percent(level.mean, 1)}%"
                for label, level in found.items()
                if level
            }
            told = ", ".join(f"{label} {number}" for label, number in words.items())
            parts.append(f"At {percent(tick, 1)}% kept: {told}.")
            break
    return " ".join(parts)
