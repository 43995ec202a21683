"""Figures without a density axis: bars and dots, learned masks, early masks."""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, PercentFormatter

from experiments.findings import words
from experiments.findings.published import CHANCE, LEARNED_MASKS
from experiments.findings.published import MASKS as PUBLISHED
from experiments.findings.selection import ACCURACY, Selection
from experiments.findings.statistics import Level, mean
from experiments.findings.tables import all_levels, best, masks, nearest, percent
from experiments.show.figures.canvas import Drawing, accuracy_axis, legend, sheet, style
from experiments.show.figures.styles import CYCLE
from experiments.study.runs import Run

HATCHES = ("", "///", "...", "\\\\\\", "xx", "++", "oo")
SHADES = ("#c9d6ea", "#7f9fd0", "#dddddd", "#f0c9a8", "#b9d8bd", "#d6bfe0", "#f2f2f2")
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind text that lines cross


# ---- bars ---------------------------------------------------------------------------------------


def first_bars(selection: Selection) -> Drawing:
    """The first figure of the authors' article: initial weights, a random mask, a ticket's mask."""
    ticket = selection.find(criterion="large_final")
    random = selection.find(criterion="random")
    top = best(ticket.rows) if ticket else None
    bars: dict[str, Level | None] = {"initial weights": None, "random mask": None}
    if ticket:
        bars["initial weights"] = next((x for x in ticket.levels() if x.round == 0), None)
    if random and top:
        bars["random mask"] = nearest(random.levels(), top.density)
    bars["large final mask"] = top
    note = "each mask at its best density" if top else ""
    title = "What a mask does to a network that knows nothing"
    ours = {"fc": "mnist"}.get(selection.network, "cifar10")
    article: dict[str, float] = {"initial weights": CHANCE, "random mask": CHANCE}
    for found in PUBLISHED:
        same = {"fc": "mnist"}.get(found.network, "cifar10") == ours
        if same and (found.fields["criterion"], found.fields["weights"]) == ("large_final", "init"):
            article["large final mask"] = found.value
    return _bars(selection, title, bars, note, article)


def learned(selection: Selection) -> Drawing:
    """Table 1 as dots, one for each seed, on the scale that tells them apart."""
    return _dots(selection, "Learned masks on untrained weights", _firsts(selection))


def learned_trained(selection: Selection) -> Drawing:
    """A learned mask on initial weights, and once the weights that it keeps are trained."""
    return _dots(selection, "A learned mask, and its weights trained", _firsts(selection))


def permutation(selection: Selection) -> Drawing:
    """One random network, a mask for each permutation of the task."""
    names = {"none": "as it is", "pixels": "pixels permuted", "classes": "classes permuted"}
    bars = {
        names[str(curve.fields["permuted"])]: next(iter(curve.levels()), None)
        for curve in selection.curves
    }
    return _dots(selection, "One random network, a learned mask per task", bars)


def _firsts(selection: Selection) -> dict[str, Level | None]:
    return {curve.words: next(iter(curve.levels()), None) for curve in selection.curves}


def _dots(selection: Selection, title: str, lines: Mapping[str, Level | None]) -> Drawing:
    """A line of dots per arm: hollow the seeds, filled their mean; ticks are published values.

    The axis spans what is shown, in half points at least: bars from zero would hide it.
    """
    there = {name: level for name, level in lines.items() if level}
    seeds = set.union(*(set(level.seeds) for level in there.values()))
    dense = [row[ACCURACY] for row in selection.dense if row["seed"] in seeds]
    published = [p for p in LEARNED_MASKS if any(p.of(c.fields) for c in selection.curves)]
    values = [value for level in there.values() for value in level.values]
    values += [p.value for p in published] + ([mean(dense)] if dense else [])
    low, high = 0.005 * math.floor(min(values) / 0.005), 0.005 * math.ceil(max(values) / 0.005)
    with style():
        figure = sheet(1.75 + 0.4 * max(len(lines), 2), title, selection)
        axes = figure.subplots()
        for place, (name, level) in enumerate(lines.items()):
            if level is None:
                axes.text(low, place, "not run", va="center")
                continue
            look: dict[str, Any] = {"linestyle": "none", "color": "#00306e"}
            axes.plot(level.values, [place] * level.n, "o", markersize=5,
                      markerfacecolor="white", label="a seed", **look)  # fmt: skip
            axes.plot(level.mean, place, "D", markersize=7, label="mean", **look)
            text = f"{percent(level.mean)}%"
            axes.annotate(text, (level.mean, place), (0, 7), textcoords="offset points",
                          ha="center", fontsize=8, bbox=PAPER)  # fmt: skip
            for found in published:
                if name == next(c.words for c in selection.curves if found.of(c.fields)):
                    axes.plot(found.value, place, marker="|", markersize=15, markeredgewidth=2.5,
                              color="#b2182b", linestyle="none",
                              label=f"published: {found.words}")  # fmt: skip
        if dense:
            text = f"dense, trained ({percent(mean(dense))}%, n = {len(dense)})"
            axes.axvline(mean(dense), color="black", linewidth=1.1, linestyle="--", label=text)
        axes.set_yticks(range(len(lines)), [_wrapped(name) for name in lines])
        axes.set_ylim(max(len(lines), 2) - 0.5, -0.7)
        pad = 0.06 * (high - low)
        axes.set_xlim(low - pad, high + pad)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{round(100 * x, 3):g}%"))
        axes.set_xlabel("test accuracy")
        axes.grid(axis="x", alpha=0.25)
        legend(figure, axes)
    told = ", ".join(
        f"{name} {percent(level.mean)}%" if level else f"{name} not run"
        for name, level in lines.items()
    )
    numbers = masks(selection) if "mask_bits" in selection.curves[0].fields else None
    return Drawing(figure, numbers or all_levels(selection), f"{title}, {selection.place}: {told}.")


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(name, 22))


def _bars(
    selection: Selection,
    title: str,
    bars: Mapping[str, Level | None],
    note: str,
    published: Mapping[str, float],
) -> Drawing:
    """One horizontal bar per mean, a whisker from the lowest to the highest seed, and ticks."""
    with style():
        figure = sheet(1.55 + 0.5 * max(len(bars), 2), title, selection, note)
        axes = figure.subplots()
        for place, (name, level) in enumerate(bars.items()):
            if level is None:
                axes.text(0.01, place, "not run", va="center")
                continue
            look: dict[str, Any] = {
                "color": SHADES[place % len(SHADES)],
                "hatch": HATCHES[place % len(HATCHES)],
            }
            axes.barh(place, level.mean, 0.62, edgecolor="black", linewidth=0.8, **look)
            whisker = [[level.mean - level.low], [level.high - level.mean]]
            axes.errorbar(level.mean, place, xerr=whisker, color="black", capsize=3, linewidth=1.2)
            text = f"{percent(level.mean, 1)}% (n = {level.n})"
            right = max(level.high, published.get(name, 0.0)) + 0.02
            axes.text(right, place, text, va="center", fontsize=8.5, bbox=PAPER)
        for place, name in enumerate(bars):
            if name in published:
                axes.plot(published[name], place, marker="|", markersize=15, markeredgewidth=2.5,
                          color="#b2182b", linestyle="none", label="article")  # fmt: skip
        axes.axvline(CHANCE, color="black", linewidth=1, linestyle=":", label="chance")
        if selection.dense:
            dense = mean([row[ACCURACY] for row in selection.dense])
            text = f"dense network, trained ({percent(dense, 1)}%)"
            axes.axvline(dense, color="black", linewidth=1.1, linestyle="--", label=text)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.set_ylim(max(len(bars), 2) - 0.5, -0.5)
        axes.set_xlim(0, 1.27)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("test accuracy")
        legend(figure, axes)
    told = ", ".join(
        f"{label} {percent(level.mean, 1)}%" if level else f"{label} not run"
        for label, level in bars.items()
    )
    return Drawing(figure, all_levels(selection), f"{title}, {selection.place}: {told}.")


# ---- learned masks and early masks ---------------------------------------------------------------


def sensitivity(selection: Selection) -> Drawing:
    """What the initial score of learned masks decides: their density, and their accuracy."""
    title = "Learned masks by their initial scores"
    points = sorted(
        (curve.fields["init_score"], level)
        for curve in selection.curves
        for level in curve.levels()
    )
    scores = [score for score, _ in points]
    with style():
        figure = sheet(5.3, title, selection)
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, values in (
            (upper, [(x.mean, x.low, x.high) for _, x in points]),
            (lower, [(x.density, x.density, x.density) for _, x in points]),
        ):
            middle = [value[0] for value in values]
            ends = [[m - low, high - m] for m, low, high in values]
            axes.errorbar(
                scores, middle, yerr=np.transpose(ends), capsize=3, label="", **CYCLE[0].plot
            )
            axes.grid(alpha=0.25)
        accuracy_axis(upper, "test accuracy, untrained")
        accuracy_axis(lower, "weights kept")
        lower.set_ylim(0, 1)
        lower.set_xlabel("score of every weight before the mask is learned")
    told = ", ".join(
        f"score {score:g}: {percent(x.mean, 1)}% at {percent(x.density, 0)}% kept"
        for score, x in points
    )
    return Drawing(figure, all_levels(selection), f"{title}, {selection.place}: {told}.")


def early_masks(selection: Selection) -> Drawing:
    """The best accuracy of masks on untrained weights, over the iteration they were taken at."""
    title = "How early is a good mask there?"
    groups: dict[tuple[str, str], list[tuple[int, Level]]] = {}
    for curve in selection.curves:
        level = best(curve.rows)
        at = curve.fields["final_at"]
        if at is None:  # the last iteration
            at = Run(network=selection.network, profile=selection.profile, seed=0).iterations
        if level:
            key = curve.fields["criterion"], curve.fields["weights"]
            groups.setdefault(key, []).append((at, level))
    told = []
    with style():
        figure = sheet(4.3, title, selection, "each run at its best density")
        axes = figure.subplots()
        for i, ((criterion, weights), points) in enumerate(groups.items()):
            points.sort(key=lambda point: point[0])
            look = CYCLE[i % len(CYCLE)]
            at = [point[0] for point in points]
            label = f"{words.CRITERIA.get(criterion, criterion)}, {words.WEIGHTS[weights]}"
            axes.plot(at, [x.mean for _, x in points], label=label, **look.plot)
            low, high = [x.low for _, x in points], [x.high for _, x in points]
            axes.fill_between(at, low, high, color=look.color, alpha=0.13, linewidth=0)
            told.append(f"{label} from {percent(points[0][1].mean, 1)}% at iteration {at[0]:,}")
        axes.axhline(CHANCE, color="black", linewidth=1, linestyle=":", label="chance")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.set_xlabel("iteration whose weights count as final (log scale)")
        accuracy_axis(axes, "test accuracy, untrained")
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.25)
        legend(figure, axes, 1)
    return Drawing(figure, all_levels(selection), f"{title} {selection.place}: {', '.join(told)}.")
