"""Figures: numbers in, drawings out. They read without colour: by marker, line style and hatch.

A drawing is a matplotlib figure, the table behind it, and words for who does not see it.
"""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from experiments.findings.selection import Row, Selection
from experiments.findings.tables import Table
from experiments.show.figures import curves, masks, plane, untrained
from experiments.show.figures.canvas import Drawing

__all__ = ["FIGURES", "Drawing", "Points", "Weights", "draw"]

# Row of a dense run -> the tensors of its checkpoint, or None where they are gone.
Weights = Callable[[Row], Mapping[str, Tensor] | None]

# Stem of a figure -> the sample of weights behind it (`plane.points`), or None where there is none.
Points = Callable[[str], Table | None]

# study -> its figure. What has none here is drawn by what its runs are, see `figure_of`.
FIGURES: dict[str, Callable[[Selection], Drawing]] = {
    "mask-criteria": curves.mask_criteria,
    "mask-1": curves.mask1_actions,
    "mask-0": curves.mask0_actions,
    "supermasks": untrained.supermasks,
    "same-sign": curves.same_sign,
    "learned": masks.learned,
    "first-bars": masks.first_bars,
    "early-stop": curves.early_stop,
    "early-masks": masks.early_masks,
    "late-rewinding": curves.late_rewinding,
    "rescaling": curves.rescaling,
    "learned-sensitivity": masks.sensitivity,
    "learned-trained": masks.learned_trained,
    "permutation": masks.permutation,
}


def figure_of(selection: Selection) -> Callable[[Selection], Drawing] | None:
    """The function that draws a study; None for one that is dense runs only."""
    if selection.study in FIGURES:
        return FIGURES[selection.study]
    kind = selection.curves[0].fields
    if kind["schedule"] == "learned":
        return masks.learned
    if not kind["trained"]:
        return untrained.supermasks
    if all(curve.fields["criterion"] == "none" for curve in selection.curves):
        return None
    return lambda selection: curves.trained(selection, selection.study)


def draw(
    selection: Selection, weights: Weights | None = None, points: Points | None = None
) -> Iterator[tuple[str, Drawing]]:
    """The drawings of a study on one network, each with the stem of its files.

    Args:
        weights: where the planes of initial and final weights, of a study of dense runs, come from.
        points: where they come from if the weights are gone: the sample of an earlier drawing.
    """
    if not selection.curves:
        return
    function = figure_of(selection)
    if function is not None:
        yield selection.stem, function(selection)
        return
    layer = plane.layer_shown(selection.network)
    rows = sorted(selection.dense, key=lambda row: row["seed"])
    loaded = ((row, weights(row)) for row in rows if weights is not None)
    row, tensors = next(((row, found) for row, found in loaded if found is not None), (None, None))
    for name, criteria in (("plane", plane.PLANE), ("signs", plane.SIGNS)):
        stem, seed = f"{selection.stem}-{name}", row["seed"] if row else 0
        if row is not None and tensors is not None:
            table = plane.points(*plane.dense_pair(row, tensors, layer), layer, criteria)
        else:
            table = points(stem) if points is not None else None
        if table is not None:
            yield stem, plane.plane(selection, table, layer, seed)
