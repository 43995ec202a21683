"""Figures and tables: from synthetic rows to drawings that say what the rows say."""

import csv
import io
import math
from itertools import pairwise

import numpy as np
import pytest
import study_rows
import torch
from matplotlib.text import Text
from study_rows import STUDIES

from experiments.findings import tables
from experiments.findings.selection import select
from experiments.show import figures
from experiments.show.figures import plane as planes
from experiments.study.networks import NETWORKS, build

DRAWN = [name for name in STUDIES if name != "dense"]


@pytest.fixture(scope="module")
def rows():
    return study_rows.rows()


@pytest.fixture(scope="module")
def drawings(rows):
    """name -> its drawing, each made once; Figure objects are not changed by tests."""
    found = {}
    for name in DRAWN:
        ((_, found[name]),) = figures.draw(select(STUDIES[name], "fc", "paper", rows))
    return found


def texts(figure):
    return [item for item in figure.findobj(Text) if item.get_visible() and item.get_text()]


def told(figure):
    return "\n".join(item.get_text() for item in texts(figure))


# ---- selection ----------------------------------------------------------------------------------


def test_trained_curves_start_at_the_dense_network(rows):
    selection = select(STUDIES["mask-criteria"], "fc", "paper", rows)
    dense = {row["test_accuracy"] for row in selection.dense}
    assert len(dense) == 3
    for curve in selection.curves:
        assert set(curve.levels()[0].values) == dense
    untrained = select(STUDIES["supermasks"], "fc", "paper", rows).curves[0]
    assert set(untrained.levels()[0].values).isdisjoint(dense)


def test_curves_without_rows_are_named(rows):
    some = [row for row in rows if row["mask1"] != "reinit"]
    selection = select(STUDIES["mask-1"], "fc", "paper", some)
    assert selection.missing == ("reinit",)
    assert len(selection.curves) == 7


def test_other_networks_and_profiles_are_left_out(rows):
    assert not select(STUDIES["mask-1"], "conv4", "paper", rows).curves
    assert not select(STUDIES["mask-1"], "fc", "short", rows).curves


def test_seeds_are_counted_by_level(rows):
    some = [row for row in rows if row["seed"] < 2 or row["round"] < 5]
    assert select(STUDIES["mask-0"], "fc", "paper", some).seeds == "2 to 3 seeds per curve"


# ---- figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_is_clipped_and_legends_lie_outside(drawings, name):
    figure = drawings[name].figure
    figure.draw_without_rendering()
    parts = [axes.get_tightbbox() for axes in figure.axes]  # with the tick labels that are drawn
    parts += [item.get_window_extent() for item in (*figure.texts, *figure.legends)]
    for box in parts:
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= figure.bbox.width + 1
        assert box.y1 <= figure.bbox.height + 1
    for legend in figure.legends:
        for axes in figure.axes:
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())


@pytest.mark.parametrize("name", DRAWN)
def test_curves_differ_without_colour(drawings, name):
    for axes in drawings[name].figure.axes:
        looks = {
            line.get_label(): (
                line.get_marker(),
                str(line._dash_pattern),
                line.get_markerfacecolor() == "white",
            )
            for line in axes.get_lines()
            if not line.get_label().startswith("_")
        }
        assert len(set(looks.values())) == len(looks)


@pytest.mark.parametrize("name", ["same-sign", "learned"])
def test_files_are_the_same_each_time(drawings, rows, name):
    ((_, again),) = figures.draw(select(STUDIES[name], "fc", "paper", rows))
    assert again.svg() == drawings[name].svg()
    assert again.png() == drawings[name].png()
    assert b"<dc:date>" not in again.svg()


def test_the_density_axis_is_logarithmic_with_round_ticks(drawings):
    axes = drawings["mask-criteria"].figure.axes[0]
    assert axes.get_xscale() == "log"
    left, right = axes.get_xlim()
    assert left > right
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["100", "50", "20", "10", "5", "2"]
    for line in axes.get_lines():  # whole markers: none is cut by the sides
        if len(line.get_xdata()) > 2:
            assert right * 1.05 < min(line.get_xdata())
            assert max(line.get_xdata()) < left / 1.05


def test_heads_say_the_seeds_and_what_is_not_the_papers(rows):
    few = study_rows.rows([STUDIES["mask-0"]], profile="short", seeds=1)
    ((stem, drawing),) = figures.draw(select(STUDIES["mask-0"], "fc", "short", few))
    assert stem == "mask-0-fc-short"
    assert "FC on MNIST, 1 seed per curve" in told(drawing.figure)
    assert "not the paper's protocol: a tenth of the" in told(drawing.figure)


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}


def test_curves_and_the_dense_line_are_of_the_same_seeds():
    some = study_rows.rows([STUDIES["mask-0"]], seeds=5)
    some = [r for r in some if r["seed"] < 3 or r["mask0"] == "zero"]
    ((_, drawing),) = figures.draw(select(STUDIES["mask-0"], "fc", "paper", some))
    assert "the 3 seeds that all curves have" in told(drawing.figure)
    axes = drawing.figure.axes[0]
    dense = lines(axes)["dense, trained (mean, n = 3)"].get_ydata()[0]
    for label in ("zero", "Variant 1"):
        assert lines(axes)[label].get_ydata()[0] == pytest.approx(dense)


def test_the_second_panel_of_mask_0_shows_what_each_value_gains_over_zero(drawings, rows):
    upper, lower = drawings["mask-0"].figure.axes
    assert "zero" not in lines(lower)
    gains = lines(lower)["Variant 1"].get_ydata()
    above = lines(upper)["Variant 1"].get_ydata()[1:] - lines(upper)["zero"].get_ydata()[1:]
    assert list(gains) == pytest.approx(list(above))


def test_figure_3_has_the_nine_curves_of_the_paper_and_names_its_winners(drawings):
    upper = drawings["mask-criteria"].figure.axes[0]
    names = [name for name in lines(upper) if not name.startswith("dense")]
    assert len(names) == 9
    assert not [name for name in names if "sign" in name]
    named = [text.get_text() for text in upper.texts]
    assert {"large final", "magnitude increase", "movement", "large init large final"} < set(named)
    colors = {lines(upper)[name].get_color() for name in ("small final", "large init")}
    assert colors == {"#8a8a8a"}


def test_published_values_are_ticks(drawings):
    untrained = told(drawings["supermasks"].figure)
    assert all(f"article: {value}" in untrained for value in ("nearly 40%", "80%", "86%"))
    assert "published: 95.3%" in told(drawings["learned"].figure)
    assert "Frankle & Carbin: dense / 1.6" in told(drawings["early-stop"].figure)
    assert "article" in lines(drawings["first-bars"].figure.axes[0])


def test_learned_masks_are_dots_on_the_scale_of_what_is_shown(drawings):
    axes = drawings["learned"].figure.axes[0]
    low, high = axes.get_xlim()
    assert low > 0.9
    assert high - low < 0.09
    assert sum(len(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "o") == 12


def test_stars_stand_where_two_criteria_differ():
    study = study_rows.Study("mask-criteria", STUDIES["mask-criteria"].changes[:2])
    rows = study_rows.rows([study], seeds=5)
    for row in rows:
        if row["criterion"] == "magnitude_increase" and row["round"] == 3:
            row["test_accuracy"] -= 0.05
        elif row["round"] > 0:
            row["test_accuracy"] = 0.9 + 0.001 * row["seed"]
    ((_, drawing),) = figures.draw(select(study, "fc", "paper", rows))
    stars = [item for item in texts(drawing.figure) if item.get_text() == "*"]
    assert [star.get_position()[0] for star in stars] == pytest.approx([0.8**3] * 2)
    for row in rows:  # and where they differ nowhere, the figure says that
        row["test_accuracy"] = 0.9 + 0.001 * row["seed"]
    ((_, drawing),) = figures.draw(select(study, "fc", "paper", rows))
    assert "large final and magnitude increase differ at no level" in told(drawing.figure)
    assert "*" not in told(drawing.figure)


def test_two_seeds_are_too_few_for_stars():
    rows = study_rows.rows([STUDIES["mask-criteria"]], seeds=2)
    ((_, drawing),) = figures.draw(select(STUDIES["mask-criteria"], "fc", "paper", rows))
    assert "too few runs for a test (n = 2)" in told(drawing.figure)
    assert "*" not in told(drawing.figure)


def test_the_csv_holds_what_is_drawn(drawings):
    drawing = drawings["mask-0"]
    lines = list(csv.DictReader(io.StringIO(drawing.numbers.csv().decode())))
    zero = [line for line in lines if line["curve"] == "zero"]
    drawn = next(line for line in drawing.figure.axes[0].get_lines() if line.get_label() == "zero")
    assert [float(line["density"]) for line in zero] == drawn.get_xdata().tolist()
    assert [float(line["mean"]) for line in zero] == pytest.approx(drawn.get_ydata().tolist())
    for line in lines:
        values = list(map(float, line["values"].split()))
        assert len(values) == int(line["n"]) == 3
        assert float(line["mean"]) == pytest.approx(math.fsum(values) / 3)
        assert float(line["low95"]) < float(line["min"]) <= float(line["max"])


def test_a_drawing_is_three_files(tmp_path, rows):
    selection = select(STUDIES["same-sign"], "fc", "paper", rows)
    [(stem, drawing)] = figures.draw(selection)
    paths = drawing.save(tmp_path, stem)
    assert sorted(path.name for path in paths) == [
        f"same-sign-fc-paper.{kind}" for kind in ("csv", "png", "svg")
    ]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert not list(figures.draw(select(STUDIES["same-sign"], "conv4", "paper", rows)))


def test_the_plane_shows_what_a_criterion_keeps(rows):
    def weights(row):
        end = torch.Generator().manual_seed(row["seed"])
        return {
            f"final.{name}": value.detach() + 0.03 * torch.randn(value.shape, generator=end)
            for name, value in build(NETWORKS["fc"], row["seed"]).named_parameters()
        }

    selection = select(STUDIES["dense"], "fc", "paper", rows)
    plane, signs = (drawing for _, drawing in figures.draw(selection, weights))
    table = plane.numbers
    assert table.columns == ("w_init", "w_final", *planes.PLANE)
    at = table.columns.index("large_final")
    kept = [abs(row[1]) for row in table.rows if row[at]]
    pruned = [abs(row[1]) for row in table.rows if not row[at]]
    assert min(kept) >= max(pruned)
    assert len(kept) / len(table.rows) == pytest.approx(0.2, abs=0.03)
    assert all(row[0] * row[1] > 0 for row in signs.numbers.rows if row[2])
    assert list(figures.draw(selection)) == []  # no checkpoints, no plane
    kept = {f"{selection.stem}-plane": table}.get
    ((stem, again),) = figures.draw(selection, None, kept)  # but from the sample of an earlier one
    assert stem == f"{selection.stem}-plane"
    assert again.numbers == table
    titles = {axes.get_title() for axes in again.figure.axes}
    assert "magnitude increase\n$|w_f| - |w_i|$" in titles


@pytest.mark.parametrize("name", [n for n in (*planes.PLANE, *planes.SIGNS) if n != "random"])
def test_edges_lie_between_kept_and_pruned_weights(name):
    draws = torch.Generator().manual_seed(0)
    w_init = 0.04 * torch.randn(2_000, generator=draws)
    w_final = w_init + 0.15 * torch.randn(2_000, generator=draws)
    table = planes.points(w_init, w_final, "w", [name])
    x, y, kept = (np.array(column, dtype=float) for column in zip(*table.rows, strict=True))
    reach = float(np.abs(x).max()), float(np.abs(y).max())
    found = planes.edges(name, x, y, kept > 0, reach)
    assert found
    inside = kept > 0
    for i in range(0, len(x), 7):  # a straight way to a weight of the other kind crosses an edge
        j = int(np.flatnonzero(inside != inside[i])[0])
        assert crosses((x[i], y[i]), (x[j], y[j]), found)


def crosses(a, b, found):
    def side(p, q, r):
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return any(
        side(a, b, p) * side(a, b, q) <= 0 and side(p, q, a) * side(p, q, b) <= 0
        for xs, ys in found
        for p, q in pairwise(zip(xs, ys, strict=True))
    )


# ---- tables -------------------------------------------------------------------------------------


def test_a_table_in_three_forms():
    table = tables.Table(("a", "b"), (("x|y", 0.5), ("z", None)), "Numbers")
    assert table.csv() == b"a,b\nx|y,0.5\nz,\n"
    assert table.markdown() == "Numbers\n\n| a | b |\n| --- | --- |\n| x\\|y | 0.5 |\n| z |  |\n"
    assert table.text() == "Numbers\n\na    b\n---  ---\nx|y  0.5\nz\n"


def test_the_short_table_has_the_ticks_of_the_axis(rows):
    table = tables.summary(select(STUDIES["mask-0"], "fc", "paper", rows))
    assert table.columns[1:] == tuple(
        f"{tick}% kept" for tick in ("100", "41.0", "16.8", "6.9", "2.8", "1.2")
    )
    assert all(" [" in cell for row in table.rows for cell in row[1:])


def test_a_profile_of_few_rounds_is_shown_whole():
    rows = [r for r in study_rows.rows([STUDIES["mask-0"]], "conv4") if r["round"] % 4 == 0]
    for row in rows:
        row["density"] = 0.8157 ** row["round"]  # conv4: 44, 20, 8.7, 3.9, 1.7%
    selection = select(STUDIES["mask-0"], "conv4", "paper", rows)
    table = tables.summary(selection)
    assert table.columns == (
        "curve", "100% kept", "44.3% kept", "19.6% kept", "8.7% kept", "3.8% kept", "1.7% kept",
    )  # fmt: skip
    assert all(" [" in cell for row in table.rows for cell in row[1:])
    tests = tables.summary_of_tests(selection, selection.curves[0])
    assert tests.columns[1:] == table.columns[2:]
    ((_, drawing),) = figures.draw(selection)
    assert "At 19.6% kept: zero " in drawing.alt


def test_tests_against_a_curve(rows):
    selection = select(STUDIES["mask-0"], "fc", "paper", rows)
    full = tables.differences(selection, selection.curves[0])
    assert len(full.rows) == 5 * 20
    p, corrected = full.columns.index("p_paired"), full.columns.index("p_holm")
    assert all(row[p] <= row[corrected] for row in full.rows)
    short = tables.summary_of_tests(selection, selection.curves[0])
    assert [row[0] for row in short.rows] == [curve.words for curve in selection.curves[1:]]
    assert len(short.columns) == 6  # without the dense level


def test_table_1_has_seven_columns(rows):
    table = tables.seven([("FC", rows), ("Conv4", rows[:0])])
    assert len(table.columns) == 8
    fc, conv4 = table.rows
    assert all("(n = 3)" in cell for cell in fc[1:])
    assert set(conv4[1:]) == {"not run"}
    curves = select(STUDIES["supermasks"], "fc", "paper", rows).curves
    curve = next(c for c in curves if c.label == "large_final_same_sign, init")
    highest = [max(r["test_accuracy"] for r in curve.rows if r["seed"] == seed and r["round"])
               for seed in range(3)]  # fmt: skip
    assert fc[1].startswith(tables.percent(sum(highest) / 3))
    turned = table.turned("network")
    assert turned.columns == ("network", "FC", "Conv4")
    assert [row[0] for row in turned.rows] == list(table.columns[1:])


def test_masks_are_told_three_ways(rows):
    selection = select(STUDIES["supermasks"], "fc", "paper", rows)
    table = tables.ways(selection)
    line = next(line for line in table.rows if line[0] == "large final, same sign, initial weights")
    each, mean, validation = (str(cell) for cell in line[1:])
    assert float(each.split()[0]) >= float(mean.split()[0])
    assert validation == "not recorded"
    for row in rows:
        row["validation_accuracy"] = 0.9 if row["round"] == 3 else 0.1
    again = tables.ways(select(STUDIES["supermasks"], "fc", "paper", rows))
    line = next(line for line in again.rows if line[0] == "large final, same sign, initial weights")
    assert str(line[3]).endswith("at 51.2% kept")
    for row in rows:
        del row["validation_accuracy"]


def test_bits_of_a_mask_and_of_the_dense_network(rows):
    table = tables.bits(select(STUDIES["learned"], "fc", "paper", rows))
    mask, *_, dense = table.rows
    assert mask[2:] == ("50.0", "266,264", "3.12%")  # a bit a weight, and the seed
    assert dense[2:] == ("100", "8,531,520", "100%")


def test_shares_heading_to_zero_by_criterion_and_layer(rows):
    some = [dict(row) for row in rows]
    for row in some:
        row["heading"] = {"fc1.weight": [10, 8, 20, 5], "output.weight": [0, 0, 4, 1]}
    study = STUDIES["same-sign"]
    table = tables.heading_shares(select(study, "fc", "paper", some))
    assert table.columns == ("curve", "kept", "all layers", "fc1.weight", "output.weight")
    assert table.rows[0] == ("large final", "51.2%", "80.0 / 25.0", "80.0 / 25.0", " / 25.0")
    assert tables.heading_shares(select(study, "fc", "paper", rows)).rows == ()


def test_masks_drawn_before_the_weights_trained_are_not_shown_beside_them(rows):
    table = tables.masks(select(STUDIES["learned-trained"], "fc", "paper", rows))
    drawn, threshold = (table.columns.index(name) for name in ("of ten masks", "at threshold"))
    mask, trained = table.rows
    assert (mask[drawn], mask[threshold]) == ("92.00 to 94.00", "92.00")
    assert (trained[drawn], trained[threshold]) == ("", "")


def test_p_values_read_in_order():
    shown = [tables.p_value(p) for p in (None, 1e-9, 0.0123, 0.5)]
    assert shown == ["too few runs", "< 0.0001", "0.0123", "0.50"]
    assert all(a > b for a, b in pairwise(tables.TICKS))
