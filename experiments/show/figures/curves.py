"""Accuracy, or the iteration of the early stop, over density: figures 3, 4, 5, 7 and S5.

All curves of a figure, and its dashed line of the dense network, are of the same seeds.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from experiments.findings import words
from experiments.findings.claim import SOONER
from experiments.findings.selection import ACCURACY, Curve, Selection
from experiments.findings.statistics import ALPHA, Level, levels, mean
from experiments.findings.tables import ITERATION, all_levels, nearest, percent, ticks_of
from experiments.show.figures.canvas import (
    Drawing,
    accuracy_axis,
    density_axis,
    end_labels,
    legend,
    sheet,
    style,
)
from experiments.show.figures.styles import CRITERION, CYCLE, MASK0, MASK1, Style

TESTED = {"criterion": "large_final"}, {"criterion": "magnitude_increase"}
STYLES = (("mask1", MASK1, "rewind"), ("mask0", MASK0, "zero"), ("criterion", CRITERION, ""))
# The article's nine curves of figure 3; the criteria by sign are in the figure of tickets by sign.
WINNERS = ("large_final", "magnitude_increase", "movement", "large_init_large_final")
NOT_IN_FIGURE_3 = ("large_final_same_sign", "large_final_diff_sign")


def mask_criteria(selection: Selection) -> Drawing:
    """Figure 3: tickets by each criterion; starred where two of them differ."""
    selection = selection.only(lambda c: c.fields["criterion"] not in NOT_IN_FIGURE_3)
    a, b = (selection.find(**fields) for fields in TESTED)
    pair = (a, b) if a and b else None
    own = {curve.fields["criterion"] for curve in selection.curves} - set(CRITERION)  # of the user
    title = "Which weights to keep: accuracy after training"
    return trained(selection, title, pair, {*WINNERS, *own})


def mask1_actions(selection: Selection) -> Drawing:
    """Figure 4: what kept weights restart from, dotted without their signs, solid with them."""
    return trained(selection, "What kept weights restart from")


def mask0_actions(selection: Selection) -> Drawing:
    """Figure 5: what pruned weights hold; below, what each value gains over zero by seed."""
    title = "What pruned weights hold"
    whole, selection = selection, selection.shared
    zero = selection.find(mask0="zero")
    others = [curve for curve in selection.curves if curve is not zero]
    if zero is None or not others:
        return trained(whole, title)
    curves = [(curve, curve.levels()) for curve in selection.curves]
    gains = [(curve, _gains(curve, zero)) for curve in others]
    with style():
        figure = sheet(height_of(len(curves) + 1, 2), title, selection, seeds=seeds_told(whole))
        upper, lower = figure.subplots(2, 1, sharex=True)
        dense_line(upper, selection)
        draw_curves(upper, curves)
        accuracy_axis(upper, "test accuracy")
        upper.tick_params(labelbottom=True)
        lower.axhline(0, color=MASK0["zero"].color, linewidth=1.1)
        draw_curves(lower, gains, [curve for curve, _ in curves])
        lower.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{round(100 * y, 3):+g}"))
        lower.set_ylabel("points above zero, by seed")
        density_axes([upper, lower], curves)
        legend(figure, upper)
        return Drawing(figure, all_levels(selection), alt_of(title, selection, curves))


def _gains(curve: Curve, base: Curve) -> tuple[Level, ...]:
    """What a curve is above another one, seed by seed, at the pruned levels of both."""
    there = {(row["seed"], row["round"]): row[ACCURACY] for row in base.rows}
    return levels(
        {**row, ACCURACY: row[ACCURACY] - there[row["seed"], row["round"]]}
        for row in curve.rows
        if row["round"] > 0 and (row["seed"], row["round"]) in there
    )


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


def trained(
    selection: Selection,
    title: str,
    pair: tuple[Curve, Curve] | None = None,
    winners: Collection[str] = (),
) -> Drawing:
    """Curves of trained networks, the dense network as a line, bands from lowest to highest seed.

    Where some curves fall far below the others, a second panel shows the upper part enlarged.

    Args:
        pair: two curves that are tested at each level, of all the seeds that both have.
        winners: criteria whose curves are named at their ends; the others are grey.
    """
    whole, selection = selection, selection.shared
    curves = [(curve, curve.levels()) for curve in selection.curves]
    zoom = _zoom([its_levels for _, its_levels in curves])
    with style():
        figure = sheet(
            height_of(len(curves) + 1, 2 if zoom else 1), title, selection, seeds=seeds_told(whole)
        )
        panels = figure.subplots(2 if zoom else 1, 1, sharex=True, squeeze=False)[:, 0].tolist()
        for axes in panels:
            dense_line(axes, selection)
            draw_curves(axes, curves, winners=winners, limits=zoom if axes is panels[0] else None)
            accuracy_axis(axes, "test accuracy")
        if zoom:
            panels[0].set_ylim(zoom)
            accuracy_axis(panels[0], "test accuracy, enlarged")
            panels[0].tick_params(labelbottom=True)
            panels[0].set_xlabel("")
        if pair:
            _stars(panels[0], whole, *pair)
        density_axes(panels, curves)
        _name_ends(panels[0], curves, winners, zoom)
        legend(figure, panels[0])
        return Drawing(figure, all_levels(selection), alt_of(title, selection, curves))


def seeds_told(whole: Selection) -> str:
    """What the head says of them, where some curves have more than are drawn."""
    shared = whole.shared
    if shared is whole or shared.seeds == whole.seeds:
        return ""
    count = shared.seeds.partition(" ")[0]
    return f"the {count} seeds that all curves have"


def _name_ends(
    axes: Axes,
    curves: Sequence[tuple[Curve, Sequence[Level]]],
    winners: Collection[str],
    limits: tuple[float, float] | None,
) -> None:
    """The names of the winners at the last point of their curves that is in sight."""
    ends = []
    for curve, its_levels in curves:
        if curve.fields["criterion"] not in CRITERION.keys() & set(winners):
            continue
        seen = [x for x in its_levels if limits is None or limits[0] <= x.mean <= limits[1]]
        if seen:
            color = CRITERION[curve.fields["criterion"]].color
            at_end = seen[-1] is its_levels[-1]
            ends.append((curve.words, seen[-1].density, seen[-1].mean, color, at_end))
    end_labels(axes, ends)


def early_stop(selection: Selection) -> Drawing:
    """The iteration of the lowest validation loss over density: earlier is faster."""
    title = "How fast: iteration of the lowest validation loss"
    whole, selection = selection, selection.shared
    curves = [(curve, curve.levels(ITERATION)) for curve in selection.curves]
    with style():
        figure = sheet(height_of(len(curves) + 2, 1), title, selection, seeds=seeds_told(whole))
        axes = figure.subplots()
        dense_line(axes, selection, ITERATION)
        draw_curves(axes, curves)
        _published_speed(axes, selection)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        axes.set_ylabel("iteration")
        density_axes([axes], curves)
        legend(figure, axes)
        numbers = all_levels(selection, ITERATION)
        return Drawing(figure, numbers, alt_of(title, selection, curves, ITERATION))


def _published_speed(axes: Axes, selection: Selection) -> None:
    """A tick where Frankle & Carbin's number puts the ticket of the round that they name."""
    dense = [row[ITERATION] for row in selection.dense]
    for network, number, _, times in SOONER:
        curve = selection.find(criterion="large_final", mask1="rewind")
        if network != selection.network or not dense or curve is None:
            continue
        for level in curve.levels(ITERATION):
            if level.round == number:
                label = f"Frankle & Carbin: dense / {times:.2g}"
                axes.plot(level.density, mean(dense) / times, marker="_", markersize=16,
                          markeredgewidth=2.5, color="black", linestyle="none", label=label,
                          zorder=5)  # fmt: skip


GREY = "#8a8a8a"


def draw_curves(
    axes: Axes,
    curves: Sequence[tuple[Curve, Sequence[Level]]],
    among: Sequence[Curve] = (),
    by_criterion: bool = False,
    winners: Collection[str] = (),
    limits: tuple[float, float] | None = None,
) -> None:
    """Lines with markers, and bands.

    Args:
        among: the curves that these are told apart from, where there are more.
        winners: criteria that keep their colours; the others are grey, if there are any.
        limits: of the axis: points beyond them have no marker, which would be cut.
    """
    others = list(among) or [curve for curve, _ in curves]
    for curve, its_levels in curves:
        look = _style(curve, others.index(curve), others, by_criterion)
        grey = bool(winners) and curve.fields["criterion"] not in winners
        if grey:
            look = replace(look, color="black" if look.marker == "x" else GREY)  # x: random
        label = words.arm(curve.fields["criterion"], curve.fields) if by_criterion else curve.words
        density = [level.density for level in its_levels]
        means = [level.mean for level in its_levels]
        axes.plot(density, means, label=label, zorder=2 if grey else 3, **look.plot,
                  markevery=_in_sight(means, limits))  # fmt: skip
        if any(level.n > 1 for level in its_levels):
            low, high = [x.low for x in its_levels], [x.high for x in its_levels]
            shade = 0.07 if grey else 0.13
            axes.fill_between(density, low, high, color=look.color, alpha=shade, linewidth=0)


def _in_sight(means: Sequence[float], limits: tuple[float, float] | None) -> list[int]:
    if limits is None:
        return list(range(len(means)))
    pad = 0.02 * (limits[1] - limits[0])
    return [i for i, y in enumerate(means) if limits[0] + pad <= y <= limits[1] - pad]


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


def dense_line(axes: Axes, selection: Selection, value: str = ACCURACY) -> None:
    """Of the seeds of the curves: seeds differ by as much as some arms do."""
    values = [row[value] for row in selection.dense if row.get(value) is not None]
    if values:
        label = f"dense, trained (mean, n = {len(values)})"
        axes.axhline(mean(values), color="black", linewidth=1.1, linestyle="--", label=label)


def _stars(axes: Axes, selection: Selection, a: Curve, b: Curve) -> None:
    """Two rows above the panel: p < 0.05 as in the paper, and the same by Holm's p."""
    tests = selection.compare(a, b)
    place = axes.get_xaxis_transform()
    names = f"{a.words} and {b.words}"
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


def density_axes(panels: Sequence[Axes], curves: Sequence[tuple[Curve, Sequence[Level]]]) -> None:
    lowest = min((x.density for _, its_levels in curves for x in its_levels), default=0.012)
    for axes in panels:
        density_axis(axes, lowest)
    for axes in panels[:-1]:
        axes.set_xlabel("")


def _zoom(curves: Sequence[Sequence[Level]]) -> tuple[float, float] | None:
    """The range of the upper three quarters of all points, if the rest would squash them."""
    means = sorted(level.mean for its_levels in curves for level in its_levels)
    highs = [level.high for its_levels in curves for level in its_levels]
    if len(means) < 8:
        return None
    lower, top = means[len(means) // 4], max(highs)
    if top - means[0] < 3 * (top - lower):
        return None
    pad = 0.06 * (top - lower)
    return lower - pad, top + pad


def height_of(entries: int, panels: int) -> float:
    """Inches: panels, and a legend of two columns below."""
    return 0.75 + 2.75 * max(1, panels) + 0.4 + 0.19 * ((entries + 1) // 2)


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def alt_of(
    title: str,
    selection: Selection,
    curves: Sequence[tuple[Curve, Sequence[Level]]],
    value: str = ACCURACY,
) -> str:
    """The figure in words: each curve at one level in the middle of the axis."""
    parts = [f"{title}: {selection.place}, {selection.seeds}, over the share of weights kept."]
    ticks = ticks_of(its_levels for _, its_levels in curves)
    for tick in sorted(ticks, key=lambda tick: abs(math.log(tick / 0.168))):
        found = {curve.words: nearest(its_levels, tick) for curve, its_levels in curves}
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
