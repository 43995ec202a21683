"""Figures without a density axis: bars, learned masks, early masks, and the plane of weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import FuncFormatter, PercentFormatter
from torch import Tensor

import lottery_sparse as ls
from experiments.figures.canvas import WIDTH, Drawing, accuracy_axis, legend, sheet, style
from experiments.figures.curves import CHANCE
from experiments.figures.styles import CYCLE
from experiments.networks import NETWORKS, build
from experiments.runs import Run
from experiments.selection import ACCURACY, Row, Selection
from experiments.statistics import Level, mean
from experiments.tables import Table, all_levels, best, masks, nearest, percent

HATCHES = ("", "///", "...", "\\\\\\", "xx", "++", "oo")
SHADES = ("#c9d6ea", "#7f9fd0", "#dddddd", "#f0c9a8", "#b9d8bd", "#d6bfe0", "#f2f2f2")
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind text that lines cross
PLANE = (
    "large_final", "small_final", "random",
    "large_init", "small_init", "magnitude_increase",
    "large_init_large_final", "small_init_small_final", "movement",
)  # fmt: skip
SIGNS = ("large_final_same_sign", "large_final_diff_sign")


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
    bars["large_final mask"] = top
    note = f"masks keep {percent(top.density, 1)}%" if top else ""
    return _bars(selection, "What a mask does to a network that knows nothing", bars, note)


def learned(selection: Selection) -> Drawing:
    """Table 1 as bars: learned masks, by weights and rescaling."""
    return _bars(selection, "Learned masks on untrained weights", _firsts(selection))


def learned_trained(selection: Selection) -> Drawing:
    """A learned mask on initial weights, and once the weights that it keeps are trained."""
    return _bars(selection, "A learned mask, and its weights trained", _firsts(selection))


def permutation(selection: Selection) -> Drawing:
    """One random network, a mask for each permutation of the task."""
    names = {"none": "as it is", "pixels": "pixels permuted", "classes": "classes permuted"}
    bars = {
        names[str(curve.fields["permuted"])]: next(iter(curve.levels()), None)
        for curve in selection.curves
    }
    return _bars(selection, "One random network, a learned mask per task", bars)


def _firsts(selection: Selection) -> dict[str, Level | None]:
    return {curve.label: next(iter(curve.levels()), None) for curve in selection.curves}


def _bars(
    selection: Selection, title: str, bars: Mapping[str, Level | None], note: str = ""
) -> Drawing:
    """One horizontal bar per mean, a whisker from the lowest to the highest seed."""
    with style():
        figure = sheet(1.55 + 0.5 * max(len(bars), 2), title, selection, note)
        axes = figure.subplots()
        for place, level in enumerate(bars.values()):
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
            axes.text(level.high + 0.02, place, text, va="center", fontsize=8.5, bbox=PAPER)
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
    numbers = masks(selection) if "mask_bits" in selection.curves[0].fields else None
    return Drawing(figure, numbers or all_levels(selection), f"{title}, {selection.place}: {told}.")


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
        figure = sheet(4.3, title, selection, "each mask at its best density")
        axes = figure.subplots()
        for i, ((criterion, weights), points) in enumerate(groups.items()):
            points.sort(key=lambda point: point[0])
            look = CYCLE[i % len(CYCLE)]
            at = [point[0] for point in points]
            label = f"{criterion}, {weights.replace('_', ' ')}"
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


# ---- the plane of initial and final weights ------------------------------------------------------


def plane(
    selection: Selection,
    w_init: Tensor,
    w_final: Tensor,
    layer: str,
    criteria: Sequence[str] = PLANE,
    keep: float = 0.2,
    points: int = 2500,
    seed: int = 0,
) -> Drawing:
    """Figures 2 and 6 with real weights: where each criterion's kept weights lie.

    Args:
        w_init, w_final: weights of one layer at the start and the end of the dense training.
        keep: share of them that each criterion keeps; all of the layer are ranked.
        points: how many are drawn, a fixed random subset.
    """
    kept = {
        name: ls.prune(
            {layer: w_init},
            {layer: w_final},
            {layer: torch.ones(w_init.shape, dtype=torch.bool)},
            name,
            keep,
        )[layer].flatten()
        for name in criteria
    }
    drawn = np.random.default_rng(0).permutation(w_init.numel())[:points]
    x, y = (w.flatten().numpy()[drawn] for w in (w_init, w_final))
    # an axis each: weights of a long training reach ten times as far as they started
    reaches = [float(np.abs(side).max()) * 1.05 or 1.0 for side in (x, y)]
    columns = min(3, len(criteria))
    rows = -(-len(criteria) // columns)
    title = "Which weights each criterion keeps"
    note = f"layer {layer}, {100 * keep:g}% kept"
    with style():
        height = 0.95 + (WIDTH - 0.6) / columns * rows
        figure = sheet(height, title, selection, note, f"seed {seed}")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (name, mask) in zip(grid.flat, kept.items(), strict=False):
            chosen = mask.numpy()[drawn]
            axes.axhline(0, color="#999999", linewidth=0.6)
            axes.axvline(0, color="#999999", linewidth=0.6)
            dots: dict[str, Any] = {"linestyle": "none", "rasterized": True}
            axes.plot(x[~chosen], y[~chosen], ".", color="#c4c4c4", markersize=1.6, **dots)
            axes.plot(x[chosen], y[chosen], "o", color="#00306e", markersize=1.9, **dots)
            axes.set_title(name, fontsize=7.5)
            axes.set_xlim(-reaches[0], reaches[0])
            axes.set_ylim(-reaches[1], reaches[1])
            axes.set_box_aspect(1)
            axes.tick_params(labelsize=7)
        figure.supxlabel("initial weight", fontsize=9)
        figure.supylabel("final weight", fontsize=9)
    table = Table(
        ("w_init", "w_final", *criteria),
        tuple(
            (float(w_init.flatten()[i]), float(w_final.flatten()[i]))
            + tuple(int(mask[i]) for mask in kept.values())
            for i in drawn
        ),
        "a sample of the weights; 1 = kept",
    )
    flipped = (w_init.flatten() * w_final.flatten()) < 0
    told = ", ".join(
        f"{n} {percent(float(flipped[m].float().mean()), 0)}%" for n, m in kept.items()
    )
    alt = f"{title}: initial against final weights, {note}. Share of kept weights with a new sign: "
    return Drawing(figure, table, f"{alt}{told}.")


def layer_shown(network: str) -> str:
    """The layer that the plane shows: the first that is not tiny."""
    return "conv2.weight" if NETWORKS[network].convolutions else "fc1.weight"


def dense_pair(row: Row, tensors: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """Initial and final weights of a layer of a dense run, from its row and its checkpoint."""

    initial = dict(build(NETWORKS[row["network"]], row["seed"]).named_parameters())
    return initial[layer].detach(), tensors[f"final.{layer}"]
