"""The plane of initial and final weights: where each criterion's kept weights lie."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

import lottery_sparse as ls
from experiments.findings import words
from experiments.findings.selection import Row, Selection
from experiments.findings.tables import Table, percent
from experiments.show.figures.canvas import WIDTH, Drawing, sheet, style
from experiments.study.networks import build, find

PLANE = (
    "large_final", "small_final", "random",
    "large_init", "small_init", "magnitude_increase",
    "large_init_large_final", "small_init_small_final", "movement",
)  # fmt: skip
SIGNS = ("large_final_same_sign", "large_final_diff_sign")
KEEP, POINTS = 0.2, 2500  # share that each criterion keeps; weights drawn
KEPT, EDGE = "#00306e", "#c2410c"

Array = np.ndarray[Any, Any]


def points(w_init: Tensor, w_final: Tensor, layer: str, criteria: Sequence[str] = PLANE) -> Table:
    """A fixed random sample of the weights of a layer, and which of them each criterion keeps.

    All of the layer are ranked.
    """
    kept = {
        name: ls.prune(
            {layer: w_init},
            {layer: w_final},
            {layer: torch.ones(w_init.shape, dtype=torch.bool)},
            name,
            KEEP,
        )[layer].flatten()
        for name in criteria
    }
    drawn = np.random.default_rng(0).permutation(w_init.numel())[:POINTS]
    return Table(
        ("w_init", "w_final", *criteria),
        tuple(
            (float(w_init.flatten()[i]), float(w_final.flatten()[i]))
            + tuple(int(mask[i]) for mask in kept.values())
            for i in drawn
        ),
        "a sample of the weights; 1 = kept",
    )


def plane(selection: Selection, table: Table, layer: str, seed: int = 0) -> Drawing:
    """Figures 2 and 6 with real weights, the formula and the edge of each criterion's region.

    table: of `points`. Edges lie between the sample's kept and pruned weights.
    """
    criteria = table.columns[2:]
    columns = [np.array(column, dtype=float) for column in zip(*table.rows, strict=True)]
    x, y = columns[:2]
    across = min(3, len(criteria))
    down = -(-len(criteria) // across)
    title = "Which weights each criterion keeps"
    note = f"layer {layer}, {100 * KEEP:g}% kept"
    # an axis each: weights of a long training reach ten times as far as they started
    reach = float(np.abs(x).max()) * 1.05 or 1.0, float(np.quantile(np.abs(y), 0.99)) or 1.0
    with style():
        height = 1.1 + (WIDTH - 0.6) / across * down * (1.32 if across > 2 else 0.8)
        figure = sheet(height, title, selection, note, f"seed {seed}")
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for axes, name, mask in zip(grid.flat, criteria, columns[2:], strict=False):
            chosen = mask > 0
            axes.axhline(0, color="#999999", linewidth=0.6)
            axes.axvline(0, color="#999999", linewidth=0.6)
            dots: dict[str, Any] = {"linestyle": "none", "rasterized": True}
            axes.plot(x[~chosen], y[~chosen], ".", color="#c4c4c4", markersize=1.6, **dots)
            axes.plot(x[chosen], y[chosen], "o", color=KEPT, markersize=1.7, **dots)
            for line in edges(name, x, y, chosen, reach):
                axes.plot(*line, color=EDGE, linewidth=1.3)
            _title(axes, name)
            axes.set_xlim(-reach[0], reach[0])
            axes.set_ylim(-reach[1], reach[1])
            axes.tick_params(labelsize=7)
        figure.supxlabel("initial weight $w_i$", fontsize=9)
        figure.supylabel("final weight $w_f$ (1% lie beyond)", fontsize=9)
    flipped = x * y < 0
    told = ", ".join(
        f"{words.CRITERIA.get(name, name)} {percent(float(flipped[mask > 0].mean()), 0)}%"
        for name, mask in zip(criteria, columns[2:], strict=True)
    )
    alt = f"{title}: {selection.place}, initial against final weights, {note}. Share of kept "
    return Drawing(figure, table, f"{alt}weights with a new sign: {told}.")


def _title(axes: Axes, name: str) -> None:
    """The criterion, and below it what is ranked."""
    formula = words.FORMULAS.get(name, "")
    axes.set_title(f"{words.CRITERIA.get(name, name)}\n{formula}", fontsize=7.5, linespacing=1.3)


Line = tuple[Sequence[float], Sequence[float]]


def edges(name: str, x: Array, y: Array, kept: Array, reach: tuple[float, float]) -> list[Line]:
    """The lines between the kept and the pruned weights of a criterion, as pairs of coordinates."""
    right, top = reach
    if name == "random" or kept.all() or not kept.any():
        return []
    a, b = np.abs(x), np.abs(y)
    both = ([-right, right], [-top, top])
    if name in ("large_final", "small_final"):
        t = _between(b, kept)
        return [(both[0], [side * t] * 2) for side in (-1, 1)]
    if name in ("large_init", "small_init"):
        t = _between(a, kept)
        return [([side * t] * 2, both[1]) for side in (-1, 1)]
    if name == "magnitude_increase":
        t = _between(b - a, kept)
        return [([-right, 0, right], [side * (t + right), side * t, side * (t + right)])
                for side in (-1, 1)]  # fmt: skip
    if name == "movement":
        t = _between(np.abs(y - x), kept)
        return [(both[0], [side * t - right, side * t + right]) for side in (-1, 1)]
    if name == "small_init_small_final":
        u, v = float(a[kept].max()), float(b[kept].max())
        return [([-u, u, u, -u, -u], [-v, -v, v, v, -v])]
    if name == "large_init_large_final":
        u, v = float(a[kept].min()), float(b[kept].min())
        return [([s * right, s * u, s * u], [t * v, t * v, t * top])
                for s in (-1, 1) for t in (-1, 1)]  # fmt: skip
    if name in SIGNS:
        same = 1 if name == SIGNS[0] else -1
        t = float(b[kept].min())
        return [([s * right, 0, 0], [s * same * t, s * same * t, s * same * top])
                for s in (-1, 1)]  # fmt: skip
    return []


def _between(score: Array, kept: Array) -> float:
    """The middle between the kept and the pruned weight that are nearest to each other in score."""
    inside, outside = score[kept], score[~kept]
    if inside.min() >= outside.max():
        return float(inside.min() + outside.max()) / 2
    return float(inside.max() + outside.min()) / 2


def layer_shown(network: str) -> str:
    """The layer that the plane shows: the first that is not tiny."""
    return "conv2.weight" if find(network).convolutions else "fc1.weight"


def dense_pair(row: Row, tensors: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """Initial and final weights of a layer of a dense run, from its row and its checkpoint."""
    initial = dict(build(find(row["network"]), row["seed"]).named_parameters())
    return initial[layer].detach(), tensors[f"final.{layer}"]
