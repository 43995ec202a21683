"""Figure 7: accuracy of networks that are masked and never trained, over density."""

from matplotlib.axes import Axes

from experiments.findings import words
from experiments.findings.published import CHANCE, MASKS
from experiments.findings.selection import ACCURACY, Selection
from experiments.findings.statistics import mean
from experiments.findings.tables import LEARNED, all_levels, rows_of
from experiments.show.figures.canvas import Drawing, accuracy_axis, legend, sheet, style
from experiments.show.figures.curves import (
    alt_of,
    dense_line,
    density_axes,
    draw_curves,
    height_of,
    seeds_told,
)
from experiments.show.figures.styles import CRITERION


def supermasks(selection: Selection) -> Drawing:
    """Figure 7: masked, never trained; initial weights first, signed constants second.

    Learned masks stand where their density is, dashed lines are trained dense networks and chance.
    """
    title = "Masked, but never trained"
    whole, selection = selection, selection.shared
    shown = {
        weights: [(c, c.levels()) for c in selection.curves if c.fields["weights"] == weights]
        for weights in words.WEIGHTS
    }
    shown = {weights: curves for weights, curves in shown.items() if curves}
    count = max((len(curves) for curves in shown.values()), default=0)
    with style():
        figure = sheet(height_of(count + 4, len(shown)), title, selection, seeds=seeds_told(whole))
        panels = figure.subplots(max(1, len(shown)), 1, sharex=True, squeeze=False)[:, 0].tolist()
        for axes, (weights, curves) in zip(panels, shown.items(), strict=False):
            dense_line(axes, selection)
            axes.axhline(CHANCE, color="black", linewidth=1, linestyle=":", label="chance")
            draw_curves(axes, curves, by_criterion=True)
            _learned(axes, whole, weights)
            accuracy_axis(axes, "test accuracy, untrained")
            axes.set_ylim(0, 1.03)
            axes.set_title(words.WEIGHTS[weights], loc="left")
            axes.tick_params(labelbottom=True)
        every = [curve for curves in shown.values() for curve in curves]
        density_axes(panels, every)
        for axes, weights in zip(panels, shown, strict=False):
            _published(axes, selection, weights)
        legend(figure, panels[0])
        return Drawing(figure, all_levels(selection), alt_of(title, selection, every))


def _published(axes: Axes, selection: Selection, weights: str) -> None:
    """Ticks on the right side: what the article reports of a mask on these weights."""
    place = axes.get_yaxis_transform()
    for found in MASKS:
        data = {"fc": "mnist"}.get(found.network, "cifar10")
        ours = {"fc": "mnist"}.get(selection.network, "cifar10")
        if data != ours or found.fields["weights"] != weights:
            continue
        color = CRITERION[found.fields["criterion"]].color
        axes.plot([0.985, 1.0], [found.value] * 2, color=color, linewidth=2.5, transform=place,
                  clip_on=False, label="_published")  # fmt: skip
        axes.text(1.01, found.value, f"article: {found.words}", color=color, fontsize=7.5,
                  va="center", transform=place)  # fmt: skip


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
