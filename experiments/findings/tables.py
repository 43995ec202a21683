"""Tables of the numbers behind figures: as text, Markdown, CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from experiments.findings import compression
from experiments.findings.densities import NOT_RECORDED, WAYS, Way, chosen
from experiments.findings.selection import ACCURACY, Curve, Row, Selection
from experiments.findings.statistics import ALPHA, TOO_FEW, Comparison, Level, levels, mean
from experiments.train import heading

Cell = str | int | float | None

ITERATION = "early_stop_iteration"
NOT_RUN = "not run"
# Levels that a short table shows: those nearest to the ticks of the paper's axis.
TICKS = (1.0, 0.41, 0.168, 0.069, 0.028, 0.012)


@dataclass(frozen=True)
class Table:
    """Columns, rows of cells, and a sentence that says what they are."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def csv(self) -> bytes:
        """RFC 4180 with line feeds; floats as Python's shortest form, null as an empty field."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue().encode()

    def turned(self, corner: str) -> "Table":
        """Rows as columns: for a table of few rows that is too wide for a page."""
        heads = (corner, *(shown(row[0]) for row in self.rows))
        rows = tuple(zip(self.columns[1:], *(row[1:] for row in self.rows), strict=True))
        return Table(heads, rows, self.caption)

    def text(self) -> str:
        lines = [self.columns, *(tuple(map(shown, row)) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        body = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        body.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(([self.caption, ""] if self.caption else []) + body) + "\n"

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        body = [line(self.columns), line(["---"] * len(self.columns))]
        body += [line([shown(cell) for cell in row]) for row in self.rows]
        return "\n".join(([self.caption, ""] if self.caption else []) + body) + "\n"


def shown(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f}"


def spread(level: Level, value: str = ACCURACY) -> str:
    """Mean and range of a level: "97.87 [97.51, 98.10]", in percent or in iterations."""

    def number(x: float) -> str:
        return f"{x:,.0f}" if value == ITERATION else percent(x)

    if level.n == 1:
        return number(level.mean)
    return f"{number(level.mean)} [{number(level.low)}, {number(level.high)}]"


def p_value(p: float | None) -> str:
    if p is None:
        return TOO_FEW
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def all_levels(selection: Selection, value: str = ACCURACY) -> Table:
    """Each level of each curve: what a figure shows, and the interval that it does not."""
    rows: list[tuple[Cell, ...]] = []
    for curve in selection.curves:
        for level in curve.levels(value):
            low, high = level.interval or (None, None)
            values = " ".join(map(str, level.values))
            numbers = (level.mean, level.low, level.high, low, high, values)
            rows.append((curve.label, level.round, level.density, level.n, *numbers))
    columns = ("curve", "round", "density", "n", "mean", "min", "max", "low95", "high95", "values")
    return Table(columns, tuple(rows), f"{value} of each level, its range and 95% t-interval")


def nearest(curve: Sequence[Level], density: float) -> Level | None:
    """The level at a tick, if the curve has one within a tenth of it."""
    close = [level for level in curve if abs(level.density / density - 1) < 0.1]
    return min(close, key=lambda level: abs(level.density - density), default=None)


def ticks_of(curves: Iterable[Sequence[Level]]) -> list[float]:
    """The densities that a short table shows: the paper's, or all where there are few rounds."""
    by_round: dict[int, list[float]] = {}
    for curve in curves:
        for level in curve:
            by_round.setdefault(level.round, []).append(level.density)
    if len(by_round) <= len(TICKS):  # a profile that trains every fourth round
        return [mean(by_round[number]) for number in sorted(by_round)]
    every = [mean(densities) for densities in by_round.values()]
    return [tick for tick in TICKS if any(abs(d / tick - 1) < 0.1 for d in every)]


def summary(selection: Selection, value: str = ACCURACY) -> Table:
    """Curves down, the levels of the paper's ticks across."""
    curves = [(curve.words, curve.levels(value)) for curve in selection.curves]
    ticks = ticks_of(its_levels for _, its_levels in curves)
    rows = []
    for label, its_levels in curves:
        found = [nearest(its_levels, tick) for tick in ticks]
        rows.append((label, *(spread(level, value) if level else "" for level in found)))
    unit = "iterations" if value == ITERATION else "percent"
    return Table(
        ("curve", *map(_kept, ticks)),
        tuple(rows),
        f"{_name(value)} in {unit}: mean [lowest, highest seed]",
    )


def differences(selection: Selection, against: Curve, value: str = ACCURACY) -> Table:
    """Each curve against one of them at each pruned level, by seed; Holm over the levels."""
    rows: list[tuple[Cell, ...]] = []
    for curve in selection.curves:
        if curve is against:
            continue
        for c in selection.compare(curve, against, value):
            numbers = (c.n, c.difference, c.p, c.p_holm, c.p_welch, c.seen, c.stars)
            rows.append((curve.label, against.label, c.round, c.density, *numbers))
    columns = (
        "curve", "against", "round", "density", "n", "difference", "p_paired", "p_holm", "p_welch",
        "detectable", "star",
    )  # fmt: skip
    caption = (
        f"{value}: paired test by seed, Holm's correction of it over the levels, Welch's test, and "
        "the difference that the paired test finds four times of five"
    )
    return Table(columns, tuple(rows), caption)


def summary_of_tests(selection: Selection, against: Curve, value: str = ACCURACY) -> Table:
    """Curves down, the levels of the paper's ticks across: difference, star, p, Holm's p.

    Holm's correction is over all pruned levels of a curve, also those not shown.
    """
    unit = "iterations" if value == ITERATION else "points"
    compared = {
        curve.words: selection.compare(curve, against, value)
        for curve in selection.curves
        if curve is not against
    }

    def at(tick: float, found: Sequence[Comparison]) -> Comparison | None:
        near = [c for c in found if abs(c.density / tick - 1) < 0.1]
        return min(near, key=lambda c: abs(c.density - tick), default=None)

    def cell(c: Comparison | None) -> str:
        if c is None:
            return ""
        told = (
            f"{c.difference:+,.0f}"
            if value == ITERATION
            else f"{round(100 * c.difference, 2) + 0.0:+.2f}"
        )
        if c.p is None:
            return f"{told} [{TOO_FEW}]"
        return f"{told}{c.stars} [{p_value(c.p)}; {p_value(c.p_holm)}]"

    ticks = ticks_of(curve.levels(value) for curve in selection.curves)
    ticks = [tick for tick in ticks if any(at(tick, found) for found in compared.values())]
    rows = tuple(
        (label, *(cell(at(tick, found)) for tick in ticks)) for label, found in compared.items()
    )
    caption = (
        f"{_name(value)} minus that of {against.words} by seed, in {unit}; * where p < {ALPHA}; in "
        "brackets p of the paired test, then corrected by Holm over the levels"
    )
    return Table(("curve", *map(_kept, ticks)), rows, caption)


def _name(value: str) -> str:
    return value.replace("_", " ").capitalize()


def _kept(tick: float) -> str:
    return f"{percent(tick, 1).replace('100.0', '100')}% kept"


def best(rows: Sequence[Row], way: Way = "each") -> Level | None:
    """The accuracies of masks on untrained networks at the densities that `densities` chooses."""
    found = chosen(rows, way)
    if found is None:
        return None
    density = mean(list(found.density.values()))
    return Level(0, density, tuple(found.accuracy), tuple(found.accuracy.values()))


def ways(selection: Selection) -> Table:
    """Masks on untrained networks, by each way to choose a density: accuracy, and weights kept."""

    def cell(rows: Sequence[Row], way: Way) -> str:
        level = best(rows, way)
        if level is None:
            return NOT_RECORDED
        return f"{spread(level)} at {percent(level.density, 1)}% kept"

    rows = tuple((c.words, *(cell(c.rows, way) for way in WAYS)) for c in selection.curves)
    caption = (
        "Test accuracy in percent, mean [lowest, highest seed], by how the density is chosen; the "
        "first is the published statistic, by which claims are judged"
    )
    return Table(("mask", *WAYS.values()), rows, caption)


def bits(selection: Selection) -> Table:
    """What networks cost as a mask and a seed, or as a mask and trained weights (`compression`)."""
    lines: list[tuple[Cell, ...]] = []
    for curve in selection.curves:
        if curve.fields["schedule"] == "one_shot":
            level = best(curve.rows, "mean")
        else:
            level = next(iter(curve.levels()), None)
        if level is None:
            continue
        rows = [row for row in curve.rows if abs(row["density"] / level.density - 1) < 0.02]
        size = mean([compression.bits(row) for row in rows])
        share = mean([compression.share(row) for row in rows])
        lines.append(
            (
                curve.words,
                percent(level.mean),
                percent(level.density, 1),
                f"{size:,.0f}",
                f"{percent(share)}%",
            )
        )
    if selection.dense:
        total = compression.dense_bits(selection.network)
        accuracy = percent(mean([row[ACCURACY] for row in selection.dense]))
        lines.append(("dense, trained, float32", accuracy, "100", f"{total:,}", "100%"))
    caption = (
        "Bits of a network: the entropy of its mask and a seed of 64; 32 a weight where weights "
        "are trained; masks of criteria at the best density of their mean curve"
    )
    return Table(("network", "accuracy", "kept", "bits", "of dense"), tuple(lines), caption)


def heading_shares(selection: Selection) -> Table:
    """Which share of pruned and of kept weights moved towards zero, by criterion and layer.

    At the levels nearest to half and to a sixth of the weights; empty where rows have no counts.
    """
    lines: list[tuple[Cell, ...]] = []
    for curve in selection.curves:
        rows = [row for row in curve.rows if row.get("heading")]
        for tick in (0.5, 0.168):
            close = [row for row in rows if 2 / 3 < row["density"] / tick < 3 / 2]
            if not close:
                continue
            one = min(close, key=lambda row: abs(row["density"] - tick))["round"]
            near = [row for row in close if row["round"] == one]
            told = []
            for layer in (None, *near[0]["heading"]):
                sides = [
                    [heading.share(row["heading"], of, layer) for row in near]
                    for of in ("pruned", "kept")
                ]
                numbers = [
                    "" if None in side else percent(mean([x or 0.0 for x in side]), 1)
                    for side in sides
                ]
                told.append(" / ".join(numbers))
            lines.append((curve.words, f"{percent(mean([r['density'] for r in near]), 1)}%", *told))
    layers = next((row["heading"] for c in selection.curves for row in c.rows
                   if row.get("heading")), {})  # fmt: skip
    return Table(
        ("curve", "kept", "all layers", *layers),
        tuple(lines),
        "Weights that moved towards zero, in percent of the pruned / of the kept ones",
    )


# The paper's seven columns -> the fields of the rows behind each.
HEURISTIC = {"schedule": "one_shot", "criterion": "large_final_same_sign", "trained": False}
LEARNED = {"schedule": "learned", "trained": False, "init_score": 0.0}
SEVEN: dict[str, Row] = {
    "mask, init": {**HEURISTIC, "weights": "init"},
    "mask, signed constants": {**HEURISTIC, "weights": "signed_constant"},
    "learned, init": {**LEARNED, "weights": "init", "rescale": False},
    "learned, signed constants": {**LEARNED, "weights": "signed_constant", "rescale": False},
    "rescaled, init": {**LEARNED, "weights": "init", "rescale": True},
    "rescaled, signed constants": {**LEARNED, "weights": "signed_constant", "rescale": True},
    "trained weights": {"schedule": "iterative", "criterion": "none", "round": 0},
}


def rows_of(rows: Sequence[Row], fields: Row) -> list[Row]:
    """Rows that have these fields, on the data as it is, with all weights as final weights."""
    wanted = {"permuted": "none", "final_at": None, **fields}
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def seven(networks: Sequence[tuple[str, Sequence[Row]]]) -> Table:
    """Table 1 of the paper. networks: name shown -> all rows of that network and profile.

    A mask by large_final_same_sign counts at the best density of each run, see `densities`.
    """
    lines: list[tuple[Cell, ...]] = []
    for name, rows in networks:
        cells = []
        for fields in SEVEN.values():
            found = rows_of(rows, fields)
            if "criterion" in fields and fields["criterion"] != "none":
                level = best(found)
            else:
                level = next(iter(levels(found)), None)
            cells.append(NOT_RUN if level is None else f"{spread(level)} (n = {level.n})")
        lines.append((name, *cells))
    return Table(
        ("network", *SEVEN),
        tuple(lines),
        "Test accuracy in percent, mean [lowest, highest seed]. mask: large final, same sign, each "
        "run at its best density, untrained; learned: mean of ten sampled masks; rescaled: with "
        "dynamic weight rescaling.",
    )


def masks(selection: Selection) -> Table:
    """Learned masks: accuracy sampled and at threshold, density, and what a mask costs in bits.

    The spread beside the mean is that over seeds; that of the ten masks drawn of each network is a
    column of its own: the widest of any seed. Where the weights were trained afterwards, under one
    mask, there are neither.
    """
    rows: list[tuple[Cell, ...]] = []
    for curve in selection.curves:
        level = next((level for level in curve.levels() if level.round == 1), None)
        if level is None:
            continue

        def average(name: str, curve: Curve = curve) -> float | None:
            found = [row[name] for row in curve.rows if row.get(name) is not None]
            return mean(found) if found else None

        threshold, bits = average("threshold_accuracy"), average("mask_bits")
        drawn = [row["sample_accuracies"] for row in curve.rows if row.get("sample_accuracies")]
        if curve.fields["trained"]:  # the row has them of the masks before that
            threshold, drawn = None, []
        widest = max(drawn, key=lambda found: max(found) - min(found), default=None)
        seed = average("seed_bits")
        rows.append(
            (
                curve.words,
                level.n,
                spread(level),
                "" if widest is None else f"{percent(min(widest))} to {percent(max(widest))}",
                "" if threshold is None else percent(threshold),
                percent(level.density, 1),
                "" if bits is None else f"{bits:,.0f}",
                "" if seed is None else f"{seed:,.0f}",
            )
        )
    columns = (
        "learned mask", "n", "accuracy", "of ten masks", "at threshold", "kept", "mask bits",
        "seed bits",
    )  # fmt: skip
    return Table(
        columns, tuple(rows), "Accuracy and kept weights in percent; a network is a mask and a seed"
    )
