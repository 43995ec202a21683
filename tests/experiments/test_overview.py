"""The pictures of README.md and quickstart: their titles say what rows and times say."""

import json

import pytest
import study_rows
from study_rows import STUDIES

from experiments.__main__ import main
from experiments.findings.selection import select
from experiments.show.figures import quickstart as pictures
from experiments.show.figures.overview import overview

DENSITIES = (1.0, 0.8, 0.64, 0.51)


def speed():
    return {
        "iterations": 1000,
        "rounds": [
            {"density": d, "eager": 4.0, "eager_fused": 2.0, "ours": 2 * d} for d in DENSITIES
        ],
    }


def selection(accuracy_of):
    """mask-criteria with accuracies by (criterion, round)."""
    rows = study_rows.rows()
    for row in rows:
        if row["trained"] and row["criterion"] in ("large_final", "random", "none"):
            row["test_accuracy"] = accuracy_of(row["criterion"], row["round"])
    return select(STUDIES["mask-criteria"], "fc", "paper", rows)


def test_the_title_names_the_sparsest_ticket_that_loses_nothing():
    chosen = selection(lambda criterion, number: 0.98 if number <= 2 else 0.95)
    drawing = overview(chosen, speed())
    density = chosen.find(criterion="large_final").levels()[2].density
    assert f"With {density:.1%} of its weights" in drawing.alt
    nearest = min(DENSITIES, key=lambda d: abs(d - density))
    assert f"trains {2.0 / (2 * nearest):.1f} times as fast" in drawing.alt


def test_the_numbers_behind_it_are_milliseconds_of_a_step():
    table = overview(selection(lambda *_: 0.9), speed()).numbers
    times = [row[3] for row in table.rows if row[0] == "lottery_sparse, ms"]
    assert times == pytest.approx([2 * d for d in DENSITIES])
    assert {row[0] for row in table.rows} >= {"ticket", "random mask"}


def test_an_arm_without_rows_is_named():
    rows = [row for row in study_rows.rows() if row["criterion"] != "random"]
    with pytest.raises(ValueError, match="needs rows of mask-criteria with random"):
        overview(select(STUDIES["mask-criteria"], "fc", "paper", rows), speed())


def test_the_command_names_what_is_missing(tmp_path, capsys):
    assert main(["overview", "--store", str(tmp_path)]) == 1
    assert "speed.json cannot be read" in capsys.readouterr().err
    (tmp_path / "speed.json").write_text(json.dumps(speed()))
    assert main(["overview", "--store", str(tmp_path)]) == 1
    assert "is no store of results" in capsys.readouterr().err


# ---- the figure of quickstart --------------------------------------------------------------------


def tour(accuracies):
    """Numbers of a quickstart whose tickets of 50%, 25%, ... have these accuracies."""
    points = [{"density": 0.5 ** (i + 1), "accuracy": a} for i, a in enumerate(accuracies)]
    masks = {name: [{"density": 0.5, "accuracy": 0.2}] for name in pictures.UNTRAINED}
    masks["large_final"] = [{"density": 0.5, "accuracy": 0.3}, {"density": 0.1, "accuracy": 0.9}]
    return {
        "dense": {"accuracy": 0.94},
        "ticket": points,
        "supermask": {"init": [{"accuracy": 0.1}], **masks},
    }


def test_the_tours_titles_are_its_results():
    assert pictures.ticket_result(tour([0.95, 0.941, 0.93])) == (
        "A ticket of 25.0% of the weights reaches 94.1%,\nthe dense network 94.0%"
    )
    assert pictures.ticket_result(tour([0.8, 0.92])) == (
        "The best ticket reaches 92.0%, the dense network 94.0%"
    )
    assert "from 10.0% to 90.0%" in pictures.supermask_result(tour([0.95]))
    timings = {"step": {"dense_ms": 3.0, "compact_ms": 2.0}, "density": 0.1, "batch": 60}
    assert "1.5 times as fast\n(batch 60, 2 threads)" in pictures.time_result(
        {**timings, "threads": 2}
    )
